"""What no runtime reads, left out: it dominates small files.

The zero points of weights stay, though all of them are zero: without one ONNX Runtime 1.32 runs a
linear layer in float, and 1.23 to 1.27 fail on it. They are shared, so a file holds one a width.
"""

from collections.abc import Collection

import onnx
from onnx import AttributeProto, defs, helper

from sft.exporters.wiring import short_names, walk

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes and the shapes of values inside the graph. Changes `proto`."""
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def drop_default_attributes(proto: onnx.ModelProto) -> None:
    """Drop attributes of ONNX's own operators that say what the operator assumes anyway."""
    opset = {o.domain: o.version for o in proto.opset_import}.get("", 0)
    for node in walk(proto.graph):
        if node.domain or not defs.has(node.op_type):
            continue
        assumed = defs.get_schema(node.op_type, opset).attributes
        kept = [a for a in node.attribute if not _is_default(a, assumed)]
        del node.attribute[:]
        node.attribute.extend(kept)


def shorten_names(graph: onnx.GraphProto, kept: Collection[str]) -> None:
    """Rename values to a, b, c, ...; only nodes that multiply keep their names. Changes `graph`.

    kept : names that stay, those of the network's parameters. Inputs and outputs stay as well, and
        all names of a graph that has others inside (loops, branches).
    """
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return
    stay = {v.name for v in (*graph.input, *graph.output)} | set(kept) | {""}
    fresh = short_names(stay)
    values = [t.name for t in graph.initializer] + [o for n in graph.node for o in n.output]
    renamed = {name: next(fresh) for name in values if name not in stay}
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        node.name = node.name if node.op_type in MULTIPLYING else ""
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]


def _is_default(attribute: AttributeProto, assumed: dict[str, defs.OpSchema.Attribute]) -> bool:
    known = assumed.get(attribute.name)
    if known is None or known.required or known.default_value.type != attribute.type:
        return False
    stored = helper.get_attribute_value(attribute)
    return bool(stored == helper.get_attribute_value(known.default_value))
