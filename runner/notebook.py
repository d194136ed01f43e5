"""What notebooks import to see a run while it goes on, and what it took."""

from runner.reports.notebook import Charts, Live, Memory

__all__ = ["Charts", "Live", "Memory"]
