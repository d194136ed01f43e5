"""A run past one machine, on Ray."""
