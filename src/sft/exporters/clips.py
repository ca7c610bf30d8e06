"""Rectifiers that the rounding behind them makes superfluous.

QuantizeLinear saturates. Where the bounds of a Relu or Clip are rounded to the ends of the integer
range, saturation gives the same integers without it. One node less in the file, and a runtime
that does not fuse Clip then fuses the convolution before it (ReLU6 with outputs in [0, 6]).
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from sft.exporters.wiring import Reader, drop_unread_constants, readers_of

Constants = dict[str, TensorProto]
Bounds = tuple[float | None, float | None]

RANGES = {np.dtype(t): (np.iinfo(t).min, np.iinfo(t).max) for t in ("uint8", "int8")}


def drop_redundant_clips(graph: onnx.GraphProto) -> None:
    """Remove each Relu and Clip that is read by nothing but roundings which saturate as it does.

    The integers stay the same, bit for bit: rounding is monotone, so a value beyond a bound gives
    what the bound gives, and that is the end of the integer range. Changes `graph`.
    """
    constants = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    for node in list(graph.node):
        bounds = _bounds(node, constants)
        if bounds is None or node.output[0] in outputs:
            continue
        readers = readers_of(graph).get(node.output[0], [])
        if readers and all(_saturates_alike(r, bounds, constants) for r in readers):
            for reader, index in readers:
                reader.input[index] = node.input[0]
            graph.node.remove(node)
    drop_unread_constants(graph)


def _bounds(node: NodeProto, constants: Constants) -> Bounds | None:
    """Least and greatest value of a rectifier's output; None for any other node."""
    if node.op_type == "Relu":
        return 0.0, None
    if node.op_type != "Clip" or any(name and name not in constants for name in node.input[1:]):
        return None
    names = [*node.input[1:], "", ""][:2]
    low, high = (_scalar(constants[name]) if name else None for name in names)
    return low, high


def _saturates_alike(reader: Reader, bounds: Bounds, constants: Constants) -> bool:
    node, index = reader
    if node.op_type != "QuantizeLinear" or index != 0 or len(node.input) < 3:
        return False
    if node.input[1] not in constants or node.input[2] not in constants:
        return False
    scale = numpy_helper.to_array(constants[node.input[1]])
    zero = numpy_helper.to_array(constants[node.input[2]])
    if scale.size != 1 or scale.dtype != np.float32 or zero.dtype not in RANGES:
        return False
    ends = RANGES[zero.dtype]
    return all(
        bound is None or _round(bound, scale.item(), zero.item(), ends) == end
        for bound, end in zip(bounds, ends, strict=True)
    )


def _round(value: float, scale: float, zero: int, ends: tuple[int, int]) -> int:
    """QuantizeLinear of one value, in float32 and half to even as the operator does."""
    with np.errstate(over="ignore"):
        scaled = float(np.rint(np.float32(value) / np.float32(scale)))
    return int(min(max(scaled + zero, ends[0]), ends[1]))


def _scalar(tensor: TensorProto) -> float:
    return float(numpy_helper.to_array(tensor).item())
