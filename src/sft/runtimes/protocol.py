"""Messages between the runner and its child: one line of JSON, then the bytes of one array.

The header's `array` holds the dtype (little-endian) and shape of the bytes that follow, or is
absent when none follow. Nothing is pickled.
"""

import json
from typing import IO, Any

import numpy as np

from sft.runtimes.adapter import Array, size_of

Header = dict[str, Any]


def send(stream: IO[bytes], header: Header, array: Array | None = None) -> None:
    """Write one message and flush it."""
    content = b""
    if array is not None:
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if little.dtype.kind not in "fiub":
            raise TypeError(f"an array of dtype {array.dtype} cannot be sent")
        header = {**header, "array": [little.dtype.str, list(array.shape)]}
        content = little.tobytes()
    stream.write(json.dumps(header).encode() + b"\n")
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Header, Array | None]:
    """Read one message; `EOFError` when the other side is gone or breaks off."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header: Header = json.loads(line)
    if "array" not in header:
        return header, None
    name, shape = header.pop("array")
    dtype = np.dtype(name)
    content = stream.read(size_of(shape) * dtype.itemsize)
    if len(content) != size_of(shape) * dtype.itemsize:
        raise EOFError
    return header, np.frombuffer(content, dtype).reshape(shape)
