"""Which nodes ran, in which number type, with how many multiply-accumulates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from sft.runtimes.onnxruntime import OnnxRuntime, count_macs, kernels_of
from sft.runtimes.runner import Runner


@pytest.mark.parametrize("kind", ["float", "uint8", "int8"])
def test_kernels_of_a_file(cases: Any, macs: dict[str, int], kind: str) -> None:
    with Runner(cases[kind].path, "onnxruntime") as runner:
        kernels = runner.place()
    # The runtime adds a token to the names of nodes that it rebuilt.
    assert {k.name.split("_token")[0]: k.macs for k in kernels} == macs
    assert len(kernels) == len(macs)
    assert all(k.integer is (kind != "float") for k in kernels)
    assert all(k.op.startswith("Q") is (kind != "float") for k in kernels)


def test_a_float_layer_among_integers_is_told_apart(
    save_graph: Callable[..., Path], tmp_path: Path
) -> None:
    weight = np.ones((4, 3), np.float32)
    arrays: dict[str, Any] = {"s": np.float32(0.1).reshape(()), "z": np.uint8(128).reshape(())}
    arrays |= {"i": np.ones((3, 5), np.int8), "iz": np.int8(0).reshape(()), "w": weight}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "float"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["i", "s", "iz"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["b"], "whole"),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    path = save_graph(tmp_path / "mixed.onnx", nodes, arrays, [1, 2, 4])
    with Runner(path, "onnxruntime") as runner:
        kernels = runner.place()
    assert [(k.integer, k.macs) for k in kernels] == [(False, 2 * 4 * 3), (True, 2 * 3 * 5)]


def test_transposed_convolution_and_recurrence(
    save_graph: Callable[..., Path], tmp_path: Path
) -> None:
    up = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2], group=2)
    arrays = {"w": np.ones((4, 3, 3, 3), np.float32)}
    with Runner(save_graph(tmp_path / "up.onnx", [up], arrays, [1, 4, 5, 5]), "onnxruntime") as r:
        assert [(k.integer, k.macs) for k in r.place()] == [(False, 4 * 25 * 3 * 9)]
    # One step of an LSTM of width 7 on 4 features: four gates, each 4 + 7 products a unit.
    cell = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "cell", hidden_size=7)
    arrays = {"w": np.ones((1, 28, 4), np.float32), "r": np.ones((1, 28, 7), np.float32)}
    with Runner(save_graph(tmp_path / "cell.onnx", [cell], arrays, [1, 1, 4]), "onnxruntime") as r:
        assert [(k.integer, k.macs) for k in r.place()] == [(False, 28 * 11)]


@pytest.mark.parametrize(
    ("op", "inputs", "output", "want"),
    [
        ("NhwcFusedConv", [(1, 9, 9, 6), (8, 6, 3, 3)], (1, 7, 7, 8), 7 * 7 * 8 * 6 * 9),
        ("QLinearConv", [(1, 9, 9, 6), (), (), (8, 2, 3, 3)], (1, 7, 7, 8), 7 * 7 * 8 * 2 * 9),
        ("Gemm", [(3, 5), (5, 4)], (3, 4), 60),
        ("FusedMatMul", [(2, 5, 3), (2, 4, 5)], (2, 3, 4), 120),
        ("MatMul", [(2, 3, 5), (5,)], (2, 3), 30),
        ("QGemm", [(3, 5), (), (), (4, 5)], (3, 4), 60),
        ("MatMulNBits", [(3, 64), (4, 2, 16)], (3, 4), 3 * 4 * 64),
        ("GRU", [(6, 2, 4), (1, 21, 4), (1, 21, 7)], (6, 1, 2, 7), 6 * 2 * 21 * 11),
    ],
)
def test_count_macs(
    op: str, inputs: list[tuple[int, ...]], output: tuple[int, ...], want: int
) -> None:
    assert count_macs(op, inputs, output) == want


@pytest.mark.parametrize(
    ("op", "types", "integer"),
    [
        ("MatMulNBits", ("float", "uint8"), False),  # few-bit weights, float products
        ("DynamicQuantizeMatMul", ("float", "int8"), True),
        ("MatMulInteger", ("uint8", "int8"), True),
        ("MatMul", ("float16", "float16"), False),
        ("Add", ("int8", "int8"), None),
    ],
)
def test_number_type_of_a_profiled_node(
    op: str, types: tuple[str, str], integer: bool | None
) -> None:
    shapes = [{types[0]: [2, 3]}, {types[1]: [3, 4]}]
    facts = {"op_name": op, "input_type_shape": shapes, "output_type_shape": [{"float": [2, 4]}]}
    events: list[dict[str, Any]] = [
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "a_fence_before", "args": facts},
        {"cat": "Node", "name": "a_kernel_time", "args": facts},
    ]
    want = [] if integer is None else [("a", op, integer, 24)]
    assert [(k.name, k.op, k.integer, k.macs) for k in kernels_of(events)] == want


def test_place_removes_its_trace(cases: Any, samples: Any, tmp_path: Path) -> None:
    assert OnnxRuntime(str(cases["float"].path), 1).place(samples[:1], str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_place_leaves_no_files(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Runner(cases["float"].path, "onnxruntime") as runner:
        assert runner.place()
    assert list(tmp_path.iterdir()) == []
