"""Stored bytes, against the tensors of the exported file."""

import math
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.records import DENSE, KEEP, STORED, Option, Plan, Profile
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.profiling.cost import cost_of, stored_bytes
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply

TARGET = find_target("onnxruntime-avx2")
BITS = {
    TensorProto.FLOAT: 32, TensorProto.INT32: 32, TensorProto.INT8: 8, TensorProto.INT4: 4,
    TensorProto.INT2: 2,
}  # fmt: skip
MULTIPLYING = ("Conv", "Gemm", "MatMul")
QUICK = {
    "ranges": "minmax", "weight_ranges": "minmax", "rounding": "nearest",
    "correct_bias": False, "refit": False, "spare_sensitive": False,
}  # fmt: skip


def bytes_in(path: Path) -> int:
    """Bytes of the weights that the file's operators multiply by, their scales, and biases.

    Left out, as in `stored_bytes`: the unit of a bias that is an integer (see `exporters.biases`).
    """
    graph = onnx.load(path).graph
    tensors = {t.name: t for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    wanted: list[str] = []

    def follow(name: str) -> None:
        if name in tensors:
            wanted.append(name)
            return
        node = made_by[name]
        assert node.op_type in ("DequantizeLinear", "Cast", "Mul", "Transpose", "Reshape")
        follow(node.input[0])
        source = tensors.get(node.input[0])
        of_bias = source is not None and source.data_type == TensorProto.INT32
        if node.op_type in ("DequantizeLinear", "Mul") and not of_bias:
            follow(node.input[1])

    for node in graph.node:
        if node.op_type in MULTIPLYING:
            for name in node.input[1:]:
                follow(name)
            assert len(node.input) <= 3
    assert len(wanted) == len(set(wanted))
    return sum(
        math.ceil(math.prod(tensors[n].dims) * BITS[tensors[n].data_type] / 8) for n in wanted
    )


def exported(profile: Profile, net, data, options: dict[str, Option], path: Path) -> Plan:
    plan = make_plan(profile, Budget(), overrides=options)
    assert {row.name: row.option for row in plan.rows} == options
    rounded = quantize(apply(net, plan), plan, TARGET, [data.example()], **QUICK)
    export(rounded, plan, path, TARGET.name)
    return plan


def stored(profile: Profile, options: dict[str, Option]) -> int:
    return sum(stored_bytes(e.layer, options[e.layer.name], TARGET) for e in profile.layers)


@pytest.mark.parametrize("seed", range(4))
def test_stored_bytes_are_those_of_the_file(profiled, net, data, tmp_path, seed: int) -> None:
    chance = random.Random(seed)
    options = {}
    for entry in profiled.layers:
        kinds = sorted({c.option.scheme for c in entry.candidates})
        scheme = chance.choice(kinds)
        of_it = [c.option for c in entry.candidates if c.option.scheme == scheme]
        options[entry.layer.name] = chance.choice(of_it)
    exported(profiled, net, data, options, tmp_path / "m.onnx")
    assert bytes_in(tmp_path / "m.onnx") == stored(profiled, options)


def test_every_kind_of_option_in_one_file(profiled, net, data, tmp_path) -> None:
    options = {
        "stem": Option(DENSE, (), 4), "body": Option("channel_in", (6,), 2),
        "down": Option(STORED, (), 8), "fc": Option(KEEP),
    }  # fmt: skip
    plan = exported(profiled, net, data, options, tmp_path / "m.onnx")
    by_hand = {
        "stem": 144 // 2 + 16 * 4 + 16 * 4,
        "body": 16 * 6 // 4 + 6 * 4 + 16 * 6 * 9 // 4 + 16 * 4 + 16 * 4,
        "down": 32 * 16 * 9 + 32 * 4 + 32 * 4,
        "fc": 4 * (4 * 32 + 4),
    }
    for entry in profiled.layers:
        name = entry.layer.name
        assert stored_bytes(entry.layer, options[name], TARGET) == by_hand[name]
    assert bytes_in(tmp_path / "m.onnx") == sum(by_hand.values())
    # A node for each factor in integers is counted besides: one of `stem`, `down`; two of `body`.
    assert plan.cost.size == sum(by_hand.values()) + 4 * TARGET.layer_bytes
    file_bytes = (tmp_path / "m.onnx").stat().st_size
    assert abs(file_bytes - plan.cost.size) < 0.25 * file_bytes


def test_widths_that_no_file_holds_take_the_next_wider(profiled) -> None:
    (layer,) = [e.layer for e in profiled.layers if e.layer.name == "body"]
    sizes = [stored_bytes(layer, Option(DENSE, (), bits), TARGET) for bits in range(2, 9)]
    weights = np.array([2, 4, 4, 8, 8, 8, 8]) * 16 * 16 * 9 // 8
    assert sizes == [int(w) + 4 * 16 + 4 * 16 for w in weights]


def test_integers_count_what_stands_around_them(profiled) -> None:
    for entry in profiled.layers:
        for c in entry.candidates:
            parts = 1 + bool(c.option.rank)
            around = 0 if c.option.scheme == KEEP else TARGET.layer_bytes * parts
            own = cost_of(entry.layer, c.option, TARGET)
            assert own.size == stored_bytes(entry.layer, c.option, TARGET) + around
            assert own.size == c.cost.size
            assert (own.latency, own.memory) == (None, 0)
