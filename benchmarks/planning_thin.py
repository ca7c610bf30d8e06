"""A layer that low rank does not make faster is kept whole, the report says so, and it is true.

The network is the small depthwise one: 16 to 80 channels between its blocks. It is profiled with
latency and planned under a latency half way between the least that is planned for and that of whole
layers in 8 bits. Every claim is then measured on files of the whole network that differ in one
layer: whole as planned, against the low rank that the reason names as the fastest. A claim is true
if the split file is no faster, beyond what two files of the same plan differ by.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from depthwise_network import load_fashion_mobilenet
from figures import Found
from planning_cases import FASHION_JUDGED, RUNTIME, Case

import sft
from sft.core.progress import say
from sft.core.records import Candidate, LayerProfile, Plan
from sft.planning.allocate import pose
from sft.planning.menus import fastest, gains_no_time, is_low_rank
from sft.runtimes.runner import benchmark_interleaved

SENTENCE = "low rank gains no time here"
SAME = 3  # files of the plan itself: how far apart they are is the noise
TOGETHER = 8  # files timed in one interleaved run


def measure_thin(folder: Path) -> Found:
    case = _case(folder)
    plan = _plan(case)
    kept = [
        entry
        for entry, row in zip(case.profile.layers, plan.rows, strict=True)
        if gains_no_time(entry) and not row.option.rank
    ]
    reasons = {row.name: row.reason for row in plan.rows}
    page = sft.report(folder / "thin.html", plan).read_text()
    said = [e for e in kept if SENTENCE in reasons[e.layer.name] and reasons[e.layer.name] in page]
    gains, noise = _gains(case, plan, said)
    for entry, gain in zip(said, gains, strict=True):
        say(f"{entry.layer.name}: {-gain:+.2%} latency when split (noise {noise:.2%})")
    split = [row for row in plan.rows if row.option.rank]
    return {
        "thin_layers": len(plan.rows),
        "thin_layers_split": len(split),
        "thin_layers_kept": len(kept),
        "thin_layers_kept_with_reason": len(said),
        "thin_claims_measured_true": sum(gain <= noise for gain in gains),
        "thin_gain_greatest": max(gains, default=0.0),
        "thin_gain_mean": sum(gains) / max(len(gains), 1),
        "thin_noise": noise,
        "thin_latency_ms_planned": plan.cost.latency or 0.0,
    }


def _case(folder: Path) -> Case:
    data = sft.load_data("fashion-mnist", "fashion-resnet")
    images = torch.cat([x for x, _ in data.split("validation")[0]])[:FASHION_JUDGED]
    model = load_fashion_mobilenet()
    return Case("fashion-mobilenet", model, data, images, folder, 1.0, ())


def _plan(case: Case) -> Plan:
    """Under a latency that whole layers do not reach, if low rank gains any time at all."""
    whole = sft.plan(case.profile, sft.Budget()).cost.latency or 0.0
    problem, _ = pose(case.profile, {}, (), {}, limited=True)
    return sft.plan(case.profile, sft.Budget(latency_ms=0.5 * (whole + problem.least("latency"))))


def _gains(case: Case, plan: Plan, kept: Sequence[LayerProfile]) -> tuple[list[float], float]:
    """How much faster the whole network is with each layer split, and the greatest difference of
    files of the same plan; shares of its latency.

    Minima of interleaved runs, which say what a file takes when nothing disturbs it.
    """
    gains: list[float] = []
    noise = 0.0
    for start in range(0, len(kept), TOGETHER):
        part = kept[start : start + TOGETHER]
        files = [case.build(plan) for _ in range(SAME)]
        files += [case.build(_split(plan, entry)) for entry in part]
        timings = [t.latency_ms_min for t in benchmark_interleaved(files, RUNTIME, 1, rounds=30)]
        whole = min(timings[:SAME])
        noise = max(noise, max(timings[:SAME]) / whole - 1)
        gains += [1 - milliseconds / whole for milliseconds in timings[SAME:]]
    return gains, noise


def _split(plan: Plan, entry: LayerProfile) -> Plan:
    return plan.replace(entry.layer.name, _fastest_low_rank(entry).option)


def _fastest_low_rank(entry: LayerProfile) -> Candidate:
    found = fastest(entry)
    assert found is not None
    assert is_low_rank(found[0])
    return found[0]
