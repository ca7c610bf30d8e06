"""The embedded network trained small: what is reached within half a point, and without any loss.

Each run is `sft compress` as a user would call it, with more steps than the demo's, on one thread.
For the figure without loss several sizes are trained, two at a time; the smallest whose file keeps
the score on the validation split is taken, or, if none does, the one that loses least there. The
test images score that file alone. The figures are of the exported files and of the packed one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import Found

from sft.runtimes.targets import machine

STORED = Path(__file__).parent / "results" / "training-headline.json"
STEPS = ("--steps", "1800", "--integer-steps", "1200", "--integer-learning-rate", "1e-3",
         "--ema", "0.998")  # fmt: skip
HALF_A_POINT = ("--size", "0.044", "--macs", "0.33")
WITHOUT_LOSS = (("--size", "0.08"), ("--size", "0.12"))


def measure_headline(out: Path) -> Found:
    """Within half a point of the original; keeps the figures for `read_headline`."""
    result = _compress(HALF_A_POINT, 0.5, out / "headline")
    found = _figures(result, "") | {"budget_for_0.5_points": " ".join(HALF_A_POINT)}
    return _stored(found | {"headline_minutes": _minutes(result)})


def measure_zero_drop(out: Path) -> Found:
    """The smallest that loses nothing, of some sizes; keeps the figures for `read_headline`."""

    def run(budget: Sequence[str]) -> dict[str, Any]:
        return _compress(budget, 0.0, out / "-".join(budget).strip("-"))

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(WITHOUT_LOSS, pool.map(run, WITHOUT_LOSS), strict=True))
    drops = {budget: _validation_drop(result) for budget, result in results.items()}
    kept = [budget for budget, drop in drops.items() if drop <= 1e-9]
    taken = min(kept) if kept else min(drops, key=lambda budget: drops[budget])
    found: Found = {
        f"validation_drop_points_{'_'.join(budget).strip('-')}": drop
        for budget, drop in drops.items()
    }
    found |= _figures(results[taken], "_at_zero_drop") | {"budget_for_0_points": " ".join(taken)}
    minutes = sum(_minutes(result) for result in results.values())
    return _stored(found | {"zero_drop_minutes_of_one_thread": minutes})


def read_headline() -> Found:
    """What the last full runs stored."""
    stored: Found = json.loads(STORED.read_text())
    return stored | {"headline": "read from the stored results of the full runs"}


def _stored(found: Found) -> Found:
    """Kept beside what the other run stored."""
    here = machine()
    found["headline_machine"] = f"{here['processor']}, {here['instruction_set']}"
    before = json.loads(STORED.read_text()) if STORED.exists() else {}
    STORED.write_text(json.dumps(before | found, indent=1) + "\n")
    return found


def _compress(budget: Sequence[str], drop: float, out: Path) -> dict[str, Any]:
    """The result in a folder, which is made if an earlier run has not."""
    if (out / "result.json").is_file():
        stored: dict[str, Any] = json.loads((out / "result.json").read_text())
        return stored
    command = [
        sys.executable, "-m", "sft", "compress", "fashion-resnet", "--data", "fashion-mnist",
        "--evaluate", "top1", *budget, "--max-drop", str(drop / 100), *STEPS, "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def _minutes(result: dict[str, Any]) -> float:
    """How long a run took, all its steps together."""
    return sum(result["seconds"].values()) / 60


def _validation_drop(result: dict[str, Any]) -> float:
    """Points lost on the validation split."""
    scores = result["budget"]["validation_score"]
    return 100 * (float(scores["before"]) - float(scores["after"]))


def _figures(result: dict[str, Any], name: str) -> Found:
    before, after = result["before"], result["after"]
    found: Found = {
        f"{key}_ratio{name}": float(before[of]) / float(after[of])
        for key, of in (("size", "packed_bytes"), ("onnx", "file_bytes"), ("macs", "macs"),
                        ("latency", "latency_ms"), ("latency_least", "latency_ms_min"))
    }  # fmt: skip
    return found | {
        f"drop_points{name}": 100 * (before["score"] - after["score"]),
        f"validation_drop_points{name}": _validation_drop(result),
        f"test_score_before{name}": 100 * before["score"],
        f"weight_bits_mean{name}": after["weight_bits_mean"],
        f"packed_bytes{name}": after["packed_bytes"],
        f"check_passed{name}": str(result["check"]["passed"]),
    }
