"""The embedded network trained small: what is reached within half a point, and without any loss.

Each run is `sft compress` as a user would call it, with more steps than the demo's, on one thread;
the two drops run side by side. Sizes are tried from the smallest up, and the first whose file keeps
the score on the validation split is taken; the test images score that file alone. The figures are
of the exported files and of the packed one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import Found

from sft.core.progress import say
from sft.runtimes.targets import machine

STORED = Path(__file__).parent / "results" / "training-headline.json"
STEPS = ("--steps", "1800", "--integer-steps", "1200", "--integer-learning-rate", "1e-3",
         "--ema", "0.998")  # fmt: skip
TRIALS = {
    0.5: (("--size", "0.044", "--macs", "0.33"),),
    0.0: (("--size", "0.1"),),
}  # points of drop: budgets to try


def measure_headline(out: Path) -> Found:
    """Both drops, from the runs; keeps the figures for `read_headline`."""
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda drop: _smallest(drop, out), TRIALS))
    found: Found = {}
    for drop, (result, budget) in zip(TRIALS, results, strict=True):
        found |= _figures(result, drop) | {f"budget_for_{drop:g}_points": " ".join(budget)}
    found["headline_minutes"] = (time.monotonic() - started) / 60
    here = machine()
    found["headline_machine"] = f"{here['processor']}, {here['instruction_set']}"
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    return found


def read_headline() -> Found:
    """What the last full run stored."""
    stored: Found = json.loads(STORED.read_text())
    return stored | {"headline": "read from the stored result of the full run"}


def _smallest(drop: float, out: Path) -> tuple[dict[str, Any], Sequence[str]]:
    """The result of the first budget whose file keeps the validation score, or of the last."""
    for number, budget in enumerate(TRIALS[drop]):
        folder = out / f"{drop:g}-{number}"
        result = _compress(budget, drop, folder)
        validation = result["budget"]["validation_score"]
        kept = validation["before"] - validation["after"] <= drop / 100 + 1e-9
        say(f"{' '.join(budget)}: {'kept' if kept else 'lost'} ({validation})")
        if kept:
            break
    return result, budget


def _compress(budget: Sequence[str], drop: float, out: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "sft", "compress", "fashion-resnet", "--data", "fashion-mnist",
        "--evaluate", "top1", *budget, "--max-drop", str(drop / 100), *STEPS, "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def _figures(result: dict[str, Any], drop: float) -> Found:
    before, after = result["before"], result["after"]
    name = "" if drop else "_at_zero_drop"
    found: Found = {
        f"{key}_ratio{name}": float(before[of]) / float(after[of])
        for key, of in (("size", "packed_bytes"), ("onnx", "file_bytes"), ("macs", "macs"),
                        ("latency", "latency_ms"), ("latency_least", "latency_ms_min"))
    }  # fmt: skip
    validation = result["budget"]["validation_score"]
    return found | {
        f"drop_points{name}": 100 * (before["score"] - after["score"]),
        f"validation_drop_points{name}": 100 * (validation["before"] - validation["after"]),
        f"test_score_before{name}": 100 * before["score"],
        f"weight_bits_mean{name}": after["weight_bits_mean"],
        f"packed_bytes{name}": after["packed_bytes"],
        f"check_passed{name}": str(result["check"]["passed"]),
    }
