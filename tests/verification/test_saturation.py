"""Files for processors without VNNI hold no weights that their 16-bit sums could cut off."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import sft.verification.saturation as saturation
from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.profiling.profile import profile
from sft.surgery.apply import apply
from sft.training.finetune import finetune
from sft.verification.parity import verify
from sft.verification.saturation import saturating_pairs, saturation_failures

SAFE, FULL = "onnxruntime-avx2", "onnxruntime-vnni"


def rounded_for(net, data, target: str):
    plan = make_plan(profile(net, data, target), Budget())
    return quantize(apply(net, plan), plan, target, data.calibration)


def test_a_safe_file_has_no_such_pair_and_a_full_one_has(net, data, tmp_path) -> None:
    safe, full = rounded_for(net, data, SAFE), rounded_for(net, data, FULL)
    assert saturating_pairs(export(safe, safe.plan, tmp_path / "s.onnx", SAFE).path) == {}
    assert saturating_pairs(export(full, full.plan, tmp_path / "f.onnx", FULL).path)


def test_training_leaves_a_safe_file_safe(net, data, tmp_path) -> None:
    safe = rounded_for(net, data, SAFE)
    tuned = finetune(safe, data.train, net, steps=8, learning_rate=3e-3)
    artifact = export(tuned, tuned.plan, tmp_path / "t.onnx", SAFE)
    assert saturating_pairs(artifact.path) == {}


def test_verify_fails_only_where_the_processor_would_saturate(
    net, data, tmp_path, monkeypatch
) -> None:
    full = rounded_for(net, data, FULL)
    artifact = export(full, full.plan, tmp_path / "f.onnx", FULL)
    monkeypatch.setattr(saturation, "instruction_set", lambda: "vnni")
    assert saturation_failures(artifact) == []
    monkeypatch.setattr(saturation, "instruction_set", lambda: "avx2")
    check = verify(artifact, net, data.test, simulation=full)
    assert not check.passed
    assert "has no VNNI" in check.failures[-1]
    assert saturation_failures(dataclasses.replace(artifact, integers=False)) == []


def file_of(tmp_path, weight: np.ndarray, op: str = "Conv", kind: type = np.uint8, **more):
    """One layer with rounded input and weight."""
    shape = {"Conv": (1, None, None, None), "Gemm": (1, None), "MatMul": (1, None)}[op]
    arrays = {"s": np.float32(0.1), "z": kind(9), "w": weight, "zw": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["dw"]),
        helper.make_node(op, ["d", "dw"], ["y"], name="layer", **more),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "one.onnx")
    return tmp_path / "one.onnx"


def brute_force(rows: np.ndarray) -> int:
    count = 0
    for row in rows.astype(int):
        for a, b in zip(row[::2], row[1::2], strict=False):
            low, high = min(0, 255 * a) + min(0, 255 * b), max(0, 255 * a) + max(0, 255 * b)
            count += low < -(2**15) or high > 2**15 - 1
    return count


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 3, 3, 3), (16, 4, 3, 1)])
def test_pairs_are_counted_tap_by_tap(shape, tmp_path) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    wanted = brute_force(rows)
    assert wanted != brute_force(weight.reshape(len(weight), -1)) or shape[2:] == (1, 1)
    assert saturating_pairs(file_of(tmp_path, weight)) == {"layer": wanted}


@pytest.mark.parametrize(("op", "turned"), [("Gemm", True), ("Gemm", False), ("MatMul", False)])
def test_products_pair_along_what_they_sum(op, turned, tmp_path) -> None:
    weight = np.random.default_rng(1).integers(-127, 128, (8, 14)).astype(np.int8)
    more = {"transB": 1} if turned else {}
    wanted = brute_force(weight if turned else weight.T)
    assert saturating_pairs(file_of(tmp_path, weight, op, **more)) == {"layer": wanted}


def test_depthwise_kernels_and_signed_activations_do_not_count(tmp_path) -> None:
    weight = np.full((8, 1, 3, 3), 127, np.int8)
    assert saturating_pairs(file_of(tmp_path, weight, group=8)) == {}
    assert saturating_pairs(file_of(tmp_path, weight))
    assert saturating_pairs(file_of(tmp_path, weight, kind=np.int8)) == {}


def test_a_float_file_has_none(net, data, tmp_path) -> None:
    written = export(net, None, tmp_path / "f.onnx", SAFE, example=torch.zeros(1, 1, 12, 12))
    assert saturating_pairs(written.path) == {}
