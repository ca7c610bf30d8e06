"""Rectifiers that the rounding behind them makes superfluous.

QuantizeLinear saturates. Where the bounds of a Relu or Clip are rounded to the ends of the integer
range, saturation gives the same integers without it. One node less in the file, and a runtime
that does not fuse Clip then fuses the convolution before it (ReLU6 with outputs in [0, 6]).

Where the grid reaches further than the bounds (a rectifier that is joined with values of the other
sign, or a step that training widened), the integers are clipped instead: rounding first and then
clipping at the rounded bounds gives the same integers, and the convolution is fused as well.
"""

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sft.exporters.wiring import (
    Reader,
    drop_unread_constants,
    names_in,
    readers_of,
    short_names,
)

Constants = dict[str, TensorProto]
Bounds = tuple[float | None, float | None]
Integer = np.integer[Any]
Grid = tuple[np.float32, Integer]

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


def clip_integers(graph: onnx.GraphProto) -> None:
    """Move each Relu and Clip that only one rounding reads behind that rounding, as a Clip.

    The integers stay the same, bit for bit: rounding is monotone and its levels are the integers,
    so it can be exchanged with clipping at a bound that is rounded too. What comes from integers
    without any arithmetic is left alone. Changes `graph`.
    """
    constants = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    makers = {name: node for node in graph.node for name in node.output}
    names = short_names(names_in(graph))
    for node in list(graph.node):
        bounds = _bounds(node, constants)
        readers = readers_of(graph).get(node.output[0], [])
        if bounds is None or len(readers) != 1 or node.output[0] in outputs:
            continue
        maker = makers.get(node.input[0])
        grid = _grid_of(readers[0], constants)
        if grid is not None and maker is not None and maker.op_type != "DequantizeLinear":
            ends = [_level(b, e, grid) for b, e in zip(bounds, RANGES[grid[1].dtype], strict=True)]
            _exchange(graph, node, readers[0][0], (next(names), next(names), next(names)), ends)
    drop_unread_constants(graph)


def _exchange(
    graph: onnx.GraphProto,
    node: NodeProto,
    quantiser: NodeProto,
    names: tuple[str, str, str],
    ends: list[Integer],
) -> None:
    """From `x -> node -> quantiser -> y` to `x -> quantiser -> Clip between ends -> y`."""
    rounded, low, high = names
    graph.initializer.append(numpy_helper.from_array(np.asarray(ends[0]), low))
    graph.initializer.append(numpy_helper.from_array(np.asarray(ends[1]), high))
    clip = helper.make_node("Clip", [rounded, low, high], [quantiser.output[0]])
    quantiser.input[0], quantiser.output[0] = node.input[0], rounded
    graph.node.insert(list(graph.node).index(quantiser) + 1, clip)
    graph.node.remove(node)


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
    grid = _grid_of(reader, constants)
    if grid is None:
        return False
    ends = RANGES[grid[1].dtype]
    return all(_level(b, end, grid) == end for b, end in zip(bounds, ends, strict=True))


def _grid_of(reader: Reader, constants: Constants) -> Grid | None:
    """Scale and zero point of a rounding to 8 bits; None for any other reader."""
    node, index = reader
    if node.op_type != "QuantizeLinear" or index != 0 or len(node.input) < 3:
        return None
    if node.input[1] not in constants or node.input[2] not in constants:
        return None
    scale = numpy_helper.to_array(constants[node.input[1]])
    zero = numpy_helper.to_array(constants[node.input[2]])
    if scale.size != 1 or scale.dtype != np.float32 or zero.dtype not in RANGES:
        return None
    return np.float32(scale.item()), zero.dtype.type(zero.item())


def _level(bound: float | None, end: int, grid: Grid) -> Integer:
    """QuantizeLinear of a bound, in float32 and half to even as the operator does; or the end."""
    scale, zero = grid
    least, greatest = RANGES[zero.dtype]
    if bound is None:
        return zero.dtype.type(end)
    with np.errstate(over="ignore"):
        scaled = float(np.rint(np.float32(bound) / scale))
    level: Integer = zero.dtype.type(int(min(max(scaled + int(zero), least), greatest)))
    return level


def _scalar(tensor: TensorProto) -> float:
    return float(numpy_helper.to_array(tensor).item())
