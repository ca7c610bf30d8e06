"""What the network becomes: targets, exported files, and what running those showed."""

from pydantic.dataclasses import dataclass

from sft.core.errors import VerificationError
from sft.core.records.record import FORMAT, STRICT, Record


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class Artifact(Record):
    """An exported file: where it is, what it is for, how to feed it (one sample a run)."""

    path: str
    target: str
    file_bytes: int
    sha256: str
    input_shape: tuple[int, ...]
    integers: bool
    format: int = FORMAT


@dataclass(frozen=True, config=STRICT)
class Timing(Record):
    """Latency of one run (milliseconds) and peak memory of the process that ran it (bytes)."""

    latency_ms: float
    latency_ms_min: float
    latency_ms_p90: float
    peak_memory_bytes: int
    runs: int
    threads: int


@dataclass(frozen=True, config=STRICT)
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
