"""Zeros around integers: the same integers without a Pad, or with one that pads integers."""

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from sft.exporters.pads import keep_pads_in_integers

EVERY, NONE = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def network(
    ends: list[int],
    behind: str = "Conv",
    *,
    value: float | None = 0.0,
    mode: str = "constant",
    other_scale: bool = False,
) -> onnx.ModelProto:
    """A rounded image (1, 4, 6, 7), a Pad, its rounding, and a convolution or pooling of it."""
    weight = np.random.default_rng(0).integers(-60, 61, (8, 4, 3, 3)).astype(np.int8)
    arrays = {
        "s": np.float32(0.02), "z": np.uint8(100), "ends": np.array(ends, np.int64), "w": weight,
        "sw": np.float32(0.01), "zw": np.int8(0), "s2": np.float32(0.03),
        "sy": np.float32(0.05), "zy": np.uint8(130),
    }  # fmt: skip
    pad = ["d", "ends"]
    if value is not None:
        arrays["value"] = np.float32(value)
        pad.append("value")
    grid = ["s2" if other_scale else "s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Pad", pad, ["p"], mode=mode),
        helper.make_node("QuantizeLinear", ["p", *grid], ["qp"]),
        helper.make_node("DequantizeLinear", ["qp", *grid], ["dp"]),
    ]
    if behind == "Conv":
        nodes.append(helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"]))
        nodes.append(helper.make_node("Conv", ["dp", "dw"], ["y"], pads=[1, 0, 0, 2]))
    else:
        nodes.append(helper.make_node(behind, ["dp"], ["y"], kernel_shape=[2, 2]))
    nodes.append(helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["qy"]))
    nodes.append(helper.make_node("DequantizeLinear", ["qy", "sy", "zy"], ["out"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 6, 7))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, None, None, None))],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto: onnx.ModelProto, level: object) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(9).standard_normal((1, 4, 6, 7)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def operators(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


@given(
    sides=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    behind=st.sampled_from(["Conv", "MaxPool", "AveragePool"]),
    value=st.sampled_from([0.0, None]),
)
@settings(max_examples=40, deadline=None)
def test_the_integers_stay_the_same(sides: list[int], behind: str, value: float | None) -> None:
    top, left, bottom, right = sides
    proto = network([0, 0, top, left, 0, 0, bottom, right], behind, value=value)
    before = run(proto, NONE)
    keep_pads_in_integers(proto.graph)
    onnx.checker.check_model(proto)
    assert np.array_equal(run(proto, NONE), before)
    step = 0.05 if behind != "MaxPool" else 0.0
    assert np.abs(run(proto, EVERY) - before).max() <= 1.01 * step
    assert len(np.unique(before)) > 8


def test_a_convolution_takes_the_zeros_and_the_pad_is_gone() -> None:
    proto = network([0, 0, 0, 1, 0, 0, 2, 3])
    keep_pads_in_integers(proto.graph)
    assert "Pad" not in operators(proto)
    assert operators(proto).count("QuantizeLinear") == 2
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    assert list(next(a.ints for a in conv.attribute if a.name == "pads")) == [1, 1, 2, 5]


def test_before_a_pooling_integers_are_padded_with_the_zero_point() -> None:
    proto = network([0, 0, 0, 1, 0, 0, 2, 3], "MaxPool")
    keep_pads_in_integers(proto.graph)
    pad = next(n for n in proto.graph.node if n.op_type == "Pad")
    assert list(pad.input) == ["q", "ends", "z"]
    assert operators(proto).count("DequantizeLinear") == 2


def test_padded_channels_are_no_business_of_a_convolution() -> None:
    proto = network([0, 0, 0, 0, 0, 0, 0, 0])
    shape = [0, 1, 0, 0, 0, 1, 0, 0]
    ends = next(t for t in proto.graph.initializer if t.name == "ends")
    ends.CopyFrom(numpy_helper.from_array(np.array(shape, np.int64), "ends"))
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    weight.CopyFrom(numpy_helper.from_array(np.ones((8, 6, 3, 3), np.int8), "w"))
    before = run(proto, NONE)
    keep_pads_in_integers(proto.graph)
    assert "Pad" in operators(proto)
    assert np.array_equal(run(proto, NONE), before)


@pytest.mark.parametrize(
    "case", [{"value": 1.0}, {"mode": "reflect"}, {"other_scale": True}], ids=str
)
def test_other_pads_stay(case) -> None:
    proto = network([0, 0, 1, 1, 0, 0, 1, 1], **case)
    before = operators(proto)
    keep_pads_in_integers(proto.graph)
    assert operators(proto) == before
    assert next(n for n in proto.graph.node if n.op_type == "Pad").input[0] == "d"


def test_a_convolution_that_pads_by_a_rule_of_its_own_keeps_its_zeros() -> None:
    proto = network([0, 0, 1, 1, 0, 0, 1, 1])
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    del conv.attribute[:]
    conv.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    before = run(proto, NONE)
    keep_pads_in_integers(proto.graph)
    assert "Pad" in operators(proto)
    assert np.array_equal(run(proto, NONE), before)
