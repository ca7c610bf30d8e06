"""The layer that computes something else is named, and none of those behind it."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sft.calibration.quantize import quantize
from sft.core.errors import InputError
from sft.core.files import sha256
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.exporters import export
from sft.models.inspect import inspect
from sft.surgery.apply import apply
from sft.verification.divergence import divergences, first_divergence
from sft.verification.parity import verify

TARGET, ZERO = "onnxruntime-avx2", Cost(0, 0, 0)


class Mixed(nn.Module):
    """Convolutions with and without a rectifier, a transposed one, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.hidden, self.fc = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.clamp(self.body(x) + x, -0.5, 1.5)
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.fc(torch.relu(self.hidden(x)))


LAYERS = ("stem", "body", "up", "hidden", "fc")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The quantised network, its file, and samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = Mixed().eval(), torch.randn(32, 1, 8, 8)
    layers = inspect(net, x[:2], "net").layers
    rows = tuple(
        PlanRow(r.name, Option("stored" if r.name == "up" else "dense"), None, ZERO, "")
        for r in layers
    )
    plan = Plan("net", TARGET, {}, rows, ZERO, ZERO, "optimal", 0, 0, 0, input_shape=(1, 8, 8))
    rounded = quantize(apply(net, plan), plan, TARGET, [x])
    path = tmp_path_factory.mktemp("file") / "m.onnx"
    return rounded, export(rounded, plan, path, TARGET), x, net


def corrupted(artifact, layer: str, folder: Path):
    """The file with the first output channel of one layer turned round."""
    proto = onnx.load(artifact.path)
    weights = [t for t in proto.graph.initializer if t.data_type == 3 and len(t.dims) > 1]
    shapes = {"stem": [8, 1, 3, 3], "body": [8, 8, 3, 3], "up": [8, 6, 2, 2],
              "hidden": [16, 6], "fc": [4, 16]}  # fmt: skip
    (tensor,) = [t for t in weights if list(t.dims) == shapes[layer]]
    values = numpy_helper.to_array(tensor).copy()
    first = values[:, 0] if layer == "up" else values[0]
    first *= -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = folder / "corrupted.onnx"
    onnx.save(proto, path)
    return dataclasses.replace(artifact, path=str(path), sha256=sha256(path))


def test_a_right_file_has_none(made) -> None:
    rounded, artifact, x, _ = made
    assert first_divergence(artifact, rounded, x) is None


@pytest.mark.parametrize("layer", LAYERS)
def test_the_corrupted_layer_is_named(made, layer, tmp_path) -> None:
    rounded, artifact, x, _ = made
    wrong = corrupted(artifact, layer, tmp_path)
    (found,) = divergences(wrong, rounded, x)
    assert found.layer == layer
    assert found.steps > 2
    assert f"'{layer}'" in str(found)
    assert first_divergence(wrong, rounded, x) == found


def test_verify_names_the_layer_when_it_fails(made, tmp_path) -> None:
    rounded, artifact, x, net = made
    proto = onnx.load(artifact.path)
    for tensor in proto.graph.initializer:
        if list(tensor.dims) == [4, 16]:
            values = np.full((4, 16), 127, np.int8)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path / "wrong.onnx"
    onnx.save(proto, path)
    changed = dataclasses.replace(artifact, path=str(path), sha256=sha256(path))
    check = verify(changed, net, [x], simulation=rounded)
    assert not check.passed
    assert any("The first layer that differs is 'fc'" in each for each in check.failures)
    right = verify(artifact, net, [x], simulation=rounded)
    assert not any("first layer" in each for each in right.failures)


def test_the_simulation_is_not_changed(made) -> None:
    rounded, artifact, x, _ = made
    before = rounded(x).detach()
    first_divergence(artifact, rounded, x)
    assert torch.equal(rounded(x).detach(), before)


def test_a_file_of_another_network_is_refused(made, tmp_path) -> None:
    rounded, _, x, _ = made
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    written = export(other, None, tmp_path / "o.onnx", TARGET, example=x[:1])
    with pytest.raises(InputError, match="has 1 layers with weights"):
        first_divergence(written, rounded, x)
