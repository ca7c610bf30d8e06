"""Layers without integer kernels: stored in few bits, or opened and multiplied in integers."""

import dataclasses
from math import ceil

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.data import Batches, Data
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.exporters import export, storage_of
from sft.models.inspect import inspect
from sft.planning.allocate import plan as make_plan
from sft.profiling.cost import cost_of
from sft.profiling.profile import profile
from sft.runtimes.onnxruntime import OnnxRuntime
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.modules import open_all_recurrent
from sft.verification.parity import verify
from sft.verification.placement import integer_fraction

TARGET, ZERO = "onnxruntime-vnni", Cost(0, 0, 0)


class Heard(nn.Module):
    """A convolution over time, a recurrent module, a linear layer on the last step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 3, padding=1)
        self.memory, self.fc = kind(8, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).transpose(1, 2)
        return self.fc(self.memory(x)[0][:, -1])


class Grown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 16, 4, stride=2)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.up(torch.relu(self.stem(x)))))


def made(make, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval(), torch.randn(32, *shape)


def planned(net: nn.Module, x: Tensor, inside: str, option: Option) -> Plan:
    """Dense, but `option` for every layer whose name begins with `inside`."""
    layers = inspect(open_all_recurrent(net)[0], x[:2], "net").layers
    rows = tuple(
        PlanRow(r.name, option if r.name.startswith(inside) else Option("dense"), None, ZERO, "")
        for r in layers
    )
    shape = tuple(x.shape[1:])
    return Plan("net", TARGET, {}, rows, ZERO, ZERO, "optimal", 0, 0, 0, input_shape=shape)


def run(path: str, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: each[None].numpy()})[0] for each in x])


def relative_error(found: np.ndarray, wanted: Tensor) -> float:
    wanted = wanted.detach().numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (nn.LSTM, 4),
        (nn.GRU, 8),
        pytest.param(nn.LSTM, 8, marks=pytest.mark.slow),
        pytest.param(nn.GRU, 4, marks=pytest.mark.slow),
    ],
)
def test_a_whole_recurrent_module_is_stored_in_few_bits(kind, bits, tmp_path) -> None:
    net, x = made(lambda: Heard(kind), (4, 6))
    plan = planned(net, x, "memory.", Option("stored", (), bits))
    rounded = quantize(apply(net, plan), plan, TARGET, [x])
    artifact = export(rounded, plan, tmp_path / "m.onnx", TARGET)

    gates = {nn.LSTM: 4, nn.GRU: 3}[kind] * 24
    found = {s.shape: s for s in storage_of(artifact).values()}
    assert set(found) == {(8, 4, 3), (gates, 8), (gates, 24), (4, 24)}
    for width in (8, 24):
        assert found[gates, width].bits == bits
        assert found[gates, width].bytes == ceil(gates * width * bits / 8)

    kernels = OnnxRuntime(artifact.path, 1).place(x[:1].numpy(), str(tmp_path))
    assert {k.op: k.integer for k in kernels} == {
        "QLinearConv": True, kind.__name__: False, "QGemm": True,
    }  # fmt: skip
    # The input of the last layer, of 24 numbers at 8 bits, may round either way at a half.
    assert relative_error(run(artifact.path, x), rounded(x)) < 0.005
    error = relative_error(rounded(x).detach().numpy(), net(x))
    assert 1e-4 < error < (0.05 if bits == 8 else 0.3)


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_an_opened_recurrent_module_is_multiplied_in_integers(kind, tmp_path) -> None:
    net, x = made(lambda: Heard(kind), (4, 5))
    plan = planned(net, x, "memory.", Option("dense"))
    rounded = quantize(apply(net, plan), plan, TARGET, [x])
    artifact = export(rounded, plan, tmp_path / "m.onnx", TARGET)
    kernels = OnnxRuntime(artifact.path, 1).place(x[:1].numpy(), str(tmp_path))
    assert integer_fraction(tuple(kernels)) == 1.0
    # Sigmoids are tables of 8 bits, and a step lost in one step of time goes on to the next.
    assert relative_error(run(artifact.path, x), rounded(x)) < 0.03
    assert relative_error(rounded(x).detach().numpy(), net(x)) < 0.1


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_transposed_convolution_is_stored_in_few_bits(bits, tmp_path) -> None:
    net, x = made(Grown, (3, 6, 6))
    plan = planned(net, x, "up", Option("stored", (), bits))
    rounded = quantize(apply(net, plan), plan, TARGET, [x])
    artifact = export(rounded, plan, tmp_path / "m.onnx", TARGET)
    stored = storage_of(artifact)["up.weight"]
    assert stored.shape == (8, 16, 4, 4)
    assert stored.bits == (8 if bits == 8 else 4)
    step = float(list(rounded.activations().values())[-1].scale.detach())
    assert np.abs(run(artifact.path, x) - rounded(x).detach().numpy()).max() <= 1.01 * step
    kernels = OnnxRuntime(artifact.path, 1).place(x[:1].numpy(), str(tmp_path))
    assert [k.integer for k in kernels] == [True, False, True]


def test_a_file_that_only_stores_integers_does_not_claim_to_multiply_them(tmp_path) -> None:
    net, x = made(lambda: nn.ConvTranspose2d(3, 8, 4, stride=2), (3, 6, 6))
    net = nn.Sequential(net).eval()
    plan = planned(net, x, "0", Option("stored"))
    rounded = quantize(apply(net, plan), plan, TARGET, [x])
    artifact = export(rounded, plan, tmp_path / "m.onnx", TARGET)
    assert not artifact.integers
    assert verify(artifact, net, [x], simulation=rounded).passed


def test_plans_store_a_transposed_convolution_and_say_what_it_saves() -> None:
    net, x = made(Grown, (3, 6, 6))
    data = Data(*(Batches(x, None, 16) for _ in range(4)), name="noise")
    measured = profile(net, data, TARGET)
    (up,) = [entry for entry in measured.layers if entry.layer.name == "up"]
    found = {c.option: c for c in up.candidates}
    assert Option("dense") not in found
    option = Option("stored")
    assert 0 < found[option].error < 1e-3
    assert up.alphas["stored"] > 0

    chosen = make_plan(measured, Budget())
    assert chosen.option("up") == option
    reason = next(row.reason for row in chosen.rows if row.name == "up")
    assert reason.startswith("stored in 8 bits, multiplied in float: ")
    assert "saves size, not time" in reason


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_cost_counts_the_stored_bits(bits) -> None:
    net, x = made(Grown, (3, 6, 6))
    (layer,) = [each for each in inspect(net, x[:2], "net").layers if each.name == "up"]
    target = dataclasses.replace(find_target(TARGET), layer_bytes=0)
    cost = cost_of(layer, Option("stored", (), bits), target)
    assert cost.size == ceil(8 * 16 * 16 * bits / 8) + 4 * 16 + 4 * 16
    assert cost.macs == cost_of(layer, Option("keep"), target).macs
