"""How a run happens: plan, run, keep, report."""
