"""Predicted against measured, over random plans of nearly one size.

Latencies are the least of many runs, both those that predictions add up and those of the files:
other work on the machine only ever adds time. The errors against medians are listed beside them.
"""

import random
import statistics

from figures import Found
from planning_cases import RUNTIME, Case, integers, stored_tensor_bytes
from scipy.stats import spearmanr

from sft.core.progress import say
from sft.core.records import Candidate, Plan
from sft.profiling.cost import stored_bytes
from sft.runtimes.runner import Runner, benchmark_interleaved
from sft.runtimes.targets import find_target

WINDOW = 0.1  # sizes of all plans: within this share of the budget
STEPS = 5000


def draw_plan(case: Case, generator: random.Random) -> Plan:
    """A random option for each layer, then random exchanges until the size is in the window."""
    menus = [integers(entry) for entry in case.profile.layers]
    most = case.budget * case.profile.size
    while True:
        chosen: list[Candidate] = [generator.choice(menu) for menu in menus]
        for _ in range(STEPS):
            size = sum(c.cost.size for c in chosen)
            if (1 - WINDOW) * most <= size <= most:
                return case.plan_of(chosen, "drawn at random")
            place = generator.randrange(len(menus))
            other = generator.choice(menus[place])
            if (other.cost.size < chosen[place].cost.size) == (size > most):
                chosen[place] = other


def measure_predictions(case: Case, plans: int) -> Found:
    """Errors of the predicted costs, and rank correlation of the predicted damage."""
    generator = random.Random(0)
    target = find_target(case.profile.target)
    predicted, damages, files, drawn = [], [], [], []
    wrong_bytes = wrong_macs = 0
    size_errors = []
    for number in range(plans):
        plan = draw_plan(case, generator)
        artifact = case.build(plan)
        damages.append(case.damage(artifact))
        predicted.append(plan.value)
        layers = {entry.layer.name: entry.layer for entry in case.profile.layers}
        exact = sum(stored_bytes(layers[r.name], r.option, target) for r in plan.rows)
        wrong_bytes += exact != stored_tensor_bytes(artifact.path)
        with Runner(artifact.path, RUNTIME) as runner:
            wrong_macs += sum(kernel.macs for kernel in runner.place()) != plan.cost.macs
        size_errors.append(abs(plan.cost.size / artifact.file_bytes - 1))
        files.append(artifact)
        drawn.append(plan)
        say(f"plan {number + 1}/{plans}: damage {plan.value:.4g} predicted, {damages[-1]:.4g}")
    timings = benchmark_interleaved(files, RUNTIME, 1)
    pairs = list(zip((plan.cost.latency or 0.0 for plan in drawn), timings, strict=True))
    errors = [abs(milliseconds / timing.latency_ms_min - 1) for milliseconds, timing in pairs]
    of_medians = [abs(milliseconds / timing.latency_ms - 1) for milliseconds, timing in pairs]
    return {
        f"{case.name}_plans": plans,
        f"{case.name}_plans_with_wrong_bytes": wrong_bytes,
        f"{case.name}_plans_with_wrong_macs": wrong_macs,
        f"{case.name}_file_bytes_error_worst": max(size_errors),
        f"{case.name}_latency_error_median": statistics.median(errors),
        f"{case.name}_latency_error_worst": max(errors),
        f"{case.name}_latency_error_of_medians_median": statistics.median(of_medians),
        f"{case.name}_latency_error_of_medians_worst": max(of_medians),
        f"{case.name}_damage_spearman": float(spearmanr(predicted, damages).statistic),
    }
