"""Every operator between two convolutions: the file multiplies in integers and stays in them.

One row an operator. `floats` are the float nodes that ONNX Runtime is left with between the
convolutions: elementwise functions for which it has no integer kernel, each between one dequantiser
(or as many as given) and one quantiser. All else runs on integers. Rows that share their way with
another one are marked slow.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.calibration.quantize import quantize
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.exporters import export
from sft.models.inspect import inspect
from sft.runtimes.onnxruntime import OnnxRuntime
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel
from sft.verification.placement import integer_fraction

TARGET = "onnxruntime-vnni"
ZERO = Cost(0, 0, 0)


class Between(nn.Module):
    """A function of a tensor and some modules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


def conv(inputs: int = 8, outputs: int = 8, side: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups)


def shuffled(x: Tensor, branch: nn.Module) -> Tensor:
    left, right = x.chunk(2, 1)
    y = torch.cat([left, torch.relu(branch(right))], 1)
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def split(x: Tensor, branch: nn.Module) -> Tensor:
    left, right = torch.split(x, [3, 5], 1)
    return torch.cat([branch(right), left], 1)


def sliced(x: Tensor, branch: nn.Module) -> Tensor:
    return torch.cat([x[:, :4], branch(x[:, 4:])], 1)


def squeezed(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    return x * torch.sigmoid(up(torch.relu(down(x.mean((2, 3), keepdim=True)))))


def squeezed_hard(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    return x * F.hardsigmoid(up(torch.relu(down(F.adaptive_avg_pool2d(x, 1)))))


def densely(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    y = torch.cat([x, torch.relu(first(x))], 1)
    return torch.cat([y, torch.relu(second(y))], 1)


def branched(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return torch.cat([torch.relu(first(x)), second(x), F.max_pool2d(x, 3, 1, 1)], 1)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], nn.Module]
    channels: int = 8
    slow: bool = False
    floats: tuple[str, ...] = ()
    dequantisers: int | None = None  # as many as float nodes stand alone, unless given


ROWS = (
    Row("relu", nn.ReLU, slow=True),
    Row("relu6", nn.ReLU6),
    Row("clamp", lambda: Between(lambda x: x.clamp(-0.4, 0.7)), slow=True),
    Row("hardtanh", lambda: nn.Hardtanh(-0.5, 0.5)),
    Row("leaky_relu", lambda: nn.LeakyReLU(0.1), slow=True),
    Row("sigmoid", nn.Sigmoid, slow=True),
    Row("max_pool", lambda: nn.MaxPool2d(2), slow=True),
    Row("padded max_pool", lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2))),
    Row("avg_pool", lambda: nn.AvgPool2d(2), slow=True),
    Row("mean", lambda: Between(lambda x: x.mean((2, 3), keepdim=True))),
    Row("nearest", lambda: nn.Upsample(scale_factor=2), slow=True),
    Row(
        "bilinear",
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        slow=True,
        floats=("Resize",),
    ),
    Row("pixel_shuffle", lambda: nn.PixelShuffle(2), 2, slow=True),
    Row("zero_pad", lambda: nn.ZeroPad2d((0, 1, 2, 1))),
    Row("add", lambda: Between(lambda x, a: a(x) + x, conv()), slow=True),
    Row("add and relu", lambda: Between(lambda x, a: torch.relu(a(x) + x), conv())),
    Row("depthwise", lambda: conv(groups=8), slow=True),
    Row("channel shuffle", lambda: Between(shuffled, conv(4, 4))),
    Row("split", lambda: Between(split, conv(5, 5)), slow=True),
    Row("slice", lambda: Between(sliced, conv(4, 4)), slow=True),
    Row("dense concat", lambda: Between(densely, conv(), conv(16)), 24, slow=True),
    Row("inception", lambda: Between(branched, conv(), conv(side=1)), 24),
    Row("squeeze and excite", lambda: Between(squeezed, conv(8, 4, 1), conv(4, 8, 1))),
    Row(
        "hard squeeze and excite",
        lambda: Between(squeezed_hard, conv(8, 4, 1), conv(4, 8, 1)),
        slow=True,
        floats=("HardSigmoid",),
    ),
    Row("hardswish", nn.Hardswish, floats=("HardSigmoid", "Mul"), dequantisers=1),
    Row("silu", nn.SiLU, slow=True, floats=("Sigmoid", "Mul"), dequantisers=2),
    Row("elu", nn.ELU, slow=True, floats=("Elu",)),
    Row("prelu", lambda: nn.PReLU(8), slow=True, floats=("PRelu",)),
)
INTEGER = {
    "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QGemm",
    "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool", "NhwcMaxPool",
}  # fmt: skip
MOVING = {"Transpose", "Reshape", "Split", "DepthToSpace", "Pad", "Clip", "MaxPool", "Resize"}


