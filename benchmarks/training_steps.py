"""What a step of training costs: the split network with 4-bit rounding, beside dense fp32.

Both learn from the same teacher with the same batches; the dense one is the original with its batch
norm folded. Trainings of a few steps in turn, medians of the steps' times.
"""

import dataclasses
import statistics

import torch
from figures import Found
from training_distributed import BATCH, Clock
from training_kills import plan_of_halves

import sft
from sft.surgery.modules import fold_batch_norm

STEPS, ROUNDS, QUICK_ROUNDS = 15, 6, 3


def measure_steps(quick: bool) -> Found:
    """Milliseconds of a step of each, and their ratio."""
    model, plan = sft.load_model("fashion-resnet"), plan_of_halves()
    for row in plan.rows:
        plan = plan.replace(row.name, dataclasses.replace(row.option, weight_bits=4))
    data = sft.load_data("fashion-mnist", "fashion-resnet")
    dense = fold_batch_norm(model, data.example())
    rounded = sft.quantize(
        sft.apply(model, plan), plan, plan.target, data.calibration, rounding="nearest", refit=False
    )
    train = sft.Batches(data.train.inputs[:4096], None, BATCH, shuffle=True)  # type: ignore[union-attr]
    networks = {"dense_step_ms": dense, "rounded_step_ms": rounded}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for name, network in networks.items():
            clock = Clock()
            sft.finetune(network, train, model, steps=STEPS, more=[clock])
            times[name] += (1000 * clock.seconds()[:, 0]).tolist()
    found: Found = {name: statistics.median(own) for name, own in times.items()}
    ratio = float(found["rounded_step_ms"]) / float(found["dense_step_ms"])
    return found | {"step_time_ratio": ratio, "step_threads": torch.get_num_threads()}
