"""Biases as integers where the output stays float, so that the product still runs in integers.

ONNX Runtime rounds the bias of a layer itself where the layer's output is quantised. Where it stays
float (logits, for one) the bias stays float, and with it the whole layer. There the file holds the
bias as int32 in units of `scale of the input * scale of the weight`, with zero point 0: the units
in which an integer product adds up.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from sft.exporters.wiring import drop_unread_constants, names_in, readers_of, short_names

LARGEST = 2**31 - 1
GREATEST_PRODUCT = 255 * 128
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class _Bias:
    """A float bias ``(O,)``: its name, and the node that adds it, as which input."""

    name: str
    values: Floats
    adder: NodeProto
    place: int


def round_biases(graph: onnx.GraphProto) -> None:
    """Round the bias of every product with dequantised factors and a float output.

    A product is a Gemm, or a MatMul with its Add; its output moves by half a unit at most. A bias
    stays float where its sum with the products could leave 32 bits, or where a unit is denormal.
    Changes `graph`.
    """
    surroundings = _Surroundings(graph)
    found: list[tuple[_Bias, Integers, Floats]] = []
    for product in graph.node:
        bias, unit = surroundings.bias_of(product), surroundings.unit_of(product)
        if bias is not None and unit is not None:
            integers = _integers(bias.values, unit, surroundings.depth_of(product))
            if integers is not None:
                found.append((bias, integers, unit))
    names = short_names(names_in(graph))
    for bias, integers, unit in found:
        _replace(graph, bias, integers, unit, (next(names), next(names), next(names)))


class _Surroundings:
    """What stands before and behind the nodes of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {t.name: t for t in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = readers_of(graph)

    def bias_of(self, product: NodeProto) -> _Bias | None:
        """The float bias of a Gemm or MatMul whose output is not quantised; else None."""
        found = self._adder(product)
        if found is None:
            return None
        adder, place = found
        behind = self.readers.get(adder.output[0], [])
        if behind and all(node.op_type == "QuantizeLinear" for node, _ in behind):
            return None
        values = self._constant(adder.input[place])
        if values is None or values.dtype != np.float32 or values.ndim != 1:
            return None
        return _Bias(adder.input[place], values, adder, place)

    def unit_of(self, product: NodeProto) -> Floats | None:
        """Scale of the input times scales of the weight, ``()`` or ``(O,)``; None for floats."""
        found = [self._scale(name) for name in product.input[:2]]
        scales = [scale for scale in found if scale is not None]
        if len(scales) < 2 or scales[0].size != 1 or scales[1].ndim > 1:
            return None
        data, weight = scales
        unit = np.asarray(data.reshape(()) * weight, np.float32)
        return unit if unit.min() >= np.finfo(np.float32).tiny else None

    def depth_of(self, product: NodeProto) -> int:
        """How many products make an output, at most: the longest side of the weight."""
        weight = self._dequantizer(product.input[1])
        tensor = None if weight is None else self.constants.get(weight.input[0])
        return LARGEST if tensor is None else max(tensor.dims)

    def _adder(self, product: NodeProto) -> tuple[NodeProto, int] | None:
        """The node that adds a product's bias, and as which input."""
        if product.op_type == "Gemm" and len(product.input) == 3:
            factors = [a.f for a in product.attribute if a.name in ("alpha", "beta")]
            return (product, 2) if all(f == 1.0 for f in factors) else None
        readers = self.readers.get(product.output[0], []) if product.output else []
        if product.op_type != "MatMul" or [n.op_type for n, _ in readers] != ["Add"]:
            return None
        return readers[0][0], 1 - readers[0][1]

    def _dequantizer(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that a value comes from, through a transposition."""
        node = self.makers.get(name)
        while node is not None and node.op_type == "Transpose":
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _scale(self, name: str) -> Floats | None:
        node = self._dequantizer(name)
        return None if node is None else self._constant(node.input[1])

    def _constant(self, name: str) -> Floats | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


def _integers(values: Floats, unit: Floats, depth: int) -> Integers | None:
    """The bias in units, half to even; None if a sum could leave 32 bits."""
    levels = np.rint(values.astype(np.float64) / unit)
    fits = np.abs(levels).max(initial=0) <= LARGEST - depth * GREATEST_PRODUCT
    return levels.astype(np.int32) if fits else None


def _replace(
    graph: onnx.GraphProto, bias: _Bias, integers: Integers, unit: Floats, names: tuple[str, ...]
) -> None:
    """Let the adder read the dequantised integers, under the bias's name where it is the last."""
    stored, scale, value = names
    bias.adder.input[bias.place] = value
    drop_unread_constants(graph)
    if bias.name not in names_in(graph):
        bias.adder.input[bias.place] = value = bias.name
    graph.initializer.append(numpy_helper.from_array(integers, stored))
    graph.initializer.append(numpy_helper.from_array(unit, scale))
    node = helper.make_node("DequantizeLinear", [stored, scale], [value])
    if unit.ndim:
        node.attribute.append(helper.make_attribute("axis", 0))
    graph.node.insert(0, node)
