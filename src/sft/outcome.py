"""`result.json`: what came in, what came out, what was asked, all measured on exported files."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sft.core.budget import Budget
from sft.core.data import Evaluate, Loader
from sft.core.errors import InputError
from sft.core.records import Artifact, Check, Cost, Plan, Profile, Timing
from sft.exporters import mean_bits, storage_of
from sft.runtimes.runner import Runner, predict_with
from sft.runtimes.targets import find_target, machine

SCHEMA = 1
ROUNDING = 1e-9  # a drop of exactly max_drop is allowed, whatever the last bit says


def score_file(artifact: Artifact, evaluate: Evaluate, loader: Loader, threads: int = 1) -> float:
    """The user's score of an exported file, run in its runtime."""
    with Runner(artifact.path, find_target(artifact.target).runtime, threads) as runner:
        score = float(evaluate(predict_with(runner), loader))
    if not math.isfinite(score):
        raise InputError(
            f"evaluate returned {score} for '{artifact.path}'; a finite score is wanted."
        )
    return score


def describe(
    profile: Profile,
    plan: Plan,
    budget: Budget,
    *,
    files: tuple[Artifact, Artifact],
    packed_bytes: tuple[int, int],
    timings: Sequence[Timing],
    check: Check,
    test_scores: tuple[float, float],
    validation_scores: tuple[float, float],
    params: int,
) -> dict[str, Any]:
    """Everything of `result.json` that was measured; pairs are (before, after).

    params : parameters of the network that was exported.
    """
    counts, macs = (profile.params, params), (profile.macs, plan.cost.macs)
    before, after = (
        _side(files[i], packed_bytes[i], counts[i], macs[i], test_scores[i], timings[i])
        for i in (0, 1)
    )
    bits = [(r.option.weight_bits or 32, r.cost.params) for r in plan.rows]
    after["weight_bits_mean"] = sum(b * n for b, n in bits) / max(sum(n for _, n in bits), 1)
    after["storage_bits_mean"] = mean_bits(storage_of(files[1]))
    after["compute_bits"] = 8 if check.integer_macs_fraction > 0.99 else 32
    memory = (profile.memory, plan.cost.memory)
    costs = (_cost(before, memory[0]), _cost(after, memory[1]))
    missed = _missed(budget, *costs, validation_scores)
    return {
        "schema": SCHEMA,
        "model": profile.model,
        "target": plan.target,
        **_machine(),
        "before": before,
        "after": after,
        "budget": {
            "asked": budget.asked(),
            "met": not missed,
            "missed": " ".join(missed),
            "validation_score": {"before": validation_scores[0], "after": validation_scores[1]},
        },
        "check": {
            "passed": check.passed,
            "max_abs": check.max_abs,
            "sqnr_db": check.sqnr_db,
            "agreement": check.agreement,
            "integer_macs_fraction": check.integer_macs_fraction,
            "failures": list(check.failures),
        },
        "layers": _layers(profile, plan),
    }


def _side(
    artifact: Artifact, packed: int, params: int, macs: int, score: float, timing: Timing
) -> dict[str, Any]:
    return {
        "file_bytes": artifact.file_bytes,
        "packed_bytes": packed,
        "params": params,
        "macs": macs,
        "score": score,
        "latency_ms": timing.latency_ms,
        "latency_ms_min": timing.latency_ms_min,
        "latency_ms_p90": timing.latency_ms_p90,
        "peak_memory_bytes": timing.peak_memory_bytes,
    }


def _cost(side: dict[str, Any], memory: int) -> Cost:
    """What was measured, as a cost; memory: of activations, which is computed."""
    return Cost(side["params"], side["macs"], side["file_bytes"], side["latency_ms"], memory)


def _missed(budget: Budget, before: Cost, after: Cost, scores: tuple[float, float]) -> list[str]:
    """Which parts of the budget the measured file misses, in words."""
    missed: list[str] = []
    limits = budget.limits(before)
    for cost, measured in dataclasses.asdict(after).items():
        limit = limits.get(cost, float("inf"))
        if measured > limit:
            said = f"{limit:,.0f}" if limit >= 1000 else f"{limit:.4g}"
            missed.append(f"{cost}: {measured:,} where at most {said} was asked.")
    drop = scores[0] - scores[1]
    if budget.max_drop is not None and drop > budget.max_drop + ROUNDING:
        missed.append(
            f"The validation score fell by {drop:.4f} ({scores[0]:.4f} to {scores[1]:.4f}) where "
            f"at most {budget.max_drop} was asked: allow more size or MACs, or train longer."
        )
    return missed


def _layers(profile: Profile, plan: Plan) -> list[dict[str, Any]]:
    original = {p.layer.name: p.layer for p in profile.layers}
    return [
        {
            "name": row.name,
            "scheme": row.option.scheme,
            "rank": list(row.option.rank),
            "weight_bits": row.option.weight_bits,
            "predicted_damage": row.predicted_damage,
            "reason": row.reason,
            "params": row.cost.params,
            "macs": row.cost.macs,
            "size": row.cost.size,
            "params_before": original[row.name].params,
            "macs_before": original[row.name].macs,
            "size_before": 4 * original[row.name].params,
        }
        for row in plan.rows
    ]


def _machine() -> dict[str, Any]:
    here = machine()
    return {
        "versions": here["versions"],
        "machine": f"{here['processor']}, {here['instruction_set']}, {here['logical_cores']} cores",
    }
