"""Float layers among integers, kept from being rounded by the runtime.

ONNX Runtime 1.32 takes a float convolution or Gemm that stands between DequantizeLinear and
QuantizeLinear, rounds its weight to 8 bits, one scale for the whole tensor, and multiplies in
integers. A layer that a plan keeps in float would then lose what it was kept for. An identity
that the runtime does not see through, a LeakyRelu of slope 1, stands behind such a layer; it is
fused into the float kernel and costs nothing.
"""

import onnx
from onnx import helper

from sft.exporters.wiring import names_in, readers_of, short_names

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm")
ROUNDING = ("QuantizeLinear", "Relu", "Clip")


def keep_floats(graph: onnx.GraphProto) -> None:
    """Put the identity behind each float layer that stands among integers. Changes `graph`.

    What the file computes stays the same, bit for bit.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    names = short_names(names_in(graph))
    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type not in MULTIPLYING or not _is_among_integers(node, makers):
            continue
        read_by = [reader for reader, _ in readers.get(node.output[0], [])]
        if not any(reader.op_type in ROUNDING for reader in read_by):
            continue
        given, raw = node.output[0], next(names)
        node.output[0] = raw
        graph.node.insert(place + 1, helper.make_node("LeakyRelu", [raw], [given], alpha=1.0))


def _is_among_integers(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it reads dequantised activations, but a weight that is no integer."""
    data, weight = makers.get(node.input[0]), makers.get(node.input[1])
    if data is None or data.op_type != "DequantizeLinear":
        return False
    return weight is None or weight.op_type != "DequantizeLinear"
