"""Weights that are stored as integers and multiplied in float, widened when the file is loaded.

ONNX Runtime runs a DequantizeLinear anew in every run, because it may belong to an integer kernel.
A Cast and a multiplication give the same numbers, and are folded once, with all that follows from
constants alone (the order of a recurrent layer's gates, for one). The file keeps the integers.
"""

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sft.exporters.wiring import drop_unread_constants, names_in, readers_of, short_names

MULTIPLYING = ("Conv", "Gemm", "MatMul")  # those that have integer kernels
SIGNED = (TensorProto.INT8, TensorProto.INT4, getattr(TensorProto, "INT2", -1))


def widen_stored_weights(graph: onnx.GraphProto) -> None:
    """Replace the DequantizeLinear of each weight that no integer product reads. Changes `graph`.

    What it gives stays the same, bit for bit. One with a zero point other than 0 stays.
    """
    constants = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    names = short_names(names_in(graph))
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear"]:
        cast = makers.get(node.input[0])
        if cast is not None and (cast.op_type != "Cast" or len(readers[cast.output[0]]) > 1):
            continue
        weight = constants.get(node.input[0] if cast is None else cast.input[0])
        if weight is None or weight.data_type not in SIGNED or not _is_symmetric(node, constants):
            continue
        if not _is_read_by_integers(node.output[0], readers, makers):
            _widen(graph, node, weight, cast, (next(names), next(names)))
    drop_unread_constants(graph)


def _is_symmetric(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether the zero point is 0 and the scale is a constant, one for all or for an index."""
    if node.input[1] not in constants or len(constants[node.input[1]].dims) > 1:
        return False
    zero = node.input[2] if len(node.input) > 2 else ""
    return not zero or (zero in constants and not numpy_helper.to_array(constants[zero]).any())


def _is_read_by_integers(
    value: str, readers: dict[str, list[tuple[NodeProto, int]]], makers: dict[str, NodeProto]
) -> bool:
    """Whether an operator with an integer kernel multiplies it with a dequantised tensor."""
    for node, _ in readers.get(value, []):
        if node.op_type == "Transpose" and _is_read_by_integers(node.output[0], readers, makers):
            return True
        data = makers.get(node.input[0])
        dequantised = data is not None and data.op_type == "DequantizeLinear"
        if node.op_type in MULTIPLYING and dequantised:
            return True
    return False


def _widen(
    graph: onnx.GraphProto,
    node: NodeProto,
    weight: TensorProto,
    cast: NodeProto | None,
    names: tuple[str, str],
) -> None:
    scale_name, widened = names
    (scale,) = (numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[1])
    if scale.ndim:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [1] * len(weight.dims)
        shape[axis] = scale.size
        scale = scale.reshape(shape)
    graph.initializer.append(numpy_helper.from_array(scale, scale_name))
    if cast is None:
        cast = helper.make_node("Cast", [weight.name], [widened], to=TensorProto.FLOAT)
        graph.node.insert(0, cast)
    else:
        next(a for a in cast.attribute if a.name == "to").i = TensorProto.FLOAT
    node.CopyFrom(helper.make_node("Mul", [cast.output[0], scale_name], list(node.output)))
