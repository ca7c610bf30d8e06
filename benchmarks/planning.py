"""Planning by figures: is the solver exact and quick, do predictions hold, does joint choice pay?

    python benchmarks/planning.py                     everything; about an hour and a half
    python benchmarks/planning.py --quick             one network, 16 plans; 7 minutes on 2 cores
    python benchmarks/planning.py --only solver joint these parts

solver     the knapsack against all choices of 500 small instances, and its time on large ones
replan     a new budget from a saved profile of ResNet-50, as a whole process
profile    seconds of profiling fashion-resnet, without and with remembered latencies
predicted  bytes, MACs, latency and damage of random plans of nearly one size, and what they are
joint      rank and bits chosen together beside three ways to choose them apart, at equal costs
thin       layers kept whole because low rank gains no time: is it said, and is it true?
resnet50   the profile of ResNet-50 at 224 with 128 images, which `replan` reads

Every damage and latency is of an exported file, on images that nothing was calibrated on; nothing
is trained. A full run writes `benchmarks/results/planning-<machine>.csv`; the last line printed is
one JSON object. Run it on an idle machine.
"""

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Found, Wanted, print_rows, read_rows, rows_of, write_rows
from planning_cases import CASES, TARGET
from planning_joint import RIVALS, measure_joint
from planning_predicted import measure_predictions
from planning_solver import measure_replanning, measure_solver
from planning_thin import measure_thin
from speed_networks import make_noise, make_resnet50

import sft
from sft.core.progress import say, show
from sft.profiling.store import STATISTICS_FILE, save_profile

THREADS = 2
STORED_PROFILE = Path(__file__).parent / "networks" / "resnet50_profile.json.gz"
SCRIPT = """
import sft, torch, sys, time
torch.set_num_threads(int(sys.argv[1]))
model = sft.load_model("fashion-resnet")
data = sft.load_data("fashion-mnist", "fashion-resnet")
started = time.monotonic()
sft.profile(model, data, "onnxruntime", name="fashion-resnet")
print(time.monotonic() - started)
"""
WANTED: Wanted = {
    "knapsack_wrong": ("<=", 0),
    "milp_seconds": ("<=", 1.0),
    "replan_seconds": ("<=", 2.0),
    "latency_error_median": ("<=", 0.1),
    "latency_error_worst": ("<=", 0.2),
    "damage_spearman": (">=", 0.85),
    "joint_gain_vs_uniform": (">=", 0.3),
    "joint_gain_vs_greedy_energy": (">=", 0.3),
    "joint_gain_vs_rank_then_bits": (">=", 0.3),
    "profile_seconds_cold": ("<=", 180.0),
    "profile_seconds_warm": ("<=", 60.0),
    "plans_with_wrong_bytes": ("<=", 0),
    "plans_with_wrong_macs": ("<=", 0),
    "resnet50_profile_seconds": ("<=", 1200.0),
    "thin_layers_kept": (">=", 1),
    "thin_layers_kept_with_reason": (">=", "thin_layers_kept"),
    "thin_claims_measured_true": (">=", "thin_layers_kept"),
}
PRINTED = [name for name in WANTED if "wrong" not in name and "resnet50" not in name]


