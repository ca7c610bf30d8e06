"""What was measured of a network: the menu of each layer."""

import dataclasses
from typing import Any

from pydantic.dataclasses import dataclass

from sft.core.records.layers import Cost, Layer, Option
from sft.core.records.record import FORMAT, STRICT, Record


@dataclass(frozen=True, config=STRICT)
class Candidate(Record):
    """One entry of a layer's menu; `error` is the relative output error E|y-y'|^2 / E|y-mean|^2.

    `rounding` is the part of the damage that comes from integers, the rest is from the split.
    """

    option: Option
    error: float
    damage: float
    cost: Cost
    rounding: float = 0.0


@dataclass(frozen=True, config=STRICT)
class Anchor(Record):
    """An option whose damage was measured by running the network with it; `error` as predicted."""

    option: Option
    error: float
    damage: float


@dataclass(frozen=True, config=STRICT)
class LayerProfile(Record):
    """A layer's menu, and what it was made from.

    `alphas`: damage per unit of relative output error, by scheme, at the middle one of the measured
    `anchors`. `scale`: by how much the damages of its splits were corrected with a chosen network
    in place (see `remeasure`).
    """

    layer: Layer
    alphas: dict[str, float]
    candidates: tuple[Candidate, ...]
    anchors: tuple[Anchor, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, config=STRICT)
class Profile(Record):
    """Everything measured once about a network on data.

    `fingerprint` ties it to the weights, the data and the target it was measured for. The
    streamed statistics of the layers are stored beside it (`statistics.safetensors`). `latency`
    (milliseconds, None where nothing was measured) and `memory` (bytes of activations) are of the
    original; the `overhead_` fields are what the network costs beside its listed layers, whatever
    becomes of them.
    """

    model: str
    target: str
    fingerprint: str
    samples: int
    params: int
    macs: int
    size: int
    overhead_macs: int
    layers: tuple[LayerProfile, ...]
    seed: int
    input_shape: tuple[int, ...] = ()
    latency: float | None = None
    overhead_latency: float = 0.0
    memory: int = 0
    overhead_memory: int = 0
    format: int = FORMAT
    statistics: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def original(self) -> Cost:
        """What the original costs."""
        return Cost(self.params, self.macs, self.size, self.latency, self.memory)
