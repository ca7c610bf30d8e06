"""Measuring a network on data: statistics, candidates, damage, cost."""
