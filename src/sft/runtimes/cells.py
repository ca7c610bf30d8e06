"""One layer under one option, as a runtime executes it: what is timed to price the option."""

import dataclasses
import math

from sft.core.errors import InputError
from sft.core.geometry import Geometry, Sizes, chain_macs

INTEGER, FLOAT, MIXED = "integer", "float", "mixed"
ARITHMETICS = (INTEGER, FLOAT, MIXED)
CHAIN, RESIDUAL, INTERPOLATIVE = "chain", "residual", "interpolative"
FACTORS = {CHAIN: (1, math.inf), RESIDUAL: (3, 3), INTERPOLATIVE: (1, 2)}
ACTIVATIONS = ("relu", "relu6")
FLOAT_BYTES, FEWEST_COPIES, LARGEST_FILE = 4, 2, 2**31 - 2**20


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer under one option, as a runtime executes it.

    chain : the factors in their order, one for a dense layer; the last has the bias.
    size : lengths of the input's axes that are not channels; for a linear layer those before the
        channels, without the batch axis.
    arithmetic : "integer" (8-bit activations and weights; fewer bits are widened when a file is
        loaded and run alike), "float" (as in a network of floats) or "mixed" (a float layer in a
        network of integers: dequantised before it, quantised behind it).
    activation : "relu" or "relu6" if the layer's outputs are rectified. Outputs that are quantised
        are rectified by their saturation, so this is None unless the arithmetic is "float".
    structure : "chain", "residual" (the first factor beside the chain of the other two, added) or
        "interpolative" (the outputs of both factors, concatenated and put in order).
    """

    chain: tuple[Geometry, ...]
    size: Sizes = ()
    arithmetic: str = INTEGER
    bias: bool = True
    activation: str | None = None
    structure: str = CHAIN

    def __post_init__(self) -> None:
        if self.arithmetic not in ARITHMETICS:
            raise InputError(f"arithmetic='{self.arithmetic}': one of {', '.join(ARITHMETICS)}.")
        if self.activation not in (None, *ACTIVATIONS):
            raise InputError(f"activation='{self.activation}': {', '.join(ACTIVATIONS)} or None.")
        least, most = FACTORS.get(self.structure, (1, 0))
        if not least <= len(self.chain) <= most:
            raise InputError(
                f"A cell of {len(self.chain)} factors cannot be '{self.structure}'. Known: "
                f"{CHAIN}, {RESIDUAL} (of 3 factors), {INTERPOLATIVE} (of 1 or 2)."
            )
        if self.arithmetic != FLOAT:
            object.__setattr__(self, "activation", None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        if self.structure == RESIDUAL:
            branches = (self.chain[:1], self.chain[1:])
            return sum(chain_macs(branch, self.size) for branch in branches)
        return chain_macs(self.chain, self.size)

    @property
    def linear(self) -> bool:
        """Whether the channels are the last axis, as in a linear layer."""
        return self.chain[0].axes == 0


def unsupported(cell: Cell) -> str | None:
    """Why no file can be written that runs as the exported layer does, or None."""
    modes = {f.padding_mode for f in cell.chain} - {"zeros"}
    if modes:
        return f"it pads by '{modes.pop()}', for which a network has a node of its own"
    if cell.arithmetic == INTEGER and any(f.transposed for f in cell.chain):
        return "no integer kernel multiplies a transposed convolution; it stays float"
    if cell.linear and any(f.groups > 1 for f in cell.chain):
        return "a linear layer has no groups"
    if FLOAT_BYTES * FEWEST_COPIES * sum(f.params for f in cell.chain) > LARGEST_FILE:
        return "its weights do not fit into one ONNX file twice"
    if not cell.linear and any(f.axes != len(cell.size) for f in cell.chain):
        return f"its factors have other axes than its input, {cell.size}"
    return None
