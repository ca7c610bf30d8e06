"""How far decomposition alone goes: no gradient step, eager fp32, plain SVD beside data-aware.

    python benchmarks/no_finetuning.py            all networks, three budgets each
    python benchmarks/no_finetuning.py --quick    two networks, one budget each, fewer test images

Networks: the embedded fashion-resnet (test accuracy); EfficientNet-Lite0 with its ImageNet weights
(agreement with the original on held-out photos, three crops of each; calibrated on other photos and
on drawings, which have no part in the score); a 1-d and a recurrent keyword spotter of our own
training (test accuracy). Each is profiled once, planned for every budget by damage per MAC, split,
and refined and fitted in closed form (`sft.reconstruct`) where that helps on held-out calibration
data; on EfficientNet-Lite0 it never did, and is left out. "Plain SVD" is the same without data:
ranks by the same planning with the weights' own errors and measured damage, factors by truncated
SVD, no fitting. Test data is touched only to score. The last line printed is one JSON object.
"""

import argparse
import csv
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite import load_efficientnet_lite0
from keyword_networks import load_keyword_network
from keywords import keyword_data
from photos import load_other_pictures, load_photos
from torch import nn

import sft
from sft.core.data import Loader, inputs_of
from sft.runtimes.targets import machine

RESULTS = Path(__file__).parent / "results"
PLAIN = ("channel_in", "channel_out", "spatial")
AWARE = ("channel_in", "interpolative", "separable", "spatial", "tucker2")
PAIR = ("interpolative", "spatial")  # for networks of pointwise layers and a stem
QUICK_TEST, QUICK_PICTURES = 2500, 300


@dataclasses.dataclass(frozen=True)
class Case:
    """One network with its data, score and budgets (the original's MACs over the new ones)."""

    name: str
    model: nn.Module
    data: sft.Data
    test: Loader
    score: Callable[[nn.Module, Loader], float]
    ratios: tuple[float, ...]
    plan_with: dict[str, Any]
    aware: tuple[str, ...] = AWARE
    fit: bool = True


def main() -> None:
    options = _parse()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for make in (_fashion, _efficientnet) if options.quick else CASES:
        rows += _run(make(options.quick), options.quick)
        if not options.quick:
            _write(rows)
    found = {(r["network"], r["asked"], r["method"]): r for r in rows}
    fashion, lite = "fashion-resnet", "efficientnet-lite0"
    figures = {
        "fashion_drop_points_2x": found[fashion, 2.0, "data-aware"]["drop_points"],
        "fashion_plain_svd_drop_points_2x": found[fashion, 2.0, "plain SVD"]["drop_points"],
        "efflite0_agreement_1p10x": found[lite, 1.1, "data-aware"]["score"],
        "efflite0_plain_svd_agreement_1p10x": found[lite, 1.1, "plain SVD"]["score"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def _run(case: Case, quick: bool) -> list[dict[str, Any]]:
    """All budgets of one network by both methods; scores in percent."""
    rows = []
    before = 100 * case.score(case.model, case.test)
    ratios = tuple(r for r in case.ratios if r in (1.1, 2.0)) if quick else case.ratios
    for method, data_free in (("data-aware", False), ("plain SVD", True)):
        started = time.monotonic()
        schemes = PLAIN if data_free else case.aware
        profile = sft.profile(
            case.model, case.data, name=case.name, schemes=schemes, weight_bits=None,
            data_free=data_free, loss_aware=not data_free, **case.plan_with,
        )  # fmt: skip
        profiled = time.monotonic() - started
        for ratio in ratios:
            started = time.monotonic()
            plan = sft.plan(profile, sft.Budget(macs=1 / ratio))
            small = sft.apply(case.model, plan)
            if not data_free and case.fit:
                small = sft.reconstruct(small, case.model, case.data.calibration)
            score = 100 * case.score(small, case.test)
            rows.append({
                "network": case.name, "method": method, "asked": ratio,
                "macs_ratio": plan.original.macs / plan.cost.macs,
                "before": before, "score": score, "drop_points": before - score,
                "profile_seconds": profiled, "seconds": time.monotonic() - started,
            })  # fmt: skip
            print(
                f"{case.name:20} {method:10} {ratio:4}x ({rows[-1]['macs_ratio']:.3f}x)  "
                f"{before:6.2f} -> {score:6.2f}  profile {profiled:.0f} s",
                flush=True,
            )
    return rows


def _fashion(quick: bool) -> Case:
    model, data = sft.load_model("fashion-resnet"), sft.load_data("fashion-mnist")
    test = _first(data.split("test")[0], QUICK_TEST) if quick else data.split("test")[0]
    return Case(
        "fashion-resnet", model, data, test, _accuracy, (1.5, 2.0, 3.0),
        {"rank_multiple": 4, "anchor_samples": 128 if quick else 256},
    )  # fmt: skip


def _efficientnet(quick: bool) -> Case:
    model = load_efficientnet_lite0()
    others = load_other_pictures()[: QUICK_PICTURES if quick else None]
    photos = torch.cat([load_photos("calibration"), others])
    photos = photos[torch.randperm(len(photos))]
    test = load_photos("test", crops=3)
    return Case(
        "efficientnet-lite0", model, sft.Data(calibration=sft.Batches(photos, batch_size=32)),
        sft.Batches(test, batch_size=32), _agreement_with(model), (1.1, 1.25, 1.5),
        {"rank_multiple": 2, "anchor_samples": 32 if quick else 64, "anchor_error": 0.01}, PAIR,
        fit=False,
    )  # fmt: skip


def _waveform(quick: bool) -> Case:
    return _keywords("waveform")


def _spectrogram(quick: bool) -> Case:
    return _keywords("spectrogram")


def _keywords(form: str) -> Case:
    data = keyword_data(form=form)
    return Case(
        f"keywords-{form}", load_keyword_network(form), data, data.split("test")[0], _accuracy,
        (1.5, 2.0, 3.0), {"rank_multiple": 4},
    )  # fmt: skip


CASES = (_fashion, _efficientnet, _waveform, _spectrogram)


@torch.no_grad()
def _accuracy(model: nn.Module, loader: Loader) -> float:
    """Share of right answers."""
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in loader]
    return float(torch.cat(right).mean())


def _agreement_with(original: nn.Module) -> Callable[[nn.Module, Loader], float]:
    """Share of inputs on which a network decides as the original does."""

    @torch.no_grad()
    def agreement(model: nn.Module, loader: Loader) -> float:
        same = [
            (model(inputs_of(x)).argmax(1) == original(inputs_of(x)).argmax(1)).float()
            for x in loader
        ]
        return float(torch.cat(same).mean())

    return agreement


def _first(loader: Loader, count: int) -> Loader:
    kept, have = [], 0
    for x, y in loader:
        kept.append((x, y))
        have += len(x)
        if have >= count:
            break
    return kept


def _write(rows: Sequence[dict[str, Any]]) -> None:
    here = machine()
    processor = "-".join(here["processor"].lower().split()[:2])
    short = f"{processor}-{here['instruction_set']}-{here['logical_cores']}-cores"
    path = RESULTS / f"no_finetuning-{short}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(f"written to {path} ({here['processor']}, torch {here['versions']['torch']})")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
