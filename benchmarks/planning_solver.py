"""The knapsack: against all choices of small instances, and its time on large ones; replanning."""

import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from figures import Found
from numpy.typing import NDArray

from sft.planning.solve import solve

Row = NDArray[np.float64]
COSTS = ("size", "macs", "latency")
INSTANCES = 500
LARGE = ((60, 40), (54, 150))  # layers, options
TIGHTNESS = (0.3, 0.6)


def instance(layers: int, options: int, seed: int) -> tuple[list[Row], dict[str, list[Row]]]:
    """Menus like real ones: damage falls as all costs rise, which go together, with noise."""
    random = np.random.default_rng(seed)
    level = [np.sort(random.uniform(0.02, 1, options)) for _ in range(layers)]
    damages = [10 ** random.uniform(-4, -1) * x ** -random.uniform(0.5, 2) for x in level]
    costs = {
        name: [10 ** random.uniform(0, 2) * x * random.uniform(0.8, 1.2, options) for x in level]
        for name in COSTS
    }
    return damages, costs


def limits_of(costs: dict[str, list[Row]], share: float) -> dict[str, float]:
    """Limits at a share of the way from the least total to the greatest."""
    ends = {
        n: (sum(c.min() for c in rows), sum(c.max() for c in rows)) for n, rows in costs.items()
    }
    return {name: low + share * (high - low) for name, (low, high) in ends.items()}


def measure_solver(seeds: int) -> Found:
    wrong = sum(not _equals_brute_force(seed) for seed in range(INSTANCES))
    found: Found = {"knapsack_instances": INSTANCES, "knapsack_wrong": wrong}
    for layers, options in LARGE:
        times: list[float] = []
        for seed, share in itertools.product(range(seeds), TIGHTNESS):
            damages, costs = instance(layers, options, seed)
            started = time.perf_counter()
            solve(damages, costs, limits_of(costs, share))
            times.append(time.perf_counter() - started)
        name = f"milp_seconds_{layers}x{options}"
        found[f"{name}_median"], found[f"{name}_worst"] = statistics.median(times), max(times)
    found["milp_seconds"] = found["milp_seconds_60x40_worst"]
    return found


def _equals_brute_force(seed: int) -> bool:
    random = np.random.default_rng(seed)
    damages, costs = instance(int(random.integers(2, 5)), int(random.integers(2, 7)), 1000 + seed)
    limits = limits_of(costs, float(random.uniform(0.02, 0.9)))
    best = min(
        (
            sum(d[i] for d, i in zip(damages, choice, strict=True))
            for choice in itertools.product(*(range(len(d)) for d in damages))
            if all(
                sum(c[i] for c, i in zip(costs[n], choice, strict=True)) <= most
                for n, most in limits.items()
            )
        ),
        default=None,
    )
    found = solve(damages, costs, limits)
    if best is None:
        return found.status == "infeasible"
    return bool(found.status != "infeasible" and abs(found.value - best) <= 1e-9 * best)


def measure_replanning(profile: Path, out: Path, runs: int = 5) -> Found:
    """Whole processes of `sft plan` on a saved profile, budgets that were not planned before."""
    times = []
    for number in range(runs):
        latency = f"{0.3 + 0.02 * number:.2f}"
        command = [sys.executable, "-m", "sft", "plan", str(profile), "--latency", latency]
        started = time.perf_counter()
        subprocess.run([*command, "-o", str(out)], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return {"replan_seconds": statistics.median(times), "replan_seconds_worst": max(times)}
