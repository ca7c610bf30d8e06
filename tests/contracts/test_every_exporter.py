"""Every registered exporter: whole files or none, the same bytes each time, refusals in words."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import sft
from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.records import Artifact, Cost, Option, Plan, PlanRow, Target
from sft.exporters import export, exporters, mean_bits, storage_of
from sft.runtimes.targets import find_target
from sft.verification.parity import verify

NAMES = list(exporters)


def target_of(name: str) -> Target:
    """Of the machine at hand, so that its runtime has the integer kernels."""
    return find_target(exporters[name].runtime)


def planned(net: nn.Module, data: Data, target: str, bits: dict[str, int]) -> Plan:
    """Every layer dense, in the bits that are given for it."""
    seen = sft.inspect(net, data.example())
    rows = tuple(
        PlanRow(r.name, Option("dense", (), bits[r.name]), None, Cost(r.params, r.macs, 0), "")
        for r in seen.layers
    )
    whole = Cost(seen.params, seen.macs, 0)
    shape = seen.input_shape
    return Plan("net", target, {}, rows, whole, whole, "edited", 0.0, 0.0, 0.0, shape)


@pytest.fixture
def rounded(request, net, data):
    """The network in 8-bit and, in its two largest layers, 4-bit integers."""
    name = target_of(request.getfixturevalue("name")).name
    plan = planned(net, data, name, {"stem": 8, "body": 4, "down": 4, "fc": 8})
    return sft.quantize(sft.apply(net, plan), plan, name, data.calibration)


class Undecided(nn.Module):
    """Its path depends on the data: no graph can hold it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x


class Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this network has no exportable form")


class Untranslatable(nn.Module):
    """An operator that no runtime has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_registered_under_its_runtime(name: str) -> None:
    assert exporters[name].runtime == name
    assert target_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_float_network_does_the_same_and_is_left_as_it_was(name, net, data, tmp_path) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    target = target_of(name)
    path = tmp_path / f"m{target.suffix}"
    artifact = export(net, None, path, target.name, example=data.example())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert artifact.file_bytes == path.stat().st_size
    check = verify(artifact, net, data.test)
    assert check.passed, check.failures
    assert check.agreement == 1.0
    assert mean_bits(storage_of(artifact)) == 32.0
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_integer_network_does_the_same_and_gives_the_same_bytes_again(
    name, rounded, net, data, tmp_path
) -> None:
    target = target_of(name)
    files = [tmp_path / f"{file}{target.suffix}" for file in "ab"]
    artifact, again = (export(rounded, rounded.plan, f, target.name) for f in files)
    assert artifact.integers
    assert artifact.sha256 == again.sha256
    check = verify(artifact, net, data.test, simulation=rounded)
    assert check.passed, check.failures
    assert check.integer_macs_fraction > 0.99
    stored = storage_of(artifact)
    assert len(stored) == 4
    assert mean_bits(stored) <= 8
    assert sum(s.bytes for s in stored.values()) < artifact.file_bytes


@pytest.mark.parametrize("name", NAMES)
def test_the_same_float_network_gives_the_same_bytes(name, tmp_path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    contents = []
    for file in "ab":
        path = tmp_path / f"{file}{target_of(name).suffix}"
        exporters[name].write(network, torch.zeros(1, 1, 6, 6), path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("network", "cause"),
    [
        (Undecided(), "data-dependent"),
        (Refusing(), "this network has no exportable form"),
        (Untranslatable(), "linalg_svd"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_exported_is_refused_with_the_cause(
    name, network, cause, tmp_path, capfd
) -> None:
    path = tmp_path / f"m{target_of(name).suffix}"
    path.write_bytes(b"the old file")
    with pytest.raises(InputError, match=cause) as caught:
        export(network.eval(), None, path, target_of(name).name, example=torch.rand(1, 3, 4, 4))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"the old file"]
    assert not capfd.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_write_that_breaks_off_leaves_the_old_file(name, tmp_path, monkeypatch) -> None:
    path = tmp_path / f"m{target_of(name).suffix}"
    path.write_bytes(b"the old file")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        exporters[name].write(nn.Linear(2, 2), torch.zeros(1, 2), path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"the old file"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_has_no_storage(name, tmp_path) -> None:
    target = target_of(name)
    path = tmp_path / f"m{target.suffix}"
    artifact = Artifact(str(path), target.name, 4, "", (1,), True)
    with pytest.raises(InputError, match=path.name):
        storage_of(artifact)
    Path(path).write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match=path.name):
        storage_of(artifact)
