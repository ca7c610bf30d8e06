"""Integer biases: the product runs in integers, and moves by no more than half a unit."""

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from sft.exporters.biases import round_biases
from sft.runtimes.onnxruntime import OnnxRuntime

EVERY, NONE = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)
UNIT = np.float32(0.02) * np.float32(0.01)  # of the input times of the weight, in `network`


def network(
    gemm: bool,
    *,
    bias: float = 1.0,
    scale: float = 0.01,
    rounded: bool = False,
    plain: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """A rounded input (4, 6), a linear layer (6 to 5) as Gemm or MatMul and Add, its output.

    rounded : the output is quantised. plain : the input is not.
    """
    generator = np.random.default_rng(seed)
    weight = generator.integers(-127, 128, (5, 6)).astype(np.int8)
    arrays = {
        "sx": np.float32(0.02), "zx": np.uint8(110), "w": weight,
        "sw": np.full(5, scale, np.float32), "zw": np.zeros(5, np.int8),
        "fc.bias": (bias * generator.standard_normal(5)).astype(np.float32),
        "sy": np.float32(0.1), "zy": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=0),
    ]
    data = "x" if plain else "d"
    if gemm:
        nodes.append(helper.make_node("Gemm", [data, "dw", "fc.bias"], ["y"], transB=1))
    else:
        nodes.append(helper.make_node("Transpose", ["dw"], ["t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [data, "t"], ["p"]))
        nodes.append(helper.make_node("Add", ["p", "fc.bias"], ["y"]))
    if rounded:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["qy"]))
        nodes.append(helper.make_node("DequantizeLinear", ["qy", "sy", "zy"], ["out"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 6))],
        [helper.make_tensor_value_info("out" if rounded else "y", TensorProto.FLOAT, (4, 5))],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    return proto


def run(proto: onnx.ModelProto, level: object) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(9).standard_normal((4, 6)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def stored(proto: onnx.ModelProto) -> list[np.ndarray]:
    return [
        numpy_helper.to_array(t)
        for t in proto.graph.initializer
        if t.data_type == TensorProto.INT32
    ]


@given(gemm=st.booleans(), bias=st.sampled_from([1e-4, 1.0, 50.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_output_moves_by_half_a_unit_at_most(gemm: bool, bias: float, seed: int) -> None:
    proto = network(gemm, bias=bias, seed=seed)
    before = run(proto, NONE)
    round_biases(proto.graph)
    onnx.checker.check_model(proto)
    (integers,) = stored(proto)
    assert integers.shape == (5,)
    room = 0.5 * UNIT + 1e-6 * np.abs(before).max()
    assert np.abs(run(proto, NONE) - before).max() <= room
    assert np.abs(run(proto, EVERY) - before).max() <= room


@pytest.mark.parametrize("gemm", [True, False])
def test_the_layer_then_runs_in_integers(gemm, tmp_path) -> None:
    x = np.zeros((4, 6), np.float32)
    proto, path = network(gemm), str(tmp_path / "m.onnx")
    onnx.save(proto, path)
    assert [k.integer for k in OnnxRuntime(path, 1).place(x, str(tmp_path))] == [False]
    round_biases(proto.graph)
    onnx.save(proto, path)
    (kernel,) = OnnxRuntime(path, 1).place(x, str(tmp_path))
    assert (kernel.op, kernel.integer) == ("QGemm", True)


def test_the_value_keeps_the_name_of_the_bias() -> None:
    proto = network(True)
    round_biases(proto.graph)
    gemm = next(n for n in proto.graph.node if n.op_type == "Gemm")
    assert gemm.input[2] == "fc.bias"


@pytest.mark.parametrize(
    "case",
    [
        {"rounded": True},  # the runtime rounds the bias itself
        {"plain": True},  # nothing to fuse: the input is float
        {"bias": 1e9},  # the sum would leave 32 bits
        {"scale": 1e-37, "bias": 0.0},  # the unit is denormal
    ],
    ids=lambda case: next(iter(case)),
)
@pytest.mark.parametrize("gemm", [True, False])
def test_a_bias_stays_in_float_where_it_must(gemm, case) -> None:
    proto = network(gemm, **case)
    before = proto.SerializeToString(deterministic=True)
    round_biases(proto.graph)
    assert stored(proto) == []
    onnx.checker.check_model(proto)
    assert "fc.bias" in {t.name for t in proto.graph.initializer}
    assert len(before) == len(proto.SerializeToString(deterministic=True))


@pytest.mark.parametrize(("room", "rounded"), [(5, False), (7, True)])
def test_a_sum_that_may_leave_32_bits_keeps_its_bias_in_float(room: int, rounded: bool) -> None:
    proto = network(True)  # of 6 products, each 255 * 128 at most
    (tensor,) = [t for t in proto.graph.initializer if t.name == "fc.bias"]
    bias = np.full(5, (2**31 - room * 255 * 128) * UNIT, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(bias, "fc.bias"))
    round_biases(proto.graph)
    assert bool(stored(proto)) == rounded


def test_a_bias_of_two_layers_is_rounded_in_the_units_of_each() -> None:
    proto = network(True)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.full(5, 0.5, np.float32), "other scale")
    )
    proto.graph.node.extend(
        [
            helper.make_node("DequantizeLinear", ["w", "other scale", "zw"], ["dv"], axis=0),
            helper.make_node("Gemm", ["d", "dv", "fc.bias"], ["z"], transB=1),
            helper.make_node("Sub", ["y", "z"], ["difference"]),
        ]
    )
    proto.graph.output[0].name = "difference"
    before = run(proto, NONE)
    round_biases(proto.graph)
    onnx.checker.check_model(proto)
    assert len(stored(proto)) == 2
    assert np.abs(run(proto, NONE) - before).max() <= 0.5 * (UNIT + 0.02 * 0.5) * 1.001
