"""Training and calibration over two processes against one; how cost grows.

python training_distributed.py          the figures
python training_distributed.py table    seconds by layers, width, samples and processes
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from figures import Found
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_kills import plan_of_halves

from sft.calibration.quantize import observe, set_ranges
from sft.calibration.rounding import How
from sft.core.data import Batches, Data, Loader
from sft.core.distributed import joined, rank, world
from sft.core.records import Plan
from sft.core.shards import Shard, shared_out
from sft.models.data import load_data
from sft.models.load import load_model
from sft.profiling.profile import profile
from sft.profiling.statistics import gather_statistics
from sft.quantizers import fake
from sft.quantizers.ranges import ranges
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm
from sft.surgery.quantize import prepare
from sft.training.finetune import finetune
from sft.training.loop import Idle

STEPS = 20
WARM = 3  # steps that are not timed
BATCH = 64  # samples a process
OBSERVED = 300  # samples that ranges are taken from
NETWORKS = ((4, 32), (8, 32), (16, 32), (8, 64), (8, 128))  # layers, channels
SAMPLES = (128, 256, 512)


def measure_distributed(quick: bool) -> Found:
    """What two processes of one thread each give and how fast, against one."""
    with tempfile.TemporaryDirectory(prefix="sft-distributed-") as name:
        folder = Path(name)
        found: Found = {}
        for dtype in ("float64",) if quick else ("float64", "float32"):
            _run(folder, 1, "train", dtype, "one")
            _run(folder, 2, "train", dtype, "two")
            found[f"ddp_max_difference_{dtype}"] = _difference(folder, "one", "two")
        if not quick:
            _run(folder, 1, "train-reversed", "float32", "two")
            found["float32_max_difference_of_reversed_batches"] = _difference(folder, "one", "two")
        for what in ("ranges",) if quick else ("ranges", "ranges-of-all"):
            _run(folder, 1, what, "float32", "one")
            _run(folder, 2, what, "float32", "two")
            one, two = (load_file(folder / f"{n}.safetensors") for n in ("one", "two"))
            name = f"observer_{what.replace('-', '_')}"
            found[name] = len(one)
            found[f"{name}_unequal"] = sum(not torch.equal(one[k], two[k]) for k in one)
        found["ddp_max_difference"] = found["ddp_max_difference_float64"]
        return found | _speed(folder, 2 if quick else 7)


def _speed(folder: Path, repeats: int) -> Found:
    """Samples a second of two processes over one, in turn; the start is not counted.

    By the clock, and by the processor's time of process 0: what two free cores would give.
    """
    rates: dict[int, list[float]] = {1: [], 2: []}
    free: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes, own in rates.items():
            _run(folder, processes, "speed", "float32", "rate")
            wall, busy = load_file(folder / "rate.safetensors")["seconds"].tolist()
            own.append(processes * BATCH / wall)
            free[processes].append(processes * BATCH / busy)
    one, two = (statistics.median(own) for own in rates.values())
    return {
        "samples_per_second_1": one,
        "samples_per_second_2": two,
        "ddp_speedup": two / one,
        "ddp_speedup_best": max(rates[2]) / max(rates[1]),
        "ddp_speedup_processor_time": statistics.median(free[2]) / statistics.median(free[1]),
    }


def _difference(folder: Path, first: str, second: str) -> float:
    """The greatest difference of any weight."""
    one, two = (load_file(folder / f"{n}.safetensors") for n in (first, second))
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def _run(folder: Path, processes: int, *what: str) -> None:
    """So many processes of this file, one thread each, that do `what` and leave a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *what], cwd=folder,
            env=os.environ | common | {"RANK": str(number), "LOCAL_RANK": str(number),
                                       "OMP_NUM_THREADS": "1"},
        )
        for number in range(processes)
    ]  # fmt: skip
    codes = [process.wait() for process in started]
    assert not any(codes), f"{what} over {processes} processes: exit codes {codes}"