class Net(nn.Module):
    def __init__(self, row: Row) -> None:
        super().__init__()
        self.stem, self.middle = conv(3, 8), row.make()
        self.last = conv(row.channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.stem(x)))


def images(count: int, seed: int) -> Tensor:
    """Smooth images, so that no operator sees noise alone."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size=8, mode="bicubic")


def integers_of(net: nn.Module, x: Tensor, target: str = TARGET) -> QuantizedModel:
    layers = inspect(net, x[:2], "net").layers
    rows = tuple(PlanRow(layer.name, Option("dense"), None, ZERO, "") for layer in layers)
    shape = tuple(x.shape[1:])
    plan = Plan("net", target, {}, rows, ZERO, ZERO, "optimal", 0, 0, 0, input_shape=shape)
    return quantize(apply(net, plan), plan, target, [x])


def run(path: str, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: each[None].numpy()})[0] for each in x])


def optimised(path: str, folder) -> list[str]:
    """The operators that ONNX Runtime is left with."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.name, marks=[pytest.mark.slow] if r.slow else []) for r in ROWS],
)
def test_the_operator_stays_in_integers(row: Row, tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(row).eval()
    rounded = integers_of(net, images(32, 0))
    artifact = export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)

    x = images(32, 0)[:16]
    kernels = OnnxRuntime(artifact.path, 1).place(x[:1].numpy(), str(tmp_path))
    assert integer_fraction(tuple(kernels)) == 1.0

    left = Counter(optimised(artifact.path, tmp_path))
    dequantisers = len(row.floats) if row.dequantisers is None else row.dequantisers
    quantisers = min(1, len(row.floats))
    assert left.pop("QuantizeLinear") == 1 + quantisers  # one at the input
    assert left.pop("DequantizeLinear") == 1 + dequantisers  # one at the output
    assert set(left) - INTEGER - MOVING == set(row.floats) - MOVING

    step = float(list(rounded.activations().values())[-1].scale.detach())
    with torch.no_grad():
        wanted = rounded.convert()(x).numpy()
    assert np.abs(run(artifact.path, x) - wanted).max() <= 1.01 * step
    assert np.abs(wanted - net(x).detach().numpy()).max() <= 0.2 * np.abs(wanted).max()


@pytest.mark.parametrize("words", [False, True], ids=["vectors", "sequences"])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_stay_in_float_and_are_multiplied_in_integers(words, bias, tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5, bias=bias)).eval()
        x = torch.randn(32, 6, 12) if words else torch.randn(32, 12)
    rounded = integers_of(net, x)
    artifact = export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)
    kernels = OnnxRuntime(artifact.path, 1).place(x[:1].numpy(), str(tmp_path))
    assert integer_fraction(tuple(kernels)) == 1.0
    # A hidden value that lies at a half may be rounded either way: here two of 32, by a step each.
    step = float(list(rounded.activations().values())[-1].scale.detach())
    weight = rounded.weights()["2.weight"][0].detach()
    difference = np.abs(run(artifact.path, x) - rounded(x).detach().numpy())
    assert difference.max() <= 2.1 * step * float(weight.abs().max())
    assert difference.mean() <= 0.05 * step * float(weight.abs().max())
