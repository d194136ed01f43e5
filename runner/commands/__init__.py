"""What can be said on the command line, and what comes of it."""