class Run:
    """What the parts share: settings, and the networks, which are profiled once."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.quick, self.threads, self.folder = options.quick, options.threads, folder
        names = options.networks or (["fashion-resnet"] if self.quick else list(CASES))
        self.plans = 16 if self.quick else 30  # the ranks of ten say little
        made = [CASES[name](folder) for name in names]
        self.cases = [dataclasses.replace(case, begun=options.resume) for case in made]


def solver(run: Run) -> Found:
    return measure_solver(2 if run.quick else 5)


def replan(run: Run) -> Found:
    """On the stored profile of ResNet-50, without its statistics, which planning never reads."""
    folder = run.folder / "resnet50"
    folder.mkdir(exist_ok=True)
    (folder / "profile.json").write_bytes(gzip.decompress(STORED_PROFILE.read_bytes()))
    (folder / STATISTICS_FILE).touch()
    return measure_replanning(folder, run.folder / "plan.json")


def profile(run: Run) -> Found:
    """In fresh processes: once without remembered latencies, then with them."""
    seconds = []
    for _ in range(2):
        environment = {**os.environ, "XDG_CACHE_HOME": str(run.folder / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(run.threads)],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        seconds.append(float(done.stdout.splitlines()[-1]))
    return {"profile_seconds_cold": seconds[0], "profile_seconds_warm": seconds[1]}


def predicted(run: Run) -> Found:
    """The worst of both networks, the figures of earlier full runs included."""
    found: Found = {}
    for case in run.cases:
        found |= measure_predictions(case, run.plans)
    known = _known(run, found)
    for figure, worst in (
        ("latency_error_median", max),
        ("latency_error_worst", max),
        ("damage_spearman", min),
        ("plans_with_wrong_bytes", sum),
        ("plans_with_wrong_macs", sum),
    ):
        own = (known.get(f"{name}_{figure}") for name in CASES)
        found[figure] = worst(float(value) for value in own if value is not None)
    return found


def joint(run: Run) -> Found:
    """The gains are medians over all budgets and networks, those of earlier full runs included."""
    found: Found = {}
    for case in run.cases:
        found |= measure_joint(case, 1 if run.quick else 3)
    known = _known(run, found)
    for way in RIVALS:
        gains = [float(v) for k, v in known.items() if k.endswith(f"_gain_vs_{way}")]
        if gains:
            found[f"joint_gain_vs_{way}"] = statistics.median(gains)
            found[f"joint_gain_vs_{way}_least"] = min(gains)
    return found


def _known(run: Run, found: Found) -> Found:
    """What was found, and what the file of this machine holds of the networks that did not run."""
    others = set(CASES) - {case.name for case in run.cases}
    stored = {} if run.quick else read_rows("planning")
    return {k: v for k, v in stored.items() if k.startswith(tuple(others))} | found


def thin(run: Run) -> Found:
    return measure_thin(run.folder)


def resnet50(run: Run) -> Found:
    """Stores the profile too, without its statistics."""
    model, images = make_resnet50(), make_noise(128)
    data = sft.Data(calibration=sft.Batches(images, batch_size=16))
    started = time.monotonic()
    table = run.folder / "resnet50-latency.json"
    measured = sft.profile(model, data, TARGET, name="resnet50", latency_table=table)
    seconds = time.monotonic() - started
    save_profile(measured, run.folder / "resnet50-measured")
    content = (run.folder / "resnet50-measured" / "profile.json").read_bytes()
    STORED_PROFILE.write_bytes(gzip.compress(content, mtime=0))
    return {"resnet50_profile_seconds": seconds}


PARTS: dict[str, Callable[[Run], Found]] = {
    "resnet50": resnet50,
    "solver": solver,
    "replan": replan,
    "profile": profile,
    "predicted": predicted,
    "joint": joint,
    "thin": thin,
}


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    show(True)
    found: Found = {}
    names = [
        n for n in PARTS if n in (options.only or PARTS) and not (options.quick and n == "resnet50")
    ]
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        run = Run(options, options.resume or Path(folder))
        for name in names:
            started = time.monotonic()
            found |= PARTS[name](run)
            found[f"{name}_part_seconds"] = time.monotonic() - started
            say(f"part {name}: {found[f'{name}_part_seconds']:.0f} s")
            if not options.quick:
                write_rows("planning", rows_of(found, WANTED), WANTED, options.threads)
    print_rows(rows_of(found, WANTED))
    print(json.dumps({n: round(float(found[n]), 4) for n in PRINTED if n in found}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller; no file is written")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART")
    parser.add_argument("--networks", nargs="+", choices=tuple(CASES), metavar="NETWORK")
    parser.add_argument(
        "--resume", type=Path, help="keep profiles and files there, and go on with what is there"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help="where nothing is timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
