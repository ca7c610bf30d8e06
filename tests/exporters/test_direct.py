"""Graphs written node by node: the same bytes as by way of `torch.onnx`, or not at all."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from sft.calibration.quantize import quantize
from sft.core.data import Batches
from sft.core.records import DENSE, Cost, Option, Plan, PlanRow
from sft.exporters import onnxruntime as exporter
from sft.exporters.direct import write_directly
from sft.models.inspect import inspect
from sft.surgery.apply import apply


class Plain(nn.Module):
    """Every operator that is written directly."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.next = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 3)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 1, 12, 12) -> (N, 3)``"""
        y = nn.functional.relu6(self.stem(x))
        y = torch.relu(self.next(nn.functional.hardtanh(self.wide(y), 0.0, 1.0)) + y)
        y = nn.functional.max_pool2d(y, 3, 2, 1).clamp(0.0, 2.0)
        return self.fc(self.last(y))


def pooled(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)


def meant(y: torch.Tensor) -> torch.Tensor:
    return y.mean((2, 3), keepdim=True).flatten(1)


def squashed(y: torch.Tensor) -> torch.Tensor:
    return torch.tanh(meant(y))


def dropping(y: torch.Tensor) -> torch.Tensor:
    return y.mean((2, 3))


def converted(last: Callable[[torch.Tensor], torch.Tensor], bits: int, target: str) -> GraphModule:
    """A network with random weights in integers."""
    torch.manual_seed(0)
    network, x = Plain(last).eval(), torch.randn(8, 1, 12, 12)
    cost = Cost(1, 1, 1)
    rows = tuple(
        PlanRow(layer.name, Option(DENSE, (), bits), None, cost, "test")
        for layer in inspect(network, x[:1]).layers
    )
    plan = Plan("m", target, {}, rows, cost, cost, "edited", 0, 0, 0, input_shape=(1, 12, 12))
    rounded = quantize(apply(network, plan), plan, target, Batches(x, None, 8))
    return rounded.convert()


@pytest.mark.parametrize("last", [pooled, meant])
@pytest.mark.parametrize(
    ("bits", "target"), [(8, "onnxruntime-avx2"), (4, "onnxruntime-vnni"), (8, "onnxruntime-arm64")]
)
def test_both_ways_give_the_same_bytes(last, bits, target, tmp_path: Path, monkeypatch) -> None:
    graph, x = converted(last, bits, target), torch.randn(1, 1, 12, 12)
    assert write_directly(graph, x, exporter.OPSET) is not None
    exporter.OnnxRuntimeExporter().write(graph, x, tmp_path / "direct.onnx")
    monkeypatch.setattr(exporter, "write_directly", lambda *_: None)
    exporter.OnnxRuntimeExporter().write(graph, x, tmp_path / "torch.onnx")
    assert (tmp_path / "direct.onnx").read_bytes() == (tmp_path / "torch.onnx").read_bytes()


def test_the_model_is_valid_and_gives_what_the_graph_gives() -> None:
    graph, x = converted(pooled, 8, "onnxruntime-vnni"), torch.randn(1, 1, 12, 12)
    model = write_directly(graph, x, exporter.OPSET)
    assert model is not None
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = graph(x)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("last", [squashed, dropping])
def test_what_it_does_not_know_is_left_alone(last) -> None:
    """An unknown operator; and a known one (a mean that drops the axes) used in another way."""
    graph = converted(last, 8, "onnxruntime-vnni")
    assert write_directly(graph, torch.randn(1, 1, 12, 12), exporter.OPSET) is None
