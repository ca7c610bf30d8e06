"""Rectifiers before a rounding: dropped when saturation does the same, and only then."""

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from sft.exporters.clips import clip_integers, drop_redundant_clips
from sft.runtimes.onnxruntime import OnnxRuntime

EVERY, NONE = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def network(
    op: str, low: float | None, high: float | None, scale: float, zero: np.generic, taps: int = 0
) -> onnx.ModelProto:
    """Input, optionally a rounded 1x1 convolution, the rectifier, and a rounding."""
    arrays = {"scale": np.float32(scale), "zero": zero}
    nodes = []
    if taps:
        weight = np.random.default_rng(0).integers(-60, 61, (taps, taps, 1, 1)).astype(np.int8)
        arrays |= {"w": weight, "s": np.float32(0.01), "z": np.int8(0), "in_zero": np.uint8(120)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "in_zero"], ["q0"]),
            helper.make_node("DequantizeLinear", ["q0", "s", "in_zero"], ["d0"]),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"]),
            helper.make_node("Conv", ["d0", "dw"], ["y"]),
        ]
    inputs = ["y" if taps else "x"]
    if op == "Clip":
        for name, bound in (("low", low), ("high", high)):
            inputs.append(name if bound is not None else "")
            arrays |= {name: np.float32(bound)} if bound is not None else {}
    nodes += [
        helper.make_node(op, inputs, ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["out"]),
    ]
    shape = (1, taps or 1000, 1, 1)
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto: onnx.ModelProto, level: object, seed: int = 0) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = 5 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return session.run(None, {"x": x})[0]


