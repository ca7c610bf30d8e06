"""Small integers as bytes: packed bit by bit, or entropy-coded where that is shorter.

Trained weights crowd around zero, so a Huffman code (RFC 1951) takes less than their full width.
"""

import zlib

import numpy as np
import numpy.typing as npt

BITS, DEFLATE = "bits", "deflate"
RAW = -15  # a deflate stream without header and checksum


def encode(values: npt.NDArray[np.integer], bits: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Signed integers of any shape as the shorter of the two streams, and which one it is."""
    packed = pack_bits(values, bits)
    plain = values.reshape(-1).astype(np.int8).tobytes()
    best, coding = packed.tobytes(), BITS
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, strategy)
        coded = coder.compress(plain) + coder.flush()
        if len(coded) < len(best):
            best, coding = coded, DEFLATE
    return np.frombuffer(best, np.uint8).copy(), coding


def decode(
    stream: npt.NDArray[np.uint8], bits: int, count: int, coding: str
) -> npt.NDArray[np.int8]:
    """The first `count` numbers of what `encode` gave.

    Raises `ValueError` for another coding, or a stream that holds fewer or more numbers.
    """
    if coding == BITS:
        return unpack_bits(stream, bits, count)
    if coding != DEFLATE:
        raise ValueError(f"unknown coding '{coding}'")
    coder = zlib.decompressobj(RAW)
    try:
        plain = coder.decompress(stream.tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged stream: {error}") from None
    if len(plain) != count:
        raise ValueError(f"a stream of {len(plain)} numbers where {count} were expected")
    return np.frombuffer(plain, np.int8).copy()


def pack_bits(values: npt.NDArray[np.integer], bits: int) -> npt.NDArray[np.uint8]:
    """Signed integers of any shape to a dense stream of `bits`-bit two's complement numbers."""
    unsigned = values.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    expanded = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(expanded.astype(np.uint8).reshape(-1))


def unpack_bits(stream: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int8]:
    """The first `count` numbers of what `pack_bits` wrote."""
    expanded = np.unpackbits(stream, count=count * bits).reshape(count, bits).astype(np.int64)
    unsigned = (expanded << np.arange(bits)).sum(1)
    signed = np.where(unsigned >> (bits - 1), unsigned - (1 << bits), unsigned)
    narrow: npt.NDArray[np.int8] = signed.astype(np.int8)
    return narrow
