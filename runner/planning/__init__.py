"""Which component goes where, and what it costs, before anything is loaded."""
