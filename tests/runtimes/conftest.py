"""Small ONNX files, each with a NumPy forward pass and its multiply-accumulates by node."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sft.core.records import Artifact

Array = np.ndarray[Any, np.dtype[Any]]

SHAPE = (3, 9, 9)
# 3x3 stride 2 to 5 x 5 x 5; 1x1 to 7 channels; depthwise 3x3; pooled; 7 to 4.
MACS = {"first": 5 * 25 * 27, "point": 7 * 25 * 5, "depth": 7 * 25 * 9, "last": 4 * 7}


@dataclasses.dataclass(frozen=True)
class Case:
    path: Path
    forward: Callable[[Array], Array]  # (N, 3, 9, 9) -> (N, 4)
    step: float  # one step of the output's grid; 0 for a float file

    def artifact(self) -> Artifact:
        content = self.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return Artifact(
            str(self.path), "onnxruntime-avx2", len(content), digest, SHAPE, self.step > 0
        )


def save(path: Path, nodes: list[Any], arrays: dict[str, Array], shape: list[Any]) -> Path:
    """Write a graph from `x` of this shape to `y`."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def convolve(x: Array, w: Array, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """A cross-correlation by its definition: (N, C, H, W) * (O, C / groups, k, k)."""
    k, per, wide = w.shape[2], w.shape[0] // groups, w.shape[1]
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
    parts = [
        np.einsum(
            "nchwij,ocij->nohw",
            windows[:, g * wide : (g + 1) * wide],
            w[g * per : (g + 1) * per],
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, 1)


class Net:
    """A four-layer net; with `dtype` its activations are stored as such and weights as int8."""

    def __init__(self, dtype: type | None) -> None:
        rng = np.random.default_rng(0)
        self.dtype = dtype
        self.low, self.high = (0, 255) if dtype is np.uint8 else (-128, 127)
        self.scale = {"first": 0.004, "point": 0.01, "depth": 0.006, "last": 0.01}
        shapes: dict[str, tuple[int, ...]] = {"first": (5, 3, 3, 3), "point": (7, 5, 1, 1)}
        shapes |= {"depth": (7, 1, 3, 3), "last": (4, 7)}
        self.whole = {n: rng.integers(-63, 64, s).astype(np.int8) for n, s in shapes.items()}
        self.weights = {n: w * np.float32(self.scale[n]) for n, w in self.whole.items()}
        middle = self.low + 128
        self.grid = {"x": (0.04, middle), "a": (0.02, self.low), "b": (0.02, middle)}
        self.grid |= {"c": (0.02, middle), "p": (0.01, middle), "y": (0.01, middle)}
        self.nodes: list[Any] = []
        self.arrays: dict[str, Array] = {}

    def node(self, op: str, x: list[str], y: str, name: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, x, [y], name, **attributes))

    def weight(self, name: str) -> str:
        """Name of the weight as a float."""
        if self.dtype is None:
            self.arrays[f"w_{name}"] = self.weights[name]
        else:
            count = len(self.whole[name])
            self.arrays[f"i_{name}"] = self.whole[name]
            self.arrays[f"s_{name}"] = np.full(count, self.scale[name], np.float32)
            self.arrays[f"z_{name}"] = np.zeros(count, np.int8)
            takes = [f"{k}_{name}" for k in "isz"]
            self.node("DequantizeLinear", takes, f"w_{name}", axis=0)
        return f"w_{name}"

    def put(self, value: str, grid: str, y: str) -> str:
        """Name of the value after it was stored on its grid."""
        if self.dtype is None:
            if y == "y":
                self.node("Identity", [value], y)
            return y if y == "y" else value
        step, zero = self.grid[grid]
        self.arrays[f"{value}_s"] = np.array(step, np.float32)
        self.arrays[f"{value}_z"] = np.array(zero, self.dtype)
        extra = [f"{value}_s", f"{value}_z"]
        self.node("QuantizeLinear", [value, *extra], f"{value}_q")
        self.node("DequantizeLinear", [f"{value}_q", *extra], y)
        return y

    def build(self, path: Path) -> Path:
        pads = [1, 1, 1, 1]
        x = self.put("x", "x", "x1")
        self.node("Conv", [x, self.weight("first")], "r", "first", strides=[2, 2], pads=pads)
        self.node("Relu", ["r"], "a")
        self.node("Conv", [self.put("a", "a", "a1"), self.weight("point")], "b", "point")
        b = self.put("b", "b", "b1")
        self.node("Conv", [b, self.weight("depth")], "c", "depth", group=7, pads=pads)
        self.node("GlobalAveragePool", [self.put("c", "c", "c1")], "p")
        self.node("Flatten", [self.put("p", "p", "p1")], "f")
        f = self.put("f", "p", "f1")
        self.node("Gemm", [f, self.weight("last")], "z", "last", transB=1)
        self.put("z", "y", "y")
        return save(path, self.nodes, self.arrays, [1, *SHAPE])

    def snap(self, value: Array, name: str) -> Array:
        if self.dtype is None:
            return value
        step, zero = self.grid[name]
        snapped: Array = (np.clip(np.round(value / step) + zero, self.low, self.high) - zero) * step
        return snapped

    def forward(self, x: Array) -> Array:
        """What the file means, in float64: (N, 3, 9, 9) -> (N, 4)."""
        w = self.weights
        v = convolve(self.snap(x.astype(np.float64), "x"), w["first"], 2, 1)
        v = convolve(self.snap(np.maximum(v, 0), "a"), w["point"])
        v = convolve(self.snap(v, "b"), w["depth"], 1, 1, 7)
        v = self.snap(self.snap(v, "c").mean((2, 3)), "p")
        return self.snap(v @ w["last"].T, "y")


def make_case(path: Path, dtype: type | None) -> Case:
    net = Net(dtype)
    return Case(net.build(path), net.forward, 0.0 if dtype is None else net.grid["y"][0])


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The same net as a float, a U8S8 and an S8S8 file."""
    folder = tmp_path_factory.mktemp("files")
    kinds = {"float": None, "uint8": np.uint8, "int8": np.int8}
    return {n: make_case(folder / f"{n}.onnx", d) for n, d in kinds.items()}


@pytest.fixture(scope="session")
def samples() -> Array:
    return np.random.default_rng(1).standard_normal((6, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="session")
def save_graph() -> Callable[..., Path]:
    return save


@pytest.fixture(scope="session")
def macs() -> dict[str, int]:
    return MACS
