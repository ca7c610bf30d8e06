"""What a file's weighted operators give, read from a copy that has it as its output.

ONNX Runtime optimises the copy as it does the file: what is added only reads what quantisers give.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sft.core.files import read_bytes
from sft.runtimes.adapter import Array
from sft.runtimes.runner import Runner

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PASSED = ("Transpose", "DequantizeLinear", "Cast", "Mul", "Unsqueeze")
ALONE = ("Relu", "Clip")  # between an operator and its quantiser


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value behind a weighted operator; `scale` is None for one that stays float."""

    value: str
    scale: float | None
    zero: int


def find_taps(graph: onnx.GraphProto) -> list[Tap]:
    """The quantised (or float) value behind each weighted operator, in the file's order."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {t.name: t for t in graph.initializer}
    return [
        _tap(node, readers, constants)
        for node in graph.node
        if node.op_type in WEIGHTED and _has_weight(node, makers, constants)
    ]


def read_taps(path: str | Path, runtime: str, x: Array) -> list[Array]:
    """For each tap the values ``(N, numbers)`` that the file gives for samples x ``(N, ...)``."""
    proto = onnx.ModelProto()
    proto.ParseFromString(read_bytes(Path(path)))
    taps = find_taps(proto.graph)
    _let_out(proto, taps)
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        copy = Path(folder) / "taps.onnx"
        copy.write_bytes(proto.SerializeToString())
        with Runner(copy, runtime) as runner:
            together = runner.run(x)
    count = len(taps)
    sizes = together[0, :count].astype(np.int64)
    parts = np.split(together[:, count:], np.cumsum(sizes)[:-1], axis=1)
    return [_value(part, tap) for part, tap in zip(parts, taps, strict=True)]


def _let_out(proto: onnx.ModelProto, taps: Sequence[Tap]) -> None:
    """Make the sizes of all taps and then their values the only output, a row of floats."""
    graph = proto.graph
    row = numpy_helper.from_array(np.array([1, -1], np.int64), "tap row")
    graph.initializer.append(row)
    sizes, values = [], []
    for index, tap in enumerate(taps):
        names = [f"tap {index} {what}" for what in ("float", "row", "size", "count", "counted")]
        graph.node.extend(
            [
                helper.make_node("Cast", [tap.value], [names[0]], to=TensorProto.FLOAT),
                helper.make_node("Reshape", [names[0], "tap row"], [names[1]]),
                helper.make_node("Size", [tap.value], [names[2]]),
                helper.make_node("Cast", [names[2]], [names[3]], to=TensorProto.FLOAT),
                helper.make_node("Reshape", [names[3], "tap row"], [names[4]]),
            ]
        )
        values.append(names[1])
        sizes.append(names[4])
    graph.node.append(helper.make_node("Concat", [*sizes, *values], ["taps"], axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("taps", TensorProto.FLOAT, (1, None)))


def _tap(
    node: NodeProto, readers: Mapping[str, list[NodeProto]], constants: Mapping[str, TensorProto]
) -> Tap:
    value = node.output[0]
    behind = readers.get(value, [])
    if node.op_type == "MatMul" and [n.op_type for n in behind] == ["Add"]:
        value = behind[0].output[0]
        behind = readers.get(value, [])
    plain = value
    while len(behind) == 1 and behind[0].op_type in ALONE:
        value = behind[0].output[0]
        behind = readers.get(value, [])
    if len(behind) != 1 or behind[0].op_type != "QuantizeLinear":
        return Tap(plain, None, 0)
    scale, zero = (numpy_helper.to_array(constants[name]) for name in behind[0].input[1:3])
    value = behind[0].output[0]
    after = readers.get(value, [])
    if [n.op_type for n in after] == ["Clip"]:
        value = after[0].output[0]
    return Tap(value, float(scale.item()), int(zero.item()))


def _has_weight(
    node: NodeProto, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]
) -> bool:
    name = node.input[1]
    while name in makers and makers[name].op_type in PASSED:
        name = makers[name].input[0]
    return name in constants


def _value(part: npt.NDArray[np.float32], tap: Tap) -> Array:
    if tap.scale is None:
        return part
    values: Array = (part - np.float32(tap.zero)) * np.float32(tap.scale)
    return values


__all__ = ["Tap", "find_taps", "read_taps"]
