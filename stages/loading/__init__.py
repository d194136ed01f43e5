"""Weights on their way from files to where they live, and what is merged into them there."""
