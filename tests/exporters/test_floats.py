"""A float layer among integers multiplies floats in the runtime, whatever its optimiser likes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sft.exporters.floats import keep_floats
from sft.runtimes.onnxruntime import OnnxRuntime

LEVELS = onnxruntime.GraphOptimizationLevel
RANDOM = np.random.default_rng(0)


def network(op: str, rectified: bool, rounded: bool = True) -> onnx.ModelProto:
    """Rounded input, a float layer whose rows differ a hundredfold, and a rounding behind it."""
    shape = (1, 8) if op == "Gemm" else (1, 8, 6, 6)
    sides = {"Conv": (8, 8, 3, 3), "ConvTranspose": (8, 8, 3, 3), "Gemm": (8, 8)}[op]
    weight = RANDOM.standard_normal(sides) * np.logspace(0, -2, 8).reshape(
        (1, -1, 1, 1) if op == "ConvTranspose" else (-1, 1, 1, 1) if op == "Conv" else (1, -1)
    )
    arrays = {
        "w": weight.astype(np.float32),
        "s": np.float32(0.03), "z": np.uint8(128), "t": np.float32(0.0005), "u": np.uint8(0),
        "b": np.zeros(8, np.float32),
    }  # fmt: skip
    kind = {} if op == "Gemm" else {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "s", "z"], ["d0"]),
        helper.make_node(op, ["d0", "w", "b"], ["y"], **kind),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("QuantizeLinear", ["r" if rectified else "y", "t", "u"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "t", "u"], ["out"]),
    ]
    if not rectified:
        del nodes[3]
    if not rounded:
        nodes = [*nodes[:3], helper.make_node("Identity", ["y"], ["out"])]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto: onnx.ModelProto, level: object) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    x = np.random.default_rng(1).standard_normal(given.shape).astype(np.float32)
    return session.run(None, {given.name: x})[0]


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm"])
def test_a_float_layer_stays_float(op, rectified, tmp_path) -> None:
    proto = network(op, rectified)
    plain = run(proto, LEVELS.ORT_DISABLE_ALL)
    keep_floats(proto.graph)
    onnx.checker.check_model(proto)
    assert np.array_equal(run(proto, LEVELS.ORT_DISABLE_ALL), plain)
    step = 0.0005
    assert np.abs(run(proto, LEVELS.ORT_ENABLE_ALL) - plain).max() <= step * 1.01
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    adapter = OnnxRuntime(str(path), 1)
    x = np.zeros(adapter.inputs[0].shape, np.float32)
    assert [k.integer for k in adapter.place(x, str(tmp_path))] == [False]


def test_without_it_the_runtime_rounds_the_weight(tmp_path) -> None:
    """The reason for the pass: when this fails, the runtime has changed and the pass may go."""
    proto = network("Conv", False)
    plain, fast = run(proto, LEVELS.ORT_DISABLE_ALL), run(proto, LEVELS.ORT_ENABLE_ALL)
    assert np.abs(fast - plain).max() > 0.0005 * 1.5


def test_layers_that_no_rounding_follows_are_left_alone() -> None:
    proto = network("Conv", False, rounded=False)
    before = proto.SerializeToString()
    keep_floats(proto.graph)
    assert proto.SerializeToString() == before
