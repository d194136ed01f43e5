"""Damage of every kind, made by chance, and what comes of it: see `targets` for what is damaged, `isolation` for how
a case is held to its seconds and bytes, and `benchmarks/fuzz.py` for thousands of them."""
