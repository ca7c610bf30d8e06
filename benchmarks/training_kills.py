"""`sft finetune` and `sft compress` killed at random moments, again and again, until they are done.

What is counted are kills of runs that ended in the files of a run that nobody disturbed.
"""

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import Found
from torch import nn
from torch.nn import functional

from sft.core.data import Batches, Data
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.models.inspect import inspect
from sft.models.load import load_model

SEED = 0
STEPS = 24  # of fine-tuning: some seconds
PATIENCE = 60  # starts, after which a job that does not end counts as one that never will
FINETUNE = (
    "finetune", "fashion-resnet", "--plan", "plan.json", "--steps", str(STEPS),
    "--save-every", "0.2", "-o", "tuned.safetensors",
)  # fmt: skip
COMPRESS = (
    "compress", "training_kills:small_net", "--data", "training_kills:gratings", "--size", "0.9",
    "--macs", "0.7", "--evaluate", "top1", "--steps", "60", "--integer-steps", "40",
    "--save-every", "0.1", "-o", "out",
)  # fmt: skip
FILES = {"finetune": ("tuned.safetensors",), "compress": ("out/model.onnx", "out/plan.json",
         "out/model.safetensors", "out/profile/profile.json")}  # fmt: skip


def measure_kills(kills: int) -> Found:
    """Kill the two commands `kills` times in all; how many of these left the result as it was."""
    with tempfile.TemporaryDirectory(prefix="sft-kills-") as name:
        folder = Path(name)
        plan_of_halves().save(folder / "plan.json")
        found = {"finetune": _job(folder, "finetune", FINETUNE, kills - kills // 2),
                 "compress": _job(folder, "compress", COMPRESS, kills // 2)}  # fmt: skip
    counted = {f"kills_{job}": made for job, (made, _) in found.items()}
    identical = {f"kills_identical_{job}": same for job, (_, same) in found.items()}
    return {
        "kills": sum(counted.values()),
        "kills_identical": sum(identical.values()),
        **counted,
        **identical,
    }


def _job(folder: Path, job: str, command: Sequence[str], kills: int) -> tuple[int, int]:
    """Kills of one command, and how many of them belong to runs that ended in the same files."""
    started = time.monotonic()
    assert _run(folder, command, None) == 0, f"{job} fails even if nobody disturbs it"
    whole = time.monotonic() - started
    wanted = _hashes(folder, job)
    moments = random.Random(SEED)
    made = same = 0
    while made < kills:
        _forget(folder, job)
        own = 0
        for _ in range(PATIENCE):
            within = whole * moments.uniform(0.1, 1.0) if made + own < kills else None
            if _run(folder, command, within) == 0:
                break
            own += 1
        same += own * (_hashes(folder, job) == wanted)
        made += own
    return made, same


def _run(folder: Path, command: Sequence[str], seconds: float | None) -> int:
    """The exit code of the command, which is killed (-9) after so many seconds."""
    own = {
        "PYTHONPATH": str(Path(__file__).parent),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "sft", *command, "--quiet"], cwd=folder, env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return process.returncode
    if process.returncode != 0:
        raise SystemExit(f"sft {command[0]} does not go on: {said.decode()[-500:]}")
    return 0


def _hashes(folder: Path, job: str) -> list[str]:
    """The sha256 of what the command leaves; empty for what is missing."""
    paths = [folder / name for name in FILES[job]]
    return [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths]


def _forget(folder: Path, job: str) -> None:
    for name in FILES[job]:
        (folder / name).unlink(missing_ok=True)


def plan_of_halves() -> Plan:
    """The embedded network with each wide 3x3 convolution split at half its rank."""
    model, nothing = load_model("fashion-resnet"), Cost(1, 1, 1)
    shape = (1, 28, 28)
    layers = inspect(model, torch.zeros(1, *shape), "fashion-resnet").layers
    rows = tuple(
        PlanRow(
            layer.name,
            Option("channel_in", (layer.weight_shape[1] // 2,), 8)
            if len(layer.weight_shape) == 4 and min(layer.weight_shape[:2]) >= 32
            and layer.weight_shape[2] > 1
            else Option("dense", (), 8),
            0.0, nothing, "half",
        )
        for layer in layers
    )  # fmt: skip
    return Plan(
        "fashion-resnet", "onnxruntime", {}, rows, nothing, nothing, "optimal", 0, 0, 0,
        input_shape=shape,
    )  # fmt: skip


class SmallNet(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        x = functional.adaptive_avg_pool2d(torch.relu(self.down(x)), 1).flatten(1)
        y: torch.Tensor = self.fc(x)
        return y


def gratings() -> Data:
    """Four splits of made images of four directions."""

    def split(count: int, seed: int, shuffle: bool = False) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        angle = labels.double() * torch.pi / 4
        rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
        along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
        noise = torch.randn(count, 12, 12, generator=generator)
        return Batches((torch.sin(along * 1.3) + 0.5 * noise).float()[:, None], labels, 32, shuffle)

    return Data(split(256, 0), split(512, 1, True), split(64, 2), split(64, 3), name="gratings")


def small_net() -> nn.Module:
    """A `SmallNet` trained for a few steps; the same weights at each call."""
    torch.manual_seed(SEED)
    net = SmallNet()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    train = gratings().train
    assert isinstance(train, Batches)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(net(train.inputs[:128]), train.targets[:128]).backward()  # type: ignore[index, no-untyped-call]
        optimizer.step()
    return net.eval()


if __name__ == "__main__":
    print(measure_kills(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
