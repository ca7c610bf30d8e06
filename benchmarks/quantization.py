"""Quantisation by figures: accuracy, size, speed and cost of the exported files, beside peers.

    python benchmarks/quantization.py                       everything; 30 to 40 minutes
    python benchmarks/quantization.py --quick               smaller samples; 8 minutes on 2 cores
    python benchmarks/quantization.py --only factors speed  these parts

speed      ResNet-18 and MobileNetV2 against the fastest layout of ONNX Runtime
cost       seconds and memory of quantising
accuracy   fashion-resnet at 8, 4 and 3 bits; a depthwise network at 8 bits and, trained, at 4
photos     EfficientNet-Lite0 with its ImageNet weights beside ONNX Runtime's and NNCF's files
factors    what rounding two factors to 4 and 3 bits adds to the error

Every score and time is of an exported file in its runtime, on one thread; activations have 8 bits.
Calibration sees training images without labels. Test data is touched only to score. A full run
writes `benchmarks/results/quantization-<machine>.csv`, one of some parts the rows of these in it;
the last line printed is one JSON object. Run it on an idle machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import quantization_accuracy
import quantization_cost
import quantization_factors
import quantization_photos
import quantization_speed
import torch
from figures import Wanted, print_rows, rows_of, write_rows
from quantization_files import Found, Settings

from sft.core.progress import say, show

THREADS, QAT_STEPS = 2, 600
PARTS: dict[str, Callable[[Settings], Found]] = {
    "speed": quantization_speed.measure,
    "cost": quantization_cost.measure,
    "accuracy": quantization_accuracy.measure,
    "photos": quantization_photos.measure,
    "factors": quantization_factors.measure,
}
WANTED: Wanted = {
    "fashion_w8a8_drop": ("<=", 0.1),
    "fashion_w4a8_drop": ("<=", 0.3),
    "fashion_w3a8_drop": ("<=", 1.0),
    "w4_over_w8_bytes": ("<=", 0.52),  # half, and what both files have besides weights
    "w4_over_w8_speed": (">=", 0.95),
    "depthwise_w8a8_drop": ("<=", 0.2),
    "depthwise_qat_w4a8_drop": ("<=", 0.3),
    "efflite0_agreement": (">=", "efflite0_best_peer_agreement"),
    "efflite0_best_peer_agreement": ("", ""),
    "efflite0_sqnr_db": (">=", "efflite0_best_peer_sqnr_db"),
    "efflite0_sqnr_loss_db": ("<=", 1.5),
    "efflite0_avx2_sqnr_loss_db": ("<=", 1.5),
    "factor_excess_cut_4bit": (">=", 0.3),
    "factor_excess_cut_3bit": (">=", 0.3),
    "speed_vs_ort_resnet18": (">=", 0.97),
    "speed_vs_ort_mobilenetv2": (">=", 0.97),
    "ptq_and_export_seconds_resnet18": ("<=", "ptq_seconds_resnet18_slower_peer"),
}
UNPRINTED = {  # figures beside those of the last line
    "efflite0_sqnr_db",
    "efflite0_avx2_sqnr_loss_db",
    "ptq_and_export_seconds_resnet18",
}


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    show(True)
    found: Found = {}
    names = [name for name in PARTS if name in (options.only or PARTS)]
    with tempfile.TemporaryDirectory(prefix="quantization-") as folder:
        settings = Settings(options.quick, Path(folder), options.threads, options.qat_steps)
        for name in names:
            started = time.monotonic()
            found |= PARTS[name](settings)
            found[f"{name}_part_seconds"] = time.monotonic() - started
            say(f"part {name}: {found[f'{name}_part_seconds']:.0f} s")
    rows = rows_of(found, WANTED)
    print_rows(rows)
    if not options.quick:
        print(f"written to {write_rows('quantization', rows, WANTED, options.threads)}")
    printed = [name for name in WANTED if name in found and name not in UNPRINTED]
    print(json.dumps({name: round(float(found[name]), 4) for name in printed}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller samples; no file is written")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=THREADS, help="where nothing is timed")
    parser.add_argument("--qat-steps", type=int, default=QAT_STEPS, help="in a full run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
