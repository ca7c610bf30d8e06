"""From a profile and a budget to a plan: one option per layer."""

from sft.planning.allocate import plan
from sft.planning.edit import check_plan
from sft.planning.solve import Solution, solve

__all__ = ["Solution", "check_plan", "plan", "solve"]
