"""Training by figures: how small, in one stage or two, over processes, and through interruptions.

    python benchmarks/training.py                     everything; three hours on 2 cores
    python benchmarks/training.py --quick             10 minutes on 2 cores
    python benchmarks/training.py --only steps kills  these parts

headline     the embedded network within half a point (quick: read, not run)
zero_drop    the same without any loss (quick: read, not run)
end_to_end   `sft.train` beside two stages, and its ablations, on a reduced task
full_task    both ways once on the embedded network and all its data (quick: left out)
depthwise    the depthwise network in 4 bits after training with rounding in place
steps        the time of such a step beside one of dense fp32
distributed  two processes against one: weights, ranges, samples a second
kills        runs that are killed at random points and repeated: do they end in the same files?

Every accuracy is that of an exported file on the 10,000 test images; every choice was made on the
validation split. A full run writes `benchmarks/results/training-<machine>.csv`; the last line
printed is one JSON object. Run it on an idle machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Found, Wanted, print_rows, rows_of, write_rows
from quantization_accuracy import measure_depthwise
from quantization_files import Settings
from training_distributed import measure_distributed
from training_end_to_end import measure_end_to_end, measure_full_task
from training_headline import measure_headline, measure_zero_drop, read_headline
from training_kills import measure_kills
from training_steps import measure_steps

from sft.core.progress import say, show

KILLS, QUICK_KILLS, QAT_STEPS = 20, 4, 240
LEFT_OUT = ("zero_drop", "full_task")  # of a quick run
WANTED: Wanted = {
    "size_ratio": (">=", 20.0),
    "onnx_ratio": (">=", 12.0),
    "macs_ratio": (">=", 3.0),
    "latency_ratio": (">=", 3.0),
    "drop_points": ("<=", 0.5),
    "headline_minutes": ("<=", 90.0),
    "end_to_end_minus_two_stage_points": (">=", 0.0),
    "depthwise_qat_drop": ("<=", 0.3),
    "step_time_ratio": ("<=", 1.5),
    "ddp_max_difference": ("<=", 1e-5),
    "observer_ranges_unequal": ("<=", 0),
    "ddp_speedup": (">=", 1.7),
    "kills": (">=", 20),
    "kills_identical": (">=", "kills"),
}
PRINTED = (
    "size_ratio", "macs_ratio", "drop_points", "size_ratio_at_zero_drop",
    "end_to_end_minus_two_stage_points", "depthwise_qat_drop", "step_time_ratio",
    "ddp_max_difference", "ddp_speedup", "kills", "kills_identical",
)  # fmt: skip


def headline(quick: bool, folder: Path) -> Found:
    return read_headline() if quick else measure_headline(folder)


def zero_drop(_: bool, folder: Path) -> Found:
    return measure_zero_drop(folder)


def end_to_end(quick: bool, _: Path) -> Found:
    return dict(measure_end_to_end(quick))


def full_task(_: bool, folder: Path) -> Found:
    return dict(measure_full_task(folder))


def depthwise(quick: bool, folder: Path) -> Found:
    found = measure_depthwise(Settings(quick, folder, torch.get_num_threads(), QAT_STEPS))
    return found | {"depthwise_qat_drop": found["depthwise_qat_w4a8_drop"]}


def steps(quick: bool, _: Path) -> Found:
    return measure_steps(quick)


def distributed(quick: bool, _: Path) -> Found:
    return measure_distributed(quick)


def kills(quick: bool, _: Path) -> Found:
    return dict(measure_kills(QUICK_KILLS if quick else KILLS))


PARTS: dict[str, Callable[[bool, Path], Found]] = {
    "headline": headline,
    "zero_drop": zero_drop,
    "end_to_end": end_to_end,
    "full_task": full_task,
    "depthwise": depthwise,
    "steps": steps,
    "distributed": distributed,
    "kills": kills,
}


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    show(True)
    found: Found = {}
    names = [n for n in PARTS if n in (options.only or PARTS)]
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        for name in names:
            if options.quick and name in LEFT_OUT:
                continue
            started = time.monotonic()
            found |= PARTS[name](options.quick, options.out or Path(folder))
            found[f"{name}_part_seconds"] = time.monotonic() - started
            say(f"part {name}: {found[f'{name}_part_seconds']:.0f} s")
            if not options.quick:
                write_rows("training", rows_of(found, WANTED), WANTED, options.threads)
    print_rows(rows_of(found, WANTED))
    print(json.dumps({n: float(f"{float(found[n]):.6g}") for n in PRINTED if n in found}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller; no file is written")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART")
    parser.add_argument(
        "--out",
        type=Path,
        help="keep the files of headline and zero_drop there, and read those that are there",
    )
    parser.add_argument("--threads", type=int, default=2, help="where nothing is timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
