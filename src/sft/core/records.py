"""The records that pass from step to step: frozen, printable, stored as JSON.

Every record that is stored on its own carries `format`, the version of its shape. Large arrays
never go into the JSON; a record that owns some says so and stores them beside it.

A *layer* is a module with a weight; an *option* is what may become of one layer; *damage* is the
expected loss of fidelity of an option (mean Kullback-Leibler divergence from the original, in
nats, where the outputs are logits); a *plan* holds one option per layer.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sft.core.errors import InputError, VerificationError
from sft.core.files import read_text, write_text
from sft.core.geometry import Geometry

FORMAT = 1
_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

KEEP = "keep"
DENSE = "dense"
STORED = "stored"


class Record:
    """What all records share: JSON in and out, checked field by field."""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for `json.dumps`; fields that hold arrays are left out."""
        plain: dict[str, Any] = _adapter(type(self)).dump_python(
            self, mode="json", exclude={"statistics"}
        )
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "record") -> Self:
        """Parse and check; an `InputError` names the field that is wrong."""
        try:
            record: Self = _adapter(cls).validate_json(text)
        except ValidationError as error:
            raise InputError(
                f"'{source}' is not a valid {cls.__name__}: {_explain(error)}"
            ) from None
        stored = getattr(record, "format", FORMAT)
        if stored != FORMAT:
            raise InputError(
                f"'{source}' has format {stored}, this version of SFT reads {FORMAT}. "
                f"Make it again with this version."
            )
        return record

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_json(read_text(Path(path)), str(path))


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Inspection(Record):
    """What `inspect` found: every layer in the order of its first call, and the whole."""

    model: str
    input_shape: tuple[int, ...]
    params: int
    macs: int
    layers: tuple[Layer, ...]
    format: int = FORMAT


@dataclass(frozen=True, config=_STRICT)
class Option(Record):
    """What may become of one layer.

    `scheme` is "keep" (float, as it is), "dense" (the kernel whole, in integers), "stored" (the
    kernel whole, stored in few bits and multiplied in float) or the name of a decomposition;
    `weight_bits` is None for float weights.
    """

    scheme: str
    rank: tuple[int, ...] = ()
    weight_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits is {self.weight_bits}; it must be 2 to 8, or null")
        if any(r < 1 for r in self.rank):
            raise ValueError(f"rank is {self.rank}; each must be at least 1")
        if (self.scheme in (KEEP, DENSE, STORED)) != (not self.rank):
            raise ValueError(f"scheme '{self.scheme}' with rank {self.rank} does not fit together")
        if self.scheme == STORED and self.weight_bits is None:
            raise ValueError("scheme 'stored' needs weight_bits, 2 to 8")
        if self.scheme == KEEP and self.weight_bits is not None:
            object.__setattr__(self, "weight_bits", None)

    def __str__(self) -> str:
        rank = f" rank {','.join(map(str, self.rank))}" if self.rank else ""
        bits = f" @{self.weight_bits}" if self.weight_bits else ""
        return f"{self.scheme}{rank}{bits}"


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Candidate(Record):
    """One entry of a layer's menu; `error` is the relative output error E|y-y'|^2 / E|y-mean|^2.

    `rounding` is the part of the damage that comes from integers, the rest is from the split.
    """

    option: Option
    error: float
    damage: float
    cost: Cost
    rounding: float = 0.0


@dataclass(frozen=True, config=_STRICT)
class Anchor(Record):
    """An option whose damage was measured by running the network with it; `error` as predicted."""

    option: Option
    error: float
    damage: float


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class PlanRow(Record):
    """One layer of a plan, with the reason in words."""

    name: str
    option: Option
    predicted_damage: float | None
    cost: Cost
    reason: str


