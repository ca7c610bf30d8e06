"""Two processes, each with half the data, against one that has all of it."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.calibration.samples import Reservoir
from sft.core.data import Batches
from sft.core.distributed import (
    all_reduce_mean_,
    broadcast_,
    gather_tensors,
    is_distributed,
    rank,
    world,
)
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.models.inspect import inspect
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel
from sft.training.finetune import finetune

PROCESS = """
import sys
from pathlib import Path
import torch
from sft.calibration.quantize import quantize
from sft.core import distributed
from sft.core.data import Batches
from sft.core.errors import InputError
from sft.training.finetune import finetune

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
small, plan, x = torch.load(f"{folder}/task", weights_only=False)
found = {"numbers": (distributed.is_distributed(), distributed.rank(), distributed.world())}
one, two = torch.tensor([1.0 + rank, 5.0]), torch.full((2, 2), 4.0 * rank, dtype=torch.float64)
distributed.all_reduce_mean_([one, two])
found["means"] = (one, two)
kept = [torch.full((2, 3), float(rank)).T, torch.tensor(7 + rank)]
distributed.broadcast_(kept)
found["broadcast"] = kept
found["gathered"] = distributed.gather_tensors(torch.full((1 + 2 * rank, 2), float(rank)))
half = x[rank * len(x) // 2 :][: len(x) // 2]
rounded = quantize(small, plan, plan.target, Batches(half, None, 16))
found["rounded"] = rounded.state_dict()
tuned = finetune(rounded, Batches(half, None, 16), small, steps=4, learning_rate=1e-2,
                 checkpoint=Path(folder) / "state")
found["tuned"] = tuned.state_dict()
try:
    quantize(small, plan, plan.target, Batches(half, None, 16) if rank else [])
except InputError as error:
    found["error"] = str(error)
torch.save(found, f"{folder}/{rank}")
torch.distributed.destroy_process_group()
"""


def run_processes(folder: Path) -> None:
    """Run both to their ends; if one fails, the other is ended too."""
    command = [sys.executable, "-c", PROCESS]
    logs = [folder / f"{r}.log" for r in range(2)]
    with contextlib.ExitStack() as stack:
        started = []
        for number, log in enumerate(logs):
            out = stack.enter_context(log.open("w"))
            process = subprocess.Popen([*command, str(number), str(folder)], stderr=out)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        limit = time.monotonic() + 120
        while time.monotonic() < limit and any(p.poll() is None for p in started):
            if any(p.poll() for p in started):
                break
            time.sleep(0.05)
        codes = [p.poll() for p in started]
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> tuple[nn.Module, Plan, torch.Tensor, Path]:
    """The network, its plan, the data, and the folder in which both processes left their finds."""
    folder = tmp_path_factory.mktemp("processes")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(128, 4)).eval()
    x = torch.randn(64, 1, 8, 8, generator=generator)
    x[32:] *= 3  # what one process sees is unlike what the other sees
    nothing = Cost(1, 1, 1)
    rows = tuple(
        PlanRow(layer.name, Option("dense", (), 4), 0.0, nothing, "test")
        for layer in inspect(model, x[:1], "m").layers
    )
    plan = Plan(
        "m", "onnxruntime", {}, rows, nothing, nothing, "optimal", 0, 0, 0, input_shape=(1, 8, 8)
    )
    small = apply(model, plan)
    torch.save((small, plan, x), folder / "task")
    run_processes(folder)
    return small, plan, x, folder


@pytest.fixture(scope="module")
def finds(task) -> list[dict]:
    return [torch.load(task[3] / str(r), weights_only=False) for r in range(2)]


@pytest.fixture(scope="module")
def alone(task) -> QuantizedModel:
    small, plan, x, _ = task
    return quantize(small, plan, plan.target, Batches(x, None, 16))


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_tensors_travel(finds) -> None:
    for number, found in enumerate(finds):
        assert found["numbers"] == (True, number, 2)
        one, two = found["means"]
        assert one.tolist() == [1.5, 5.0]
        assert torch.equal(two, torch.full((2, 2), 2.0, dtype=torch.float64))
        assert torch.equal(found["broadcast"][0], torch.zeros(3, 2))
        assert int(found["broadcast"][1]) == 7
        shorter, longer = found["gathered"]
        assert torch.equal(shorter, torch.zeros(1, 2))
        assert torch.equal(longer, torch.ones(3, 2))


def test_all_processes_have_the_network_of_one_that_saw_everything(task, finds, alone) -> None:
    assert_equal(finds[0]["rounded"], finds[1]["rounded"])
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(finds[0]["rounded"][key], value, rtol=1e-6, atol=1e-7)
    small, plan, x, _ = task
    half = quantize(small, plan, plan.target, Batches(x[:32], None, 16))
    assert any(
        not torch.allclose(value, finds[0]["rounded"][key], rtol=1e-2)
        for key, value in half.state_dict().items()
        if "scale" in key
    )


def test_training_goes_along_the_mean_gradient(task, finds, alone) -> None:
    assert_equal(finds[0]["tuned"], finds[1]["tuned"])
    small, _, x, _ = task
    pairs = [torch.cat([x[i : i + 16], x[32 + i : 48 + i]]) for i in (0, 16)]
    tuned = finetune(alone, pairs, small, steps=4, learning_rate=1e-2)
    differences = [
        float((value - finds[0]["tuned"][key]).norm() / value.norm().clamp_min(1e-6))
        for key, value in tuned.state_dict().items()
        if "weight" in key
    ]
    moved = [
        float((value - alone.state_dict()[key]).norm() / value.norm().clamp_min(1e-6))
        for key, value in tuned.state_dict().items()
        if "weight" in key
    ]
    assert max(differences) < 0.2 * min(moved)


def test_a_process_without_data_stops_all(finds) -> None:
    assert all("in every process" in found["error"] for found in finds)


def test_one_process_does_nothing() -> None:
    assert (is_distributed(), rank(), world()) == (False, 0, 1)
    x = torch.arange(3.0)
    all_reduce_mean_([x])
    broadcast_([x])
    (copied,) = gather_tensors(x)
    assert x.tolist() == copied.tolist() == [0, 1, 2]
    assert copied.data_ptr() != x.data_ptr()
    kept = Reservoir(2)
    kept.add(x[:, None])
    before = kept.batches()
    kept.share()
    assert all(torch.equal(a, b) for a, b in zip(before, kept.batches(), strict=True))
