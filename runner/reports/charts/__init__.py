"""What a run's record says, drawn: where blocks lay, what memory did, and which part took the time."""
