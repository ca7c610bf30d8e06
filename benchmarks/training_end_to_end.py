"""One training that finds ranks, weights and integers, beside two stages, at equal optimiser steps.

    python benchmarks/training_end_to_end.py            two budgets, three seeds, four ablations
    python benchmarks/training_end_to_end.py --quick    one budget, one seed, few steps

end to end   `sft.train`
two stages   profile, plan, apply, reconstruct, finetune, quantize, finetune

Both get one profile, one menu (4-bit weights, ranks on multiples of 4), the same budget, the same
steps in all with the same batches of 64, and a quarter of the steps with rounding in place. Every
setting was chosen on the validation images; the scores are those of the exported files on the
10,000 test images. The last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from end_to_end_network import load_small_resnet, small_data
from figures import Found, Wanted, print_rows, rows_of, write_rows

import sft
from sft.core.progress import say, show
from sft.profiling.store import load_profile, save_profile
from sft.runtimes.runner import Runner

BUDGETS = ((0.07, 0.4), (0.055, 0.25))  # size and MACs, of the float original
SEEDS = 3
STEPS, QUICK_STEPS, INTEGERS = 300, 40, 0.25
RATE, INTEGER_RATE = 2e-3, 1e-3
BITS, MULTIPLE = 4, 4
FULL, FULL_STEPS = (0.044, 0.33), 800
ABLATIONS = ("without_shrinking", "without_dual_ascent", "without_product_decay", "with_bit_ramp")
WANTED: Wanted = {"end_to_end_minus_two_stage_points": (">=", 0.0)}
TARGET = RUNTIME = "onnxruntime"


def measure_end_to_end(quick: bool) -> dict[str, float | int | str]:
    """Test accuracies in percent of both ways and of the ablations, and the differences."""
    model, data = load_small_resnet(), small_data()
    budgets, seeds = (BUDGETS[1:], 1) if quick else (BUDGETS, SEEDS)
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = sft.profile(
            model, data, TARGET, weight_bits=BITS, rank_multiple=MULTIPLE, latency=False
        )
        save_profile(measured, folder / "profile")
        original = sft.export(model, None, folder / "original.onnx", example=data.example())
        found: dict[str, float | int | str] = {
            "end_to_end_steps": steps,
            "end_to_end_images": 6000,
            "end_to_end_original_accuracy": score(original.path, data),
        }
        jobs = [
            {"way": way, "budget": budget, "seed": seed, "steps": steps}
            for budget in budgets
            for seed in range(seeds)
            for way in ("end_to_end", "two_stage")
        ]
        if not quick:
            jobs += [
                {"way": way, "budget": BUDGETS[1], "seed": seed, "steps": steps}
                for way in ABLATIONS
                for seed in range(seeds)
            ]
        with ThreadPoolExecutor(2) as pool:
            scores = list(pool.map(lambda job: _in_process(job, folder), jobs))
    return found | _table(jobs, scores)


def measure_full_task(folder: Path) -> Found:
    """Both ways once on the embedded network, with all its data and its target's own ranks."""
    model = sft.load_model("fashion-resnet")
    data = sft.load_data("fashion-mnist", "fashion-resnet")
    measured = sft.profile(model, data, TARGET, weight_bits=BITS, latency=False)
    found: Found = {"full_task_steps": FULL_STEPS}
    for way in ("two_stage", "end_to_end"):
        if way == "two_stage":
            trained, plan = two_stages(model, data, measured, sft.Budget(*FULL), 0, FULL_STEPS)
        else:
            result = sft.train(
                model, data, sft.Budget(*FULL), target=TARGET, weight_bits=BITS, seed=0,
                steps=FULL_STEPS, learning_rate=RATE, integer_learning_rate=INTEGER_RATE,
                measured=measured,
            )  # fmt: skip
            trained, plan = result.model, result.plan
        artifact = sft.export(trained, plan, folder / f"full-{way}.onnx", TARGET)
        found[f"full_task_{way}_accuracy"] = score(artifact.path, data)
        found[f"full_task_{way}_bytes"] = artifact.file_bytes
        say(f"full task, {way}: {found[f'full_task_{way}_accuracy']}")
    return found


