"""Command lines by chance, on simulated cards by chance: `case.py` makes one, `judge.py` says whether it ended well,
`models.py` has the models and what their unsplit pipelines make; `benchmarks/sweep.py` runs thousands."""
