"""What a file says of its own weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sft
from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.exporters import Storage, export, mean_bits, storage_of
from sft.exporters.storage import read_onnx
from sft.verification.placement import integer_fraction, place

TARGET = "onnxruntime-avx2"


def planned(net: nn.Module, data: Data, target: str, bits: dict[str, int]) -> Plan:
    """Every layer dense, in the bits that are given for it."""
    seen = sft.inspect(net, data.example())
    rows = tuple(
        PlanRow(r.name, Option("dense", (), bits[r.name]), None, Cost(r.params, r.macs, 0), "")
        for r in seen.layers
    )
    whole = Cost(seen.params, seen.macs, 0)
    shape = seen.input_shape
    return Plan("net", target, {}, rows, whole, whole, "edited", 0.0, 0.0, 0.0, shape)


@pytest.fixture
def few(net, data):
    plan = planned(net, data, TARGET, {"stem": 8, "body": 2, "down": 3, "fc": 8})
    return sft.quantize(sft.apply(net, plan), plan, TARGET, data.calibration)


def test_few_bits_are_stored_in_few_and_computed_in_eight(few, tmp_path) -> None:
    artifact = export(few, few.plan, tmp_path / "m.onnx", TARGET)
    stored = storage_of(artifact)
    assert {name: s.bits for name, s in stored.items()} == {
        "stem.weight": 8, "body.weight": 2, "down.weight": 4, "fc.weight": 8,
    }  # fmt: skip
    assert stored["body.weight"] == Storage((16, 16, 3, 3), 2, 16 * 16 * 9 // 4)
    numbers = {"stem": 144, "body": 2304, "down": 4608, "fc": 128}
    mean = (8 * 144 + 2 * 2304 + 4 * 4608 + 8 * 128) / sum(numbers.values())
    assert mean_bits(stored) == pytest.approx(mean, rel=1e-12)
    assert integer_fraction(place(artifact)) > 0.99


def test_the_packed_integers_are_the_trained_ones(few, tmp_path) -> None:
    export(few, few.plan, tmp_path / "m.onnx", TARGET)
    stored = [
        numpy_helper.to_array(t).astype(np.int8)
        for t in onnx.load(tmp_path / "m.onnx").graph.initializer
        if t.data_type in (TensorProto.INT8, TensorProto.INT4, TensorProto.INT2)
    ]
    for weight, rounding in few.weights().values():
        integers = rounding.integers(weight.detach()).numpy()
        assert any(np.array_equal(s, integers) or np.array_equal(s.T, integers) for s in stored)


def test_float_weights_take_32_bits(net, data, tmp_path) -> None:
    artifact = export(net, None, tmp_path / "f.onnx", TARGET, example=data.example())
    stored = storage_of(artifact)
    assert mean_bits(stored) == 32.0
    assert sum(s.numbers for s in stored.values()) == 144 + 2304 + 4608 + 128
    assert sum(s.bytes for s in stored.values()) == 4 * (144 + 2304 + 4608 + 128)


def test_a_bias_names_its_weight_and_no_two_weights_share_a_name(tmp_path) -> None:
    arrays = {n: np.ones((2, 2), np.float32) for n in ("p", "q")} | {
        "l.bias": np.ones(2, np.float32)
    }
    nodes = [
        helper.make_node("Gemm", ["x", "p", "l.bias"], ["y"]),
        helper.make_node("Gemm", ["y", "q", "l.bias"], ["z"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "m.onnx"
    )
    assert list(read_onnx(tmp_path / "m.onnx")) == ["l.weight", "q"]


def test_no_weights_and_no_file(tmp_path) -> None:
    assert mean_bits({}) == 0.0
    with pytest.raises(InputError, match=r"gone\.onnx"):
        read_onnx(tmp_path / "gone.onnx")
    for content in (b"", b"\xff" * 40):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(InputError, match="not an ONNX file"):
            read_onnx(tmp_path / "bad.onnx")


def test_relu_is_not_in_an_integer_file(few, tmp_path) -> None:
    export(few, few.plan, tmp_path / "m.onnx", TARGET)
    assert "Relu" not in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