def _table(jobs: list[dict[str, Any]], scores: list[Mapping[str, float]]) -> dict[str, float]:
    """Mean accuracy and least and greatest of each way at each budget, and the differences."""
    found: dict[str, float] = {}
    by_case: dict[tuple[str, tuple[float, float]], list[float]] = {}
    for job, score in zip(jobs, scores, strict=True):
        by_case.setdefault((job["way"], job["budget"]), []).append(score["accuracy"])
        key = f"{job['way']}_{job['budget'][0]:g}_{job['budget'][1]:g}"
        found[f"{key}_seed{job['seed']}_accuracy"] = score["accuracy"]
        found[f"{key}_seed{job['seed']}_bytes"] = score["bytes"]
    means = {case: sum(own) / len(own) for case, own in by_case.items()}
    differences = []
    for (way, budget), mean in means.items():
        found[f"{way}_{budget[0]:g}_{budget[1]:g}_accuracy"] = mean
        if way == "two_stage":
            differences.append(means["end_to_end", budget] - mean)
        elif way != "end_to_end":
            found[f"{way}_points"] = mean - means["end_to_end", budget]
    found["end_to_end_minus_two_stage_points"] = sum(differences) / len(differences)
    return found


def _in_process(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """One training in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--job", json.dumps(job), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"{job} {found}")
    return found


def _run(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train, export, and run the file on the test images; also the simulation on validation."""
    torch.set_num_threads(1)
    model, data = load_small_resnet(), small_data()
    budget, seed, steps = sft.Budget(*job["budget"]), job["seed"], job["steps"]
    measured = load_profile(folder / "profile")
    if job["way"] == "two_stage":
        trained, plan = two_stages(model, data, measured, budget, seed, steps)
    else:
        word, _, part = job["way"].partition("_")
        changed = {part: word == "with"} if word.startswith("with") else {}
        result = sft.train(
            model, data, budget, target=TARGET, weight_bits=BITS, rank_multiple=MULTIPLE,
            steps=steps, learning_rate=RATE, integer_learning_rate=INTEGER_RATE, seed=seed,
            measured=measured, **changed,
        )  # fmt: skip
        trained, plan = result.model, result.plan
    path = folder / f"{job['way']}-{job['budget'][0]}-{seed}.onnx"
    artifact = sft.export(trained, plan, path)
    validation = 100 * sft.top1(lambda x: trained(x).detach(), data.split("validation")[0])
    return {
        "accuracy": score(artifact.path, data),
        "validation": validation,
        "bytes": artifact.file_bytes,
        "macs": plan.cost.macs / plan.original.macs,
        "size": plan.cost.size / plan.original.size,
    }


def two_stages(
    model: torch.nn.Module,
    data: sft.Data,
    measured: sft.Profile,
    budget: sft.Budget,
    seed: int,
    steps: int,
) -> Any:
    """Decompose, then train in float, then quantise, then train in integers."""
    plan = sft.plan(measured, budget)
    small = sft.reconstruct(sft.apply(model, plan), model, data.calibration, seed=seed)
    integers, train = round(INTEGERS * steps), data.split("train")[0]
    small = sft.finetune(small, train, model, steps=steps - integers, learning_rate=RATE, seed=seed)
    rounded = sft.quantize(small, plan, TARGET, data.calibration, spare_sensitive=False, seed=seed)
    rounded = sft.finetune(
        rounded, train, model, steps=integers, learning_rate=INTEGER_RATE, seed=seed
    )
    return rounded, plan


def score(path: str, data: sft.Data) -> float:
    """Accuracy of a file on the test images, in percent."""
    with Runner(path, RUNTIME) as runner:
        return 100 * sft.top1(
            lambda x: torch.from_numpy(runner.run(x.numpy())), data.split("test")[0]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(_run(json.loads(options.job), options.folder)))
        return
    show(True)
    torch.set_num_threads(1)
    figures: Found = {k: v for k, v in measure_end_to_end(options.quick).items()}
    rows = rows_of(figures, WANTED)
    print_rows(rows)
    if not options.quick:
        print(f"written to {write_rows('training_end_to_end', rows, WANTED, 1)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
