"""Weights of few bits: packed in the file, widened to 8 bits when the runtime loads it.

An integer weight whose values fit is stored as INT4 or INT2 with a `Cast` to INT8 behind it. ONNX
Runtime folds the cast while it loads the file and then fuses the same integer kernels as without
it, so this saves storage only: the runtime computes in 8 bits, with the same outputs.
"""

import dataclasses
import math
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, version_converter

from sft.exporters.wiring import names_in, readers_of, short_names


@dataclasses.dataclass(frozen=True)
class Width:
    """A packed number type: signed, `bits` wide, from an operator set and a runtime version on."""

    bits: int
    type_name: str
    opset: int
    runtime: tuple[int, int]

    def holds(self, values: npt.NDArray[np.int8]) -> bool:
        """Whether every value is in [-2^(bits-1), 2^(bits-1) - 1]."""
        top = 2 ** (self.bits - 1)
        return bool(values.size and -top <= values.min() and values.max() < top)


# Narrowest first. Older versions of ONNX Runtime refuse the cast.
WIDTHS = (Width(2, "INT2", 25, (1, 24)), Width(4, "INT4", 21, (1, 23)))


def known_widths() -> tuple[Width, ...]:
    """The widths that the installed ONNX and ONNX Runtime know, narrowest first."""
    try:
        major, minor = metadata.version("onnxruntime").split(".")[:2]
    except metadata.PackageNotFoundError:
        return ()
    known = set(TensorProto.DataType.keys())
    runtime = (int(major), int(minor))
    return tuple(w for w in WIDTHS if w.type_name in known and runtime >= w.runtime)


def pack(values: npt.NDArray[np.int8], bits: int) -> bytes:
    """Two's complement numbers of 2 or 4 bits in ONNX's order: the first in a byte's lowest bits.

    values : of any shape, read row by row; the last byte is filled with zeros.
    """
    count = 8 // bits
    lowest = values.reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    filled = np.pad(lowest, (0, -lowest.size % count)).reshape(-1, count)
    shifted = filled << np.arange(0, 8, bits, dtype=np.uint8)
    return bytes(np.bitwise_or.reduce(shifted, axis=1).tobytes())


def raise_opset(proto: onnx.ModelProto, widths: Sequence[Width] | None = None) -> None:
    """Move the network to the operator set that its narrowest weights need. Changes `proto`.

    It stays where it is if ONNX cannot convert one of its operators: its weights then take the
    next wider type.
    """
    usable = known_widths() if widths is None else widths
    plans = (_packing(tensor, usable, tensor.name) for tensor in _weights(proto.graph))
    wanted = max((p.width.opset for p in plans if p is not None), default=0)
    if wanted <= _opset(proto):
        return
    try:
        converted = version_converter.convert_version(proto, wanted)
    except (RuntimeError, version_converter.ConvertError):
        return
    proto.CopyFrom(converted)
    proto.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(proto.opset_import))


def store_few_bits(proto: onnx.ModelProto, widths: Sequence[Width] | None = None) -> None:
    """Pack every integer weight that feeds nothing but DequantizeLinear, where that saves bytes.

    widths : those that may be used, narrowest first; by default those that the installed ONNX
        and ONNX Runtime know. A width of a later operator set than the network's is not used.
    Changes `proto`; a weight in float, or whose values need more than 4 bits, stays as it is.
    """
    graph, opset = proto.graph, _opset(proto)
    usable = [w for w in (known_widths() if widths is None else widths) if w.opset <= opset]
    names, readers = short_names(names_in(graph)), readers_of(graph)
    casts: list[NodeProto] = []
    for tensor in _weights(graph):
        found = _packing(tensor, usable, next(names))
        if found is not None:
            for node, index in readers[tensor.name]:
                node.input[index] = found.cast.output[0]
            tensor.CopyFrom(found.tensor)
            casts.append(found.cast)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


@dataclasses.dataclass(frozen=True)
class _Packing:
    width: Width
    tensor: TensorProto
    cast: NodeProto


def _packing(tensor: TensorProto, widths: Sequence[Width], output: str) -> _Packing | None:
    """The weight in the narrowest width that holds it, if that saves more than its cast costs."""
    values = numpy_helper.to_array(tensor)
    fitting = [w for w in widths if w.holds(values)]
    if not fitting:
        return None
    packed = TensorProto(
        name=tensor.name,
        dims=tensor.dims,
        data_type=TensorProto.DataType.Value(fitting[0].type_name),
        raw_data=pack(values, fitting[0].bits),
    )
    cast = helper.make_node("Cast", [tensor.name], [output], to=TensorProto.INT8)
    saves = _stored(packed) + _stored(cast) < _stored(tensor)
    return _Packing(fitting[0], packed, cast) if saves else None


def _weights(graph: onnx.GraphProto) -> list[TensorProto]:
    """8-bit initialisers that only DequantizeLinear reads, as what it dequantises."""
    readers = readers_of(graph)
    visible = {o.name for o in (*graph.input, *graph.output)}
    return [
        t
        for t in graph.initializer
        if t.data_type == TensorProto.INT8
        and t.name not in visible
        and readers.get(t.name)
        and all(n.op_type == "DequantizeLinear" and i == 0 for n, i in readers[t.name])
    ]


def _stored(message: TensorProto | NodeProto) -> int:
    """Bytes of an initialiser or node in the file: itself, its tag and its length (a varint)."""
    size = int(message.ByteSize())
    return size + 1 + max(1, math.ceil(size.bit_length() / 7))


def _opset(proto: onnx.ModelProto) -> int:
    return max((int(o.version) for o in proto.opset_import if not o.domain), default=0)