def operators(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


@pytest.mark.parametrize(
    ("op", "low", "high", "scale", "zero", "dropped"),
    [
        ("Relu", None, None, 0.05, np.uint8(0), True),
        ("Relu", None, None, 0.05, np.int8(-128), True),
        ("Relu", None, None, 0.05, np.uint8(1), False),
        ("Relu", None, None, 0.05, np.int8(0), False),
        ("Clip", 0, 6, 6 / 255, np.uint8(0), True),
        ("Clip", 0, 6, 5 / 255, np.uint8(0), True),
        ("Clip", 0, 6, 7 / 255, np.uint8(0), False),
        ("Clip", 0, 6, 6 / 255, np.uint8(3), False),
        ("Clip", -1, 1, 1.98 / 255, np.uint8(128), True),
        ("Clip", -1, 1, 1.98 / 255, np.int8(0), True),
        ("Clip", -1, 1, 3 / 255, np.int8(0), False),
        ("Clip", 0, None, 0.05, np.uint8(0), True),
        ("Clip", None, 6, 6 / 255, np.uint8(9), True),
        ("Clip", None, 6, 7 / 255, np.uint8(9), False),
    ],
)
def test_what_is_dropped_and_that_outputs_stay(op, low, high, scale, zero, dropped) -> None:
    proto = network(op, low, high, scale, zero)
    before = run(proto, NONE)
    drop_redundant_clips(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    assert (op not in operators(proto)) == dropped
    assert np.array_equal(run(proto, NONE), before)
    assert np.array_equal(run(proto, EVERY), before)
    assert not dropped or not {"low", "high"} & {t.name for t in proto.graph.initializer}


@given(
    low=st.floats(-3, 0, width=32),
    high=st.floats(0.125, 8, width=32),
    factor=st.sampled_from([0.5, 0.99, 0.997, 1.0, 1.002, 1.004, 1.5]),
    zero=st.sampled_from([0, 1, 60, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_dropping_never_changes_an_integer(low, high, factor, zero, seed) -> None:
    proto = network("Clip", low, high, factor * (high - low) / 255, np.uint8(zero))
    before = run(proto, NONE, seed)
    drop_redundant_clips(proto.graph)
    assert np.array_equal(run(proto, NONE, seed), before)


@pytest.mark.parametrize(("op", "high"), [("Relu", None), ("Clip", 6.0)])
def test_a_fused_convolution_gives_the_same_integers(op, high) -> None:
    low = None if high is None else 0.0
    proto = network(op, low, high, 6 / 255, np.uint8(0), taps=64)
    before = run(proto, NONE)
    drop_redundant_clips(proto.graph)
    assert op not in operators(proto)
    assert np.array_equal(run(proto, NONE), before)
    assert np.array_equal(run(proto, EVERY), before)
    assert before.min() == 0
    assert len(np.unique(before)) > 8


def test_a_second_reader_keeps_the_rectifier() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(0))
    proto.graph.node.append(helper.make_node("Neg", ["r"], ["n"]))
    drop_redundant_clips(proto.graph)
    assert "Relu" in operators(proto)


def test_several_roundings_that_all_saturate_alike_drop_it() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(0))
    proto.graph.node.append(helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q2"]))
    drop_redundant_clips(proto.graph)
    assert operators(proto) == ["QuantizeLinear", "DequantizeLinear", "QuantizeLinear"]


def test_a_rectifier_that_is_an_output_stays() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(0))
    output = helper.make_tensor_value_info("r", TensorProto.FLOAT, (1, 1000, 1, 1))
    proto.graph.output.append(output)
    drop_redundant_clips(proto.graph)
    assert "Relu" in operators(proto)


def test_bounds_that_are_computed_keep_the_clip() -> None:
    proto = network("Clip", 0.0, 6.0, 6 / 255, np.uint8(0))
    proto.graph.node.insert(0, helper.make_node("Abs", ["low"], ["computed"]))
    clip = next(n for n in proto.graph.node if n.op_type == "Clip")
    clip.input[1] = "computed"
    drop_redundant_clips(proto.graph)
    assert "Clip" in operators(proto)


def test_a_scale_for_each_channel_keeps_the_rectifier() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(0))
    for tensor in proto.graph.initializer:
        fill = np.full(1000, numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(fill, tensor.name))
    drop_redundant_clips(proto.graph)
    assert "Relu" in operators(proto)


@given(
    op=st.sampled_from(["Relu", "Clip"]),
    low=st.floats(-3, 0.5, width=32),
    length=st.floats(0.125, 8, width=32),
    scale=st.floats(0.003, 0.1),
    zero=st.sampled_from([np.uint8(0), np.uint8(77), np.uint8(255), np.int8(-128), np.int8(5)]),
)
@settings(max_examples=60, deadline=None)
def test_clipped_integers_are_those_of_clipped_values(op, low, length, scale, zero) -> None:
    proto = network(op, low, low + length, scale, zero, taps=8)
    before = run(proto, NONE)
    clip_integers(proto.graph)
    onnx.checker.check_model(proto)
    assert operators(proto)[-3:] == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    assert np.array_equal(run(proto, NONE), before)


def test_a_convolution_before_a_clip_of_integers_is_fused(tmp_path) -> None:
    proto, path = network("Relu", None, None, 0.02, np.uint8(77), taps=64), tmp_path / "m.onnx"
    before = run(proto, NONE)
    clip_integers(proto.graph)
    onnx.save(proto, path)
    x = np.zeros((1, 64, 1, 1), np.float32)
    assert [k.op for k in OnnxRuntime(str(path), 1).place(x, str(tmp_path))] == ["QLinearConv"]
    assert np.array_equal(run(proto, EVERY), before)
    assert before.min() == 0


def test_two_roundings_or_a_visible_value_keep_the_float_rectifier() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(9), taps=8)
    proto.graph.node.append(helper.make_node("QuantizeLinear", ["r", "s", "zero"], ["q2"]))
    clip_integers(proto.graph)
    assert "Relu" in operators(proto)


def test_a_rectifier_of_integers_without_arithmetic_is_left_alone() -> None:
    proto = network("Relu", None, None, 0.05, np.uint8(9), taps=8)
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    proto.graph.node.remove(conv)
    next(n for n in proto.graph.node if n.op_type == "Relu").input[0] = "d0"
    before = operators(proto)
    clip_integers(proto.graph)
    assert operators(proto) == before
