"""Weights that are multiplied in float: integers in the file, the same numbers, folded at load."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sft.exporters.few_bits import store_few_bits
from sft.exporters.storage import read_onnx
from sft.exporters.widening import widen_stored_weights

EVERY, NONE = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def network(op: str = "ConvTranspose", top: int = 127, zero: int = 0, rounded: bool = False):
    """One layer of an input (1, 4, 5, 5) and a weight (4, 6, 3, 3) with scales along one axis."""
    generator = np.random.default_rng(0)
    axis = 1 if op == "ConvTranspose" else 0
    shape = (4, 6, 3, 3) if op == "ConvTranspose" else (6, 4, 3, 3)
    arrays = {
        "w": generator.integers(-top, top + 1, shape).astype(np.int8),
        "s": generator.uniform(0.01, 0.1, 6).astype(np.float32),
        "z": np.full(6, zero, np.int8), "sx": np.float32(0.05), "zx": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=axis),
        helper.make_node(op, ["d" if rounded else "x", "f"], ["y"], name="layer"),
    ]
    graph = helper.make_graph(
        nodes if rounded else nodes[2:], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 5, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 6, None, None))],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto: onnx.ModelProto, level: object) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(9).standard_normal((1, 4, 5, 5)).astype(np.float32)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("op", ["ConvTranspose", "Conv"])
@pytest.mark.parametrize("top", [127, 7])
def test_the_numbers_stay_and_nothing_is_left_to_do_in_a_run(op, top, tmp_path) -> None:
    proto = network(op, top)
    before = run(proto, NONE)
    store_few_bits(proto)
    widen_stored_weights(proto.graph)
    onnx.checker.check_model(proto)
    assert np.array_equal(run(proto, NONE), before)
    onnx.save(proto, tmp_path / "m.onnx")
    (stored,) = read_onnx(tmp_path / "m.onnx").values()
    assert stored.bits == (8 if top == 127 else 4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options)
    left = onnx.load(tmp_path / "o.onnx").graph
    assert [n.op_type for n in left.node] == [op]


def test_a_weight_that_integers_multiply_is_left_to_the_runtime() -> None:
    proto = network("Conv", rounded=True)
    widen_stored_weights(proto.graph)
    assert [n.op_type for n in proto.graph.node].count("DequantizeLinear") == 2


def test_a_transposed_convolution_of_integers_is_widened_all_the_same() -> None:
    proto = network("ConvTranspose", rounded=True)
    before = run(proto, EVERY)
    widen_stored_weights(proto.graph)
    assert [n.op_type for n in proto.graph.node].count("DequantizeLinear") == 1
    assert np.array_equal(run(proto, EVERY), before)


def test_another_zero_point_stays_in_the_dequantiser() -> None:
    proto = network(zero=3)
    widen_stored_weights(proto.graph)
    assert "DequantizeLinear" in {n.op_type for n in proto.graph.node}
