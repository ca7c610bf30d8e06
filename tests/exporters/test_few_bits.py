"""Packed weights: the bytes against ONNX's own reader, the outputs against the 8-bit file."""

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper, version_converter

from sft.exporters import few_bits
from sft.exporters.few_bits import WIDTHS, Width, pack, raise_opset, store_few_bits
from sft.exporters.slimming import strip_metadata
from sft.runtimes.runner import Runner

INT4, INT2 = WIDTHS[1], WIDTHS[0]


@given(
    width=st.sampled_from(WIDTHS),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_onnx_reads_back_what_was_packed(width: Width, shape: list[int], seed: int) -> None:
    top = 2 ** (width.bits - 1)
    values = np.random.default_rng(seed).integers(-top, top, shape).astype(np.int8)
    raw = pack(values, width.bits)
    assert len(raw) == -(-values.size * width.bits // 8)
    kind = TensorProto.DataType.Value(width.type_name)
    tensor = TensorProto(dims=shape, data_type=kind, raw_data=raw)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)


def test_a_width_holds_its_range_and_no_more() -> None:
    assert INT4.holds(np.array([-8, 7], np.int8))
    assert not INT4.holds(np.array([8], np.int8))
    assert not INT4.holds(np.array([-9], np.int8))
    assert INT2.holds(np.array([-2, 1], np.int8))
    assert not INT2.holds(np.array([2], np.int8))
    assert not INT2.holds(np.zeros(0, np.int8))


def network(top: int, channels: int = 16) -> onnx.ModelProto:
    """Rounded input, convolution, pooling, linear layer, rounded output; weights in [-top, top]."""
    rng = np.random.default_rng(top)
    conv = rng.integers(-top, top + 1, (channels, 8, 3, 3)).astype(np.int8)
    linear = rng.integers(-top, top + 1, (channels, 5)).astype(np.int8)
    conv.flat[0] = linear.flat[0] = top
    arrays = {
        "conv": conv, "conv_scale": (rng.uniform(0.5, 1, channels) / top).astype(np.float32),
        "conv_zero": np.zeros(channels, np.int8), "bias": rng.normal(size=channels),
        "linear": linear, "linear_scale": np.float32(0.3 / top), "linear_zero": np.int8(0),
        "scale": np.float32(1 / 64), "zero": np.uint8(128),
    }  # fmt: skip
    arrays["bias"] = arrays["bias"].astype(np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "scale", "zero"], ["d0"]),
        helper.make_node("DequantizeLinear", ["conv", "conv_scale", "conv_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["d0", "w", "bias"], ["y"], name="conv", pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "scale", "zero"], ["d1"]),
        helper.make_node("Flatten", ["d1"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q3"]),
        helper.make_node("DequantizeLinear", ["q3", "scale", "zero"], ["d3"]),
        helper.make_node("DequantizeLinear", ["linear", "linear_scale", "linear_zero"], ["v"]),
        helper.make_node("MatMul", ["d3", "v"], ["out"], name="linear"),
        helper.make_node("QuantizeLinear", ["out", "scale", "zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "scale", "zero"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8, 1, 1))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 5))],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def types(proto: onnx.ModelProto) -> dict[str, str]:
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}


def run(proto: onnx.ModelProto, path) -> tuple[np.ndarray, dict[str, bool]]:
    """Outputs for fixed noise, and for each multiplying node whether it ran in integers."""
    onnx.save(proto, path)
    x = np.random.default_rng(1).normal(size=(20, 8, 1, 1)).astype(np.float32)
    with Runner(path, "onnxruntime") as runner:
        return runner.run(x), {k.op: k.integer for k in runner.place()}


@pytest.mark.parametrize(
    ("top", "stored", "opset"), [(7, "INT4", 21), (3, "INT4", 21), (1, "INT2", 25), (8, "INT8", 21)]
)
def test_packed_weights_run_in_integers_with_the_same_outputs(top, stored, opset, tmp_path) -> None:
    proto = network(top)
    before = run(proto, tmp_path / "before.onnx")
    size = proto.ByteSize()
    raise_opset(proto)
    strip_metadata(proto)
    store_few_bits(proto)
    onnx.checker.check_model(proto, full_check=True)
    after = run(proto, tmp_path / "after.onnx")
    assert np.array_equal(before[0], after[0])
    assert len(np.unique(before[0])) > 4
    assert before[1] == after[1] == {"QLinearConv": True, "QLinearMatMul": True}
    assert (types(proto)["conv"], proto.opset_import[0].version) == (stored, opset)
    numbers = 16 * 8 * 9
    saved = numbers - numbers * int(stored[3:]) // 8
    assert size - proto.ByteSize() == pytest.approx(saved, abs=200)
    assert types(proto)["conv_zero"] == "INT8"


def test_a_weight_too_small_to_gain_stays_in_8_bits() -> None:
    proto = network(7)
    size = len(proto.SerializeToString())
    for tensor in proto.graph.initializer:
        if tensor.name == "linear":
            values = numpy_helper.to_array(tensor)[:4]
            tensor.CopyFrom(numpy_helper.from_array(values, "linear"))
            size = len(proto.SerializeToString())
    store_few_bits(proto)
    assert types(proto)["linear"] == "INT8"
    assert types(proto)["conv"] == "INT4"
    assert len(proto.SerializeToString()) < size


@pytest.mark.parametrize("numbers", range(40, 80))
def test_packing_never_makes_the_file_larger(numbers: int) -> None:
    weight = numpy_helper.from_array(np.ones(numbers, np.int8), "w")
    scale = numpy_helper.from_array(np.float32(1), "s")
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (numbers,))
    graph = helper.make_graph([node], "g", [], [output], [weight, scale])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    before = proto.graph.ByteSize()
    whole = onnx.ModelProto.FromString(proto.SerializeToString())
    store_few_bits(proto)
    packed = types(proto)["w"] == "INT4"
    assert (proto.graph.ByteSize() < before) == packed
    assert packed or proto == whole
    assert packed == (numbers > 51)


def test_a_weight_that_something_else_reads_stays() -> None:
    proto = network(7)
    proto.graph.node.append(helper.make_node("Identity", ["conv"], ["conv_again"]))
    store_few_bits(proto)
    assert types(proto)["conv"] == "INT8"
    assert types(proto)["linear"] == "INT4"


def test_float_weights_stay() -> None:
    proto = network(7)
    for tensor in proto.graph.initializer:
        if tensor.name == "conv":
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, "conv"))
    store_few_bits(proto)
    assert types(proto)["conv"] == "FLOAT"


def test_one_cast_serves_all_readers(tmp_path) -> None:
    proto = network(7)
    nodes = [
        helper.make_node("DequantizeLinear", ["conv", "conv_scale", "conv_zero"], ["w2"], axis=0),
        helper.make_node("Conv", ["d0", "w2", "bias"], ["y2"], pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["y2", "scale", "zero"], ["q4"]),
    ]
    proto.graph.node.extend(nodes)
    proto.graph.output.append(helper.make_tensor_value_info("y2", TensorProto.FLOAT, (1, 16, 1, 1)))
    before = run(proto, tmp_path / "before.onnx")
    store_few_bits(proto)
    assert [n.op_type for n in proto.graph.node].count("Cast") == 2
    onnx.checker.check_model(proto, full_check=True)
    after = run(proto, tmp_path / "after.onnx")
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]


def test_an_older_runtime_gets_what_it_knows(monkeypatch) -> None:
    for version, stored in (("1.22.1", "INT8"), ("1.23.0", "INT4"), ("1.24.0.dev1", "INT2")):
        monkeypatch.setattr(few_bits.metadata, "version", lambda _, v=version: v)
        proto = network(1)
        raise_opset(proto)
        store_few_bits(proto)
        assert types(proto)["conv"] == stored


def test_four_bits_where_onnx_cannot_raise_the_operator_set(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise version_converter.ConvertError("no adapter")

    monkeypatch.setattr(version_converter, "convert_version", refuse)
    proto = network(1)
    raise_opset(proto)
    store_few_bits(proto)
    assert types(proto)["conv"] == "INT4"
    assert proto.opset_import[0].version == 21


def test_the_installed_runtime_is_among_the_known() -> None:
    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24)
    assert few_bits.known_widths() == WIDTHS
