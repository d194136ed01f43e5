"""A pipeline of Python: a model and how it runs, called with the names that diffusers has."""