def _worker(what: str, dtype: str, name: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    with joined("cpu"):
        made = {
            "train": _train,
            "train-reversed": _train_reversed,
            "ranges": _ranges,
            "ranges-of-all": _ranges_of_all,
            "speed": _time_steps,
        }[what](getattr(torch, dtype))
        if rank() == 0:
            save_file({k: v.contiguous() for k, v in made.items()}, f"{name}.safetensors")


def _networks(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Plan]:
    """The embedded network split at half its ranks, the whole one with its norms folded."""
    model, plan = load_model("fashion-resnet"), plan_of_halves()
    small = apply(model, plan).to(dtype)
    return small, fold_batch_norm(model, torch.zeros(1, 1, 28, 28)).to(dtype), plan


def _training_data(dtype: torch.dtype, batch: int) -> Batches:
    train = load_data("fashion-mnist").train
    assert isinstance(train, Batches)
    augment = train.transform
    assert augment is not None
    return Batches(
        train.inputs, train.targets, batch, shuffle=True, transform=lambda x: augment(x).to(dtype)
    )


class Reversed:
    """The same batches, their samples in the opposite order."""

    def __init__(self, loader: Batches) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return ((x.flip(0), y.flip(0)) for x, y in self.loader)


def _train(dtype: torch.dtype, loader: Loader | None = None) -> dict[str, Tensor]:
    small, teacher, _ = _networks(dtype)
    own = Shard(_training_data(dtype, BATCH), equal=True) if loader is None else loader
    return dict(finetune(small, own, teacher, steps=STEPS).state_dict())


def _train_reversed(dtype: torch.dtype) -> dict[str, Tensor]:
    return _train(dtype, Reversed(_training_data(dtype, BATCH)))


def _ranges_of_all(dtype: torch.dtype) -> dict[str, Tensor]:
    """The same where every value is counted, not only every so many of a batch."""
    fake.VALUES = 2**40
    return _ranges(dtype)


@torch.no_grad()
def _ranges(dtype: torch.dtype) -> dict[str, Tensor]:
    """The scale and the zero point of every activation."""
    small, _, plan = _networks(dtype)
    model = prepare(small, plan, find_target(plan.target))
    calibration = load_data("fashion-mnist").calibration
    assert isinstance(calibration, Batches)
    few = Batches(calibration.inputs[:OBSERVED], None, calibration.batch_size)
    how = How("nearest", refit=False)
    observe(model, torch.device("cpu"), shared_out(Data(few)).calibration, False, how, BATCH)
    set_ranges(model, ranges["mse"])
    return {
        name: torch.cat([x.double().flatten() for x in (a.scale, a.zero_point)])
        for name, a in model.activations().items()
    }


class Clock(Idle):
    """When each step ended, by the clock and by the processor's time."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def after_step(self, progress: float) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> Tensor:
        """``(steps, 2)`` of each step after the first `WARM`."""
        return torch.tensor(self.ends[WARM:], dtype=torch.float64).diff(dim=0)


def _time_steps(dtype: torch.dtype) -> dict[str, Tensor]:
    """The median times of a step with `BATCH` samples a process: clock, processor."""
    small, teacher, _ = _networks(dtype)
    clock = Clock()
    loader = Shard(_training_data(dtype, BATCH * world()), equal=True)
    finetune(small, loader, teacher, steps=STEPS, more=[clock])
    return {"seconds": clock.seconds().median(0).values}


def print_table() -> None:
    """Seconds of the statistics, of a profile, and of a training step of plain networks."""
    print("| layers | channels | parameters | samples | statistics s | profile s | step s |")
    print("|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for layers, channels in NETWORKS:
        print(_row(layers, channels, SAMPLES[0]), flush=True)
    for samples in SAMPLES[1:]:
        print(_row(*NETWORKS[1], samples), flush=True)


def _row(layers: int, channels: int, samples: int) -> str:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    net.eval()
    data = Data(Batches(torch.randn(samples, 3, 16, 16), None, 64))
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    gathered = _seconds(lambda: gather_statistics(net, names, data.calibration))
    profiled = _seconds(
        lambda: profile(net, data, "onnxruntime-avx2", schemes=["channel_in"], weight_bits=8,
                        anchor_samples=32)
    )  # fmt: skip
    clock = Clock()
    finetune(net, data.calibration, net, steps=8, more=[clock])
    step = clock.seconds()[:, 1].min()
    count = sum(p.numel() for p in net.parameters())
    figures = f"{gathered:.2f} | {profiled:.2f} | {float(step):.3f}"
    return f"| {layers} | {channels} | {count:,} | {samples} | {figures} |"


def _seconds(work: Any) -> float:
    """Seconds of the processor: others on the machine count less."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _worker(*sys.argv[1:])
    elif sys.argv[1:] == ["table"]:
        print_table()
    else:
        print(measure_distributed(quick="quick" in sys.argv))
