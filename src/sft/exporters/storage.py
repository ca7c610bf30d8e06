"""How an exported file stores its weights, which need not be how the runtime multiplies them."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from sft.core.errors import InputError
from sft.core.files import read_bytes
from sft.exporters.wiring import Reader, readers_of

BITS = {
    "DOUBLE": 64, "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "INT8": 8, "UINT8": 8,
    "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2,
}  # fmt: skip
PASSING = ("Cast", "DequantizeLinear", "Mul", "Transpose", "Reshape", "Identity")
STATES = {"LSTM": 3, "GRU": 3, "RNN": 3}  # from this input on: biases, lengths, first states


@dataclasses.dataclass(frozen=True)
class Storage:
    """One weight in the file: its shape, how many bits a number takes there, and its bytes."""

    shape: tuple[int, ...]
    bits: int
    bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def read_onnx(path: str | Path) -> dict[str, Storage]:
    """Every weight of an ONNX file, by name, in the file's order.

    A weight is a constant of two or more axes; scales, biases, zero points and the states of
    recurrent layers are not counted. An integer weight is called after the bias of its layer
    (`conv.bias` beside it: `conv.weight`), or as the file calls it. Raises `InputError` for a file
    that is missing or no ONNX.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(read_bytes(Path(path)))
    except DecodeError:
        raise InputError(f"'{path}' is not an ONNX file.") from None
    if not proto.graph.node:
        raise InputError(f"'{path}' is not an ONNX file: it has no graph.")
    readers, found = readers_of(proto.graph), dict[str, Storage]()
    for tensor in proto.graph.initializer:
        bits = BITS.get(TensorProto.DataType.Name(tensor.data_type))
        if bits is None or len(tensor.dims) < 2 or _is_beside(readers.get(tensor.name, [])):
            continue
        shape = tuple(tensor.dims)
        stored = Storage(shape, bits, math.ceil(math.prod(shape) * bits / 8))
        name = _layer_name(tensor.name, readers)
        found[tensor.name if name in found else name] = stored
    return found


def mean_bits(weights: Mapping[str, Storage]) -> float:
    """Bits that a number of the weights takes in the file, in the mean; 0 without weights."""
    numbers = sum(w.numbers for w in weights.values())
    return sum(w.bits * w.numbers for w in weights.values()) / numbers if numbers else 0.0


def _is_beside(reading: list[Reader]) -> bool:
    """Whether a constant is a scale of a weight, or a recurrent layer's bias or first state."""
    return bool(reading) and all(
        (node.op_type == "Mul" and place == 1) or place >= STATES.get(node.op_type, place + 1)
        for node, place in reading
    )


def _layer_name(name: str, readers: Mapping[str, list[Reader]]) -> str:
    """`x.weight` where the weight meets a bias called `x.bias`."""
    reading = readers.get(name, [])
    while len(reading) == 1 and reading[0][0].op_type in PASSING:
        reading = readers.get(reading[0][0].output[0], [])
    inputs = list(reading[0][0].input) if reading else []
    layer, _, last = "".join(inputs[2:3]).rpartition(".")
    return f"{layer}.weight" if layer and last == "bias" else name
