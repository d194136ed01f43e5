"""A model on disk: what it is made of, where its files are, and what they weigh."""
