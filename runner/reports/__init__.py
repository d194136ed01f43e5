"""What a run tells, shows and leaves to be looked at."""