@dataclass(frozen=True, config=_STRICT)
class Plan(Record):
    """One option per layer; made by `plan`, edited by people, read by `apply`.

    `value` is the predicted damage of the whole, `bound` a proven lower bound of it, `gap` their
    relative distance. Costs are of the whole network.
    """

    model: str
    target: str
    budget: dict[str, float]
    rows: tuple[PlanRow, ...]
    cost: Cost
    original: Cost
    status: str
    value: float
    bound: float
    gap: float
    input_shape: tuple[int, ...] = ()
    format: int = FORMAT
    statistics: Any = dataclasses.field(default=None, compare=False, repr=False)

    def option(self, name: str) -> Option:
        """The option of the layer called `name`."""
        return self._row(name).option

    def replace(self, name: str, option: Option) -> "Plan":
        """A new plan in which one layer has another option.

        Totals, damage and reason of the replaced row are no longer predictions of the profile;
        the row says so.
        """
        old = self._row(name)
        row = dataclasses.replace(
            old, option=option, predicted_damage=None, reason=f"set by hand (was {old.option})"
        )
        rows = tuple(row if r.name == name else r for r in self.rows)
        return dataclasses.replace(self, rows=rows, status="edited")

    def _row(self, name: str) -> PlanRow:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(r.name for r in self.rows)
        raise InputError(f"The plan has no layer '{name}'. Its layers are: {known}.")

    def __str__(self) -> str:
        lines = [f"{r.name:32} {r.option!s:24} {r.reason}" for r in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True, config=_STRICT)
class FrontPoint(Record):
    """A whole network: what it costs, its predicted damage, and a proven lower bound of the damage
    at that cost. `layers` says in words what becomes of each layer.
    """

    cost: Cost
    damage: float
    bound: float
    layers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Front(Record):
    """The least damage at each cost ("size" or "latency"), from the cheapest network up.

    No point is beaten by another: with rising cost the damage falls.
    """

    model: str
    target: str
    cost: str
    points: tuple[FrontPoint, ...]
    format: int = FORMAT


@dataclass(frozen=True, config=_STRICT)
class Layout(Record):
    """How a target stores and multiplies integers.

    Activations are affine per tensor, weights symmetric per output channel. Where the kernel adds
    two neighbouring products in 16 bits, `pair_sum` is the most that two weights of one sign may
    reach together without saturating (see `quantizers.grid`).
    """

    activation_dtype: str
    activation_min: int
    activation_max: int
    weight_min: int
    weight_max: int
    pair_sum: int | None = None


@dataclass(frozen=True, config=_STRICT)
class Target(Record):
    """A runtime and an instruction set: what the exported file is for.

    `operators` are the graph operators that stay in integers; `lane` is the multiple on which
    ranks run well, `output_lane` that of the output channels of a kxk kernel; `layer_bytes` is what
    one quantised layer adds to a file beside its weights. `schemes` are the decompositions that are
    planned with unless others are asked for: those that are known to run well there. `stored_bits`
    are the widths in which its files hold weights; another takes the next wider one.
    """

    name: str
    runtime: str
    instruction_set: str
    suffix: str
    layout: Layout
    operators: tuple[str, ...]
    lane: int
    output_lane: int
    note: str
    layer_bytes: int = 0
    stored_bits: tuple[int, ...] = (8,)
    schemes: tuple[str, ...] = ("channel_in", "channel_out")
    format: int = FORMAT


@dataclass(frozen=True, config=_STRICT)
class Artifact(Record):
    """An exported file: where it is, what it is for, how to feed it (one sample a run)."""

    path: str
    target: str
    file_bytes: int
    sha256: str
    input_shape: tuple[int, ...]
    integers: bool
    format: int = FORMAT


@dataclass(frozen=True, config=_STRICT)
class Timing(Record):
    """Latency of one run (milliseconds) and peak memory of the process that ran it (bytes)."""

    latency_ms: float
    latency_ms_min: float
    latency_ms_p90: float
    peak_memory_bytes: int
    runs: int
    threads: int


@dataclass(frozen=True, config=_STRICT)
class Check(Record):
    """What running the exported file showed.

    `max_abs` and `sqnr_db` compare the file's outputs with the simulated integer network (or with
    the model itself when there is none), `agreement` is the share of samples on which the file and
    the original decide alike, `integer_macs_fraction` the share of the file's multiply-accumulates
    that ran in integers. `failures` says in words what did not hold.
    """

    passed: bool
    max_abs: float
    sqnr_db: float
    agreement: float
    integer_macs_fraction: float
    score: float | None = None
    samples: int = 0
    failures: tuple[str, ...] = ()
    format: int = FORMAT

    def raise_if_failed(self) -> None:
        """Raise `VerificationError` with the failures in words, if there are any."""
        if not self.passed:
            raise VerificationError(
                "The exported file failed its check: " + " ".join(self.failures)
            )


_adapters: dict[type, TypeAdapter[Any]] = {}


def _adapter(cls: type) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors()[:3]:
        where = ".".join(str(p) for p in item["loc"]) or "the whole"
        parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts)


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
