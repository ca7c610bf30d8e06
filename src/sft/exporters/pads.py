"""Zeros around a quantised image, written by the convolution behind them, or as integers.

ONNX Runtime pads in float, between a dequantiser and a quantiser. Zero is exact in every grid and
both ends of a Pad have one grid, so that the integers behind it follow from those before it.
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from sft.exporters.wiring import drop_unread_constants, readers_of

Constants = dict[str, npt.NDArray[np.generic]]


def keep_pads_in_integers(graph: onnx.GraphProto) -> None:
    """Fold each zero Pad between integers into the convolutions behind it, or pad the integers.

    A Pad that only convolutions read disappears: their `pads` grow, and need not be the same on
    both sides. Any other is moved before its dequantiser and writes the zero point. The integers
    stay the same, bit for bit. Changes `graph`.
    """
    for pad in [n for n in graph.node if n.op_type == "Pad"]:
        constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        source = makers.get(pad.input[0])
        ends = _zero_ends(pad, constants)
        quantisers = [node for node, _ in readers_of(graph).get(pad.output[0], [])]
        if source is None or ends is None or not quantisers:
            continue
        if all(_has_grid_of(source, q, constants) for q in quantisers):
            _move(graph, pad, source, quantisers, ends)
    drop_unread_constants(graph)


def _zero_ends(pad: NodeProto, constants: Constants) -> list[int] | None:
    """Zeros before every axis, then behind every axis; None where the Pad does anything else."""
    inputs = [*pad.input, "", "", ""][:4]
    modes = [a.s for a in pad.attribute if a.name == "mode"]
    if modes not in ([], [b"constant"]) or inputs[3] or inputs[1] not in constants:
        return None
    if inputs[2] and (inputs[2] not in constants or constants[inputs[2]].any()):
        return None
    ends = [int(e) for e in constants[inputs[1]].tolist()]
    return ends if min(ends) >= 0 else None


def _has_grid_of(source: NodeProto, quantiser: NodeProto, constants: Constants) -> bool:
    """Whether one dequantises, the other quantises, with one scale and one zero point."""
    if (source.op_type, quantiser.op_type) != ("DequantizeLinear", "QuantizeLinear"):
        return False
    names = (*source.input[1:3], *quantiser.input[1:3])
    if len(names) != 4 or any(name not in constants for name in names):
        return False
    scale, zero, other_scale, other_zero = (constants[name] for name in names)
    return bool(
        scale.size == 1
        and zero.dtype == other_zero.dtype
        and np.array_equal(scale, other_scale)
        and np.array_equal(zero, other_zero)
    )


def _move(
    graph: onnx.GraphProto,
    pad: NodeProto,
    source: NodeProto,
    quantisers: list[NodeProto],
    ends: list[int],
) -> None:
    """Into the convolutions behind the Pad if they are all that reads it, else onto integers."""
    readers, outputs = readers_of(graph), {o.name for o in graph.output}
    dequantisers = [node for q in quantisers for node, _ in readers.get(q.output[0], [])]
    users = [user for d in dequantisers for user in readers.get(d.output[0], [])]
    seen = any({*n.output} & outputs for n in (*quantisers, *dequantisers))
    if users and not seen and all(_can_take(node, place, ends) for node, place in users):
        for node, place in users:
            node.input[place] = source.output[0]
            _grow(node, ends)
        for node in (pad, *quantisers, *dequantisers):
            graph.node.remove(node)
        return
    first, *others = quantisers
    pad.input[:] = [source.input[0], pad.input[1], source.input[2]]
    pad.output[:] = first.output
    for other in others:
        for node, place in readers.get(other.output[0], []):
            node.input[place] = first.output[0]
    for node in quantisers:
        graph.node.remove(node)
    if source.output[0] not in outputs and not readers_of(graph).get(source.output[0]):
        graph.node.remove(source)


def _can_take(node: NodeProto, place: int, ends: list[int]) -> bool:
    """Whether a node is a convolution of this input whose own padding can grow by these zeros."""
    axes = len(ends) // 2
    images_only = not any((*ends[:2], *ends[axes : axes + 2]))
    plain = all(a.s in (b"", b"NOTSET") for a in node.attribute if a.name == "auto_pad")
    return node.op_type == "Conv" and place == 0 and images_only and plain


def _grow(conv: NodeProto, ends: list[int]) -> None:
    axes = len(ends) // 2
    more = [*ends[2:axes], *ends[axes + 2 :]]
    for attribute in conv.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [a + b for a, b in zip(attribute.ints, more, strict=True)]
            return
    conv.attribute.append(helper.make_attribute("pads", more))
