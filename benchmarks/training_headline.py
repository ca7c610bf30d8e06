"""The embedded network trained small: what is reached within half a point, and without any loss.

Each run is `sft.compress` as a user would call it, with more steps than the demo's. Sizes are tried
from the smallest up, and the first whose file keeps the score on the validation split is taken;
the test images score that file alone. The figures are of the exported files and of the packed one.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from figures import Found

import sft
from sft.core.progress import say
from sft.pipeline import Training
from sft.runtimes.targets import machine

STORED = Path(__file__).parent / "results" / "training-headline.json"
TRAINING = Training(
    steps=3000, integer_steps=2000, learning_rate=2e-3, integer_learning_rate=1e-3, ema=0.998
)
TRIALS = {0.5: (0.044,), 0.0: (0.06, 0.08, 0.11)}  # points of drop, sizes to try
MACS = 0.33


def measure_headline(out: Path) -> Found:
    """Both drops, from the runs; keeps the figures for `read_headline`."""
    started = time.monotonic()
    found: Found = {}
    for drop, sizes in TRIALS.items():
        for size in sizes:
            result = _compress(size, drop, out / f"{drop:g}-{size:g}")
            validation = result["budget"]["validation_score"]
            kept = validation["before"] - validation["after"] <= drop / 100 + 1e-9
            say(f"size {size}: {'kept' if kept else 'lost'} ({validation})")
            if kept:
                break
        found |= _figures(result, drop, size)
    found["headline_minutes"] = (time.monotonic() - started) / 60
    here = machine()
    found["headline_machine"] = f"{here['processor']}, {here['instruction_set']}"
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    return found


def read_headline() -> Found:
    """What the last full run stored."""
    stored: Found = json.loads(STORED.read_text())
    return stored | {"headline": "read from the stored result of the full run"}


def _compress(size: float, drop: float, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    budget = sft.Budget(size=size, macs=MACS, max_drop=drop / 100)
    result = sft.compress(
        sft.load_model("fashion-resnet"), sft.load_data("fashion-mnist", "fashion-resnet"), budget,
        evaluate=sft.top1, out=out, training=TRAINING, name="fashion-resnet",
    )  # fmt: skip
    return result.data


def _figures(result: dict[str, Any], drop: float, size: float) -> Found:
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
        f"size_asked{name}": size,
        f"test_score_before{name}": 100 * before["score"],
        f"weight_bits_mean{name}": after["weight_bits_mean"],
        f"packed_bytes{name}": after["packed_bytes"],
        f"check_passed{name}": str(result["check"]["passed"]),
    }
