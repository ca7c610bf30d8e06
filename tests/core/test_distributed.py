"""Two processes under torchrun's environment against one; what they do when one is killed."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sft.cli import main
from sft.core.data import Batches
from sft.core.errors import InputError
from sft.decompositions import factorize
from sft.profiling.store import load_profile
from sft.training.finetune import finetune
from sft.training.loop import run_steps

TESTS = Path(__file__).parents[1]
MODULE = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from conftest import SmallNet, made_data

def model():
    return SmallNet().eval()

def data():
    return made_data()

def deadly():
    found = made_data()
    read = []
    def kill(x):
        read.append(1)
        if len(read) == 12 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return x
    found.train.transform = kill
    return found
"""
SHARED = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sft.cli import main
from sft.core import distributed as d
from sft.core.errors import InputError
from sft.core.shards import Shard
from sft.training.finetune import finetune
sys.path.insert(0, {core!r})
from test_distributed import split_net, training_data

torch.set_num_threads(1)
found = {{}}
with d.joined("cpu"):
    me = d.rank()
    x = torch.arange(12.0).square() + 100
    found["variance"] = torch.stack(d.variances([x[: 5] if me else x[5:], x[me::2]]))
    found["biased"] = d.variances([x[me::2]], correction=0)[0]
    assert d.gather_bytes(b"" if me else b"first") == [b"first", b""]
    assert d.from_first(lambda: bytes([d.world()])) == bytes([1])
    assert d.world() == 2
    try:
        d.from_first(lambda: Path("nowhere", "a").read_bytes() if me else refuse())
    except InputError as error:
        assert str(error) == "no such thing"
    else:
        raise AssertionError
    small, teacher = split_net()
    tuned = finetune(small, Shard(training_data(), equal=True), teacher, steps=20)
    found |= {{f"tuned.{{key}}": value for key, value in tuned.state_dict().items()}}
    code = main(sys.argv[1:])
    assert code == 0
save_file(found, f"found-{{me}}.safetensors")
"""
REFUSING = """
def refuse():
    raise InputError("no such thing")
"""


def split_net() -> tuple[nn.Module, nn.Module]:
    """A split network and its teacher in float64, with outputs that are no logits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Unflatten(1, (8, 16)),
        ]
        teacher = nn.Sequential(*layers).double().eval()
        small = nn.Sequential(*teacher)
        small[2] = factorize(teacher[2], "channel_in", (2,))
    return small, teacher


def training_data() -> Batches:
    """Batches of 15 samples, of which two processes use 14; the first half is unlike the second."""
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.tensor([3.0, 1.0]).repeat_interleave(30)[:, None, None, None]
    return Batches(x, None, 15, shuffle=True)


class Even:
    """The batches without the sample that two processes leave out."""

    def __iter__(self):
        return (x[:14] for x in training_data())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("shared")
    (made / "sharednet.py").write_text(MODULE.format(tests=str(TESTS)))
    return made


def start(folder: Path, number: int, port: int, *command: str) -> subprocess.Popen:
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=os.environ | place | meeting, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def both(folder: Path, *command: str) -> list[tuple[int, str, str, float]]:
    """Exit code, output, errors and time of the end of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, number, port, *command) for number in (0, 1)]
    ended = []
    try:
        for process in reversed(processes):
            out, err = process.communicate(timeout=120)
            ended.append((process.returncode, out, err, time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    return ended[::-1]


PROFILE = (
    "profile", "sharednet:model", "--data", "sharednet:data", "--target", "onnxruntime-avx2",
    "--no-latency", "--scheme", "channel_in", "--float", "--anchor-samples", "16", "--seed", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(folder) -> list[dict[str, torch.Tensor]]:
    script = REFUSING + SHARED.format(core=str(Path(__file__).parent))
    script = script.replace("def refuse", "from sft.core.errors import InputError\ndef refuse", 1)
    first, second = both(folder, "-c", script, *PROFILE, "-o", "two", "--json")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert json.loads(first[1])["model"] == "sharednet:model"
    assert second[1] == second[2] == ""
    return [load_file(folder / f"found-{number}.safetensors") for number in (0, 1)]


def test_variances_are_those_of_all_numbers(shared) -> None:
    x = torch.arange(12.0).square() + 100
    for found in shared:
        torch.testing.assert_close(found["variance"], x.var().expand(2))
        torch.testing.assert_close(found["biased"], x.var(correction=0))


def test_training_is_that_of_one_process_with_the_whole_batches(shared) -> None:
    small, teacher = split_net()
    alone = finetune(small, Even(), teacher, steps=20).state_dict()
    for key, value in alone.items():
        assert torch.equal(shared[0][f"tuned.{key}"], shared[1][f"tuned.{key}"])
        assert float((shared[0][f"tuned.{key}"] - value).abs().max()) < 1e-9
    assert (
        float((alone["2.second.weight"] - small.state_dict()["2.second.weight"]).abs().max()) > 1e-3
    )


def test_the_profile_is_that_of_one_process(shared, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    torch.manual_seed(3)
    assert main([*PROFILE, "-o", "one", "--quiet"]) == 0
    one, two = (load_profile(folder / name) for name in ("one", "two"))
    assert (one.fingerprint, one.samples) == (two.fingerprint, two.samples)
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        assert ours.layer == theirs.layer
        for field in ("error", "damage"):
            wanted, found = ([getattr(c, field) for c in x.candidates] for x in (ours, theirs))
            assert found == pytest.approx(wanted, rel=2e-3, abs=1e-7)
    for name, own in one.statistics.items():
        for field in dataclasses.fields(own):
            wanted, found = (getattr(p.statistics[name], field.name) for p in (one, two))
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


def test_a_killed_process_ends_the_others_with_a_word_on_what_to_do(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert main([*PROFILE, "-o", "p", "--quiet"]) == 0
    assert main(["plan", "p", "--macs", "0.7", "-o", "plan.json", "--quiet"]) == 0
    given = ["finetune", "sharednet:model", "--data", "sharednet:deadly", "--seed", "3"]
    planned = ["--plan", "plan.json", "--profile", "p", "--steps", "400"]
    survivor, killed = both(folder, "-m", "sft", *given, *planned, "-o", "t.safetensors")
    assert killed[0] == -9
    assert survivor[0] == 3
    assert survivor[3] - killed[3] < 30
    assert "is lost" in survivor[2]
    assert "same command again" in survivor[2]
    assert not (folder / "t.safetensors").exists()


def test_a_verb_that_gains_nothing_is_run_by_the_first_process(folder) -> None:
    first, second = both(folder, "-m", "sft", "list")
    assert "decompositions" in first[1]
    assert (first[0], second[0], second[1]) == (0, 0, "")


def test_batch_norm_in_training_mode_is_refused_where_batches_are_shared(monkeypatch) -> None:
    monkeypatch.setattr("sft.core.distributed.is_distributed", lambda: True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    with pytest.raises(InputError, match="'1' is in training mode"):
        run_steps(model, lambda batch, _: model(batch).sum(), [torch.zeros(2, 1, 4, 4)], [], None)
