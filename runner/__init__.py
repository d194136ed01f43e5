"""How a run happens: plan, run, keep, report."""

from runner.plan import Plan, plan
from runner.request import Request
from runner.run import Report, run, run_stage

__all__ = ["Plan", "Report", "Request", "plan", "run", "run_stage"]
