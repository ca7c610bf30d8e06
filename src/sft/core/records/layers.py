"""A layer, what may become of it, and what that costs."""

import dataclasses
from collections.abc import Mapping

from pydantic.dataclasses import dataclass

from sft.core.geometry import Geometry
from sft.core.records.record import FORMAT, STRICT, Record

KEEP = "keep"
DENSE = "dense"
STORED = "stored"


@dataclass(frozen=True, config=STRICT)
class Layer(Record):
    """One layer as the model uses it.

    `input_shape` and `output_shape` are of one sample, without the batch axis; `calls` counts how
    often one run calls the layer, and `macs` are of all its calls. `geometry` is None for a layer
    that no decomposition could handle. `refusals` maps a scheme to the reason why it cannot be used
    here.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    bias: bool
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    calls: int = 1
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    geometry: Geometry | None = None

    @property
    def input_size(self) -> tuple[int, ...]:
        """Lengths of the axes of one sample that are not channels."""
        linear = self.geometry is not None and not self.geometry.axes
        return self.input_shape[:-1] if linear else self.input_shape[1:]

    @property
    def params(self) -> int:
        count = 1
        for side in self.weight_shape:
            count *= side
        return count + (self.outputs if self.bias else 0)

    @property
    def outputs(self) -> int:
        """Output channels."""
        transposed = self.kind.startswith("ConvTranspose")
        return self.output_shape[0] if transposed else self.weight_shape[0]


@dataclass(frozen=True, config=STRICT)
class Inspection(Record):
    """What `inspect` found: every layer in the order of its first call, and the whole."""

    model: str
    input_shape: tuple[int, ...]
    params: int
    macs: int
    layers: tuple[Layer, ...]
    format: int = FORMAT


@dataclass(frozen=True, config=STRICT)
class Option(Record):
    """What may become of one layer.

    `scheme` is "keep" (float, as it is), "dense" (the kernel whole, in integers), "stored" (the
    kernel whole, stored in few bits and multiplied in float) or the name of a decomposition, which
    knows how many ranks it takes; `weight_bits` is None for float weights.
    """

    scheme: str
    rank: tuple[int, ...] = ()
    weight_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits is {self.weight_bits}; it must be 2 to 8, or null")
        if any(r < 1 for r in self.rank):
            raise ValueError(f"rank is {self.rank}; each must be at least 1")
        if self.scheme in (KEEP, DENSE, STORED) and self.rank:
            raise ValueError(f"scheme '{self.scheme}' takes no rank; {self.rank} was given")
        if self.scheme in (DENSE, STORED) and self.weight_bits is None:
            raise ValueError(
                f"scheme '{self.scheme}' needs weight_bits, 2 to 8; 'keep' stays in float"
            )
        if self.scheme == KEEP and self.weight_bits is not None:
            object.__setattr__(self, "weight_bits", None)

    def __str__(self) -> str:
        rank = f" rank {','.join(map(str, self.rank))}" if self.rank else ""
        bits = f" @{self.weight_bits}" if self.weight_bits else ""
        return f"{self.scheme}{rank}{bits}"


@dataclass(frozen=True, config=STRICT)
class Cost(Record):
    """What a layer or a network costs to keep and to run one sample.

    params : parameters. macs : multiply-accumulates. size : stored bytes (weights, scales, bias).
    latency : milliseconds in the target's runtime; None where nothing was measured, infinite where
        the runtime failed. memory : the most bytes of activations that are alive while it runs.
    """

    params: int
    macs: int
    size: int
    latency: float | None = None
    memory: int = 0


def totals(costs: Mapping[str, Cost]) -> Cost:
    """The sum of costs; of memory, the greatest. The latency is unknown if one is."""
    latencies = [c.latency for c in costs.values()]
    known = [latency for latency in latencies if latency is not None]
    return Cost(
        sum(c.params for c in costs.values()),
        sum(c.macs for c in costs.values()),
        sum(c.size for c in costs.values()),
        sum(known) if known and len(known) == len(latencies) else None,
        max((c.memory for c in costs.values()), default=0),
    )
