"""What gathering statistics costs: time against the forward passes alone, and memory.

    python benchmarks/calibration.py            256 images; 100, 1,000 and 10,000 samples
    python benchmarks/calibration.py --quick    16 images; 100 and 2,000 samples; writes no file

1. Peak memory of gathering the statistics of a small network on more and more samples, each count
   in a process of its own that returns freed memory at once: the ratio of the last to the first.
2. ResNet-50 at 224 x 224 with random weights: the statistics of all its layers, without and
   with gradients, against the forward passes alone. The three run in turn, the times are medians,
   and each one's peak memory is counted above the loaded model with its data.

Batch norm is folded first, as the pipeline does it. Two threads. Writes
`benchmarks/results/calibration-<machine>.csv`; the last line printed is one JSON
object. Only the ratios carry over to other machines. Run it on an idle machine.
"""

import argparse
import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.profiling.statistics import gather_statistics
from sft.runtimes.targets import machine
from sft.surgery.modules import fold_batch_norm

RESULTS = Path(__file__).parent / "results"
THREADS = 2
WANTED = {
    "memory_ratio_10000_to_100": 1.05,
    "statistics_time_ratio": 2.5,
    "two_sided_time_ratio": 6.0,
    "statistics_memory_gib": 2.0,
}


def main() -> None:
    options = _parse()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](int(options.child[1]))))
        return
    few, many, images = (100, (2000,), 16) if options.quick else (100, (1000, 10000), 256)
    details: dict[str, Any] = {}
    for samples in (few, *many):
        details[f"small_peak_mib_{samples}"] = _child("small", samples)["peak_mib"]
    for kind in ("forward", "statistics", "two_sided"):
        details[f"{kind}_memory_gib"] = _child(kind, min(images, 32))["gib"]
    details.update(_child("times", images))
    figures = {
        "memory_ratio_10000_to_100": details[f"small_peak_mib_{many[-1]}"]
        / details[f"small_peak_mib_{few}"],
        "statistics_time_ratio": details["statistics_s"] / details["forward_s"],
        "two_sided_time_ratio": details["two_sided_s"] / details["forward_s"],
        "statistics_memory_gib": details["statistics_memory_gib"],
    }
    if not options.quick:
        print(f"written to {_write(figures, details)}")
    for name, measured in figures.items():
        print(f"{name:28} {measured:8.3f}  wanted <= {WANTED[name]:<6} {_verdict(name, measured)}")
    print(json.dumps({name: round(measured, 4) for name, measured in figures.items()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images; no file is written")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(kind: str, count: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    settings = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    if kind == "small":  # otherwise glibc keeps a varying amount of what was freed
        settings["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--child", kind, str(count)]
    done = subprocess.run(
        command, env={**os.environ, **settings}, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {kind} {count}: {found}", file=sys.stderr, flush=True)
    return found


def measure_small(samples: int) -> dict[str, float]:
    """Peak memory of a whole process that gathers a small network's statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    batches = _Drawn(samples, 50, (3, 16, 16))
    gather_statistics(model, ["0", "2", "4", "7"], batches, gradients=True)
    return {"peak_mib": _peak() / 2**20}


def measure_memory(kind: str, images: int) -> dict[str, float]:
    """How far the process grows above the loaded network and its data."""
    model, batches = resnet50(), list(_Drawn(images, 16, (3, 224, 224)))
    names = _layers(model)
    before = _resident()
    RUNS[kind](model, names, batches)
    return {"gib": (_peak() - before) / 2**30}


def measure_times(images: int) -> dict[str, float]:
    """Medians of the seconds for a share of the images, the kinds of run in turn."""
    model = resnet50()
    names = _layers(model)
    rounds = 4 if images > 64 else 2
    share = max(images // rounds, 8)
    batches = list(_Drawn(share, min(share, 16), (3, 224, 224)))
    RUNS["forward"](model, names, batches[:1])
    seconds: dict[str, list[float]] = {kind: [] for kind in RUNS}
    for _ in range(rounds):
        for kind, run in RUNS.items():
            started = time.perf_counter()
            run(model, names, batches)
            seconds[kind].append(time.perf_counter() - started)
    return {f"{kind}_s": statistics.median(own) for kind, own in seconds.items()}


class _Drawn:
    """Random batches, each made when it is asked for; only one is ever held."""

    def __init__(self, samples: int, batch: int, shape: tuple[int, ...]) -> None:
        self.samples, self.batch, self.shape = samples, batch, shape

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.samples, self.batch):
            count = min(self.batch, self.samples - start)
            yield torch.randn(count, *self.shape, generator=generator)


def _forward(model: nn.Module, _: list[str], batches: list[Tensor]) -> None:
    with torch.no_grad():
        for x in batches:
            model(x)


def _gather(model: nn.Module, names: list[str], batches: list[Tensor]) -> None:
    gather_statistics(model, names, batches)


def _two_sided(model: nn.Module, names: list[str], batches: list[Tensor]) -> None:
    gather_statistics(model, names, batches, gradients=True)


RUNS: dict[str, Callable[[nn.Module, list[str], list[Tensor]], None]] = {
    "forward": _forward,
    "statistics": _gather,
    "two_sided": _two_sided,
}
CHILDREN: dict[str, Callable[[int], dict[str, float]]] = {
    "small": measure_small,
    "times": measure_times,
    **{kind: lambda images, kind=kind: measure_memory(kind, images) for kind in RUNS},
}


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights that keep the size of activations, batch norm folded."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    blocks: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    model = nn.Sequential(*blocks, *head).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, Bottleneck):
            module.conv3.weight.data *= 0.3
    return fold_batch_norm(model, torch.zeros(1, 3, 224, 224))


def _layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _peak() -> int:
    """Bytes of memory this process held at most (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _resident() -> int:
    """Bytes of memory this process holds now; where that is unknown, its peak so far."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return _peak()
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _verdict(name: str, measured: float) -> str:
    return "met" if measured <= WANTED[name] else "MISSED"


def _write(figures: dict[str, float], details: dict[str, Any]) -> Path:
    here = machine()
    named = f"{here['processor']}, {here['instruction_set']}, {here['logical_cores']} cores"
    RESULTS.mkdir(parents=True, exist_ok=True)
    short = re.sub(r"[^A-Za-z0-9]+", "-", named).strip("-").lower()
    path = RESULTS / f"calibration-{short}.csv"
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["figure", "measured", "sense", "wanted", "verdict"])
        for name, measured in figures.items():
            table.writerow([name, f"{measured:.4f}", "<=", WANTED[name], _verdict(name, measured)])
        for key, value in details.items():
            table.writerow([key, f"{value:.4f}", "", "", ""])
        for key, value in {
            "machine": named,
            "threads": THREADS,
            "torch": torch.__version__,
        }.items():
            table.writerow([key, value, "", "", ""])
    return path


if __name__ == "__main__":
    main()
