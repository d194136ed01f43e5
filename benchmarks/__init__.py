"""What the README says in numbers and pictures, made by scripts that anyone can run."""
