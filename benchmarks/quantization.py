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
import csv
import json
import re
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
from quantization_files import Found, Settings

from sft.core.progress import say, show
from sft.runtimes.targets import machine

RESULTS = Path(__file__).parent / "results"
THREADS, QAT_STEPS = 2, 600
PARTS: dict[str, Callable[[Settings], Found]] = {
    "speed": quantization_speed.measure,
    "cost": quantization_cost.measure,
    "accuracy": quantization_accuracy.measure,
    "photos": quantization_photos.measure,
    "factors": quantization_factors.measure,
}
WANTED: dict[str, tuple[str, float | str]] = {  # a name stands for the figure of that name
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

Row = tuple[str, str, str, str, str]  # figure, measured, sense, wanted, verdict


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
    rows = _rows(found)
    for figure, measured, sense, wanted, verdict in rows:
        print(f"{figure:44} {measured:>12}  {sense and f'wanted {sense} {wanted}  {verdict}'}")
    if not options.quick:
        print(f"written to {_write(rows, options.threads)}")
    printed = [name for name in WANTED if name in found and name not in UNPRINTED]
    print(json.dumps({name: round(float(found[name]), 4) for name in printed}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller samples; no file is written")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=THREADS, help="where nothing is timed")
    parser.add_argument("--qat-steps", type=int, default=QAT_STEPS, help="in a full run")
    return parser.parse_args()


def _rows(found: Found) -> list[Row]:
    """The figures with what is wanted of them, then everything else that was found."""
    rows = []
    for name, (sense, bound) in WANTED.items():
        if name in found:
            wanted = found.get(bound, "") if isinstance(bound, str) else bound
            verdict = _verdict(float(found[name]), sense, float(wanted)) if sense else ""
            rows.append((name, _shown(found[name]), sense, _shown(wanted), verdict))
    rest = ((name, value) for name, value in found.items() if name not in WANTED)
    return rows + [(name, _shown(value), "", "", "") for name, value in rest]


def _verdict(measured: float, sense: str, wanted: float) -> str:
    met = measured >= wanted if sense == ">=" else measured <= wanted
    return "met" if met else "MISSED"


def _shown(value: float | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(rows: list[Row], threads: int) -> Path:
    here = machine()
    named = f"{here['processor']}, {here['instruction_set']}, {here['logical_cores']} cores"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"quantization-{re.sub(r'[^A-Za-z0-9]+', '-', named).strip('-').lower()}.csv"
    versions = " ".join(f"{name}={version}" for name, version in here["versions"].items())
    facts = {"machine": named, "threads": str(threads), "versions": versions}
    new = {row[0]: row for row in rows} | {k: (k, v, "", "", "") for k, v in facts.items()}
    old: dict[str, Row] = {}
    if path.exists():
        with path.open(newline="") as stream:
            old = {row[0]: (*row,) for row in list(csv.reader(stream))[1:]}  # type: ignore[misc]
    order = [*WANTED, *(name for name in {**old, **new} if name not in WANTED)]
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["figure", "measured", "sense", "wanted", "verdict"])
        table.writerows(new.get(name) or old[name] for name in order if name in new or name in old)
    return path


if __name__ == "__main__":
    main()
