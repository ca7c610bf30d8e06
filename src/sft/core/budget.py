"""What the user asks for."""

import dataclasses
import sys
from numbers import Real
from typing import TYPE_CHECKING

from sft.core.errors import InputError

if TYPE_CHECKING:
    from sft.core.records import Cost

MINIMIZED = ("size", "macs", "latency")
FRACTIONS = ("size", "macs", "latency", "memory")
ABSOLUTE = {
    "size_bytes": "size",
    "macs_count": "macs",
    "latency_ms": "latency",
    "memory_bytes": "memory",
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits on the compressed network; what is None is not limited.

    size, macs, latency, memory : fraction of the original, above 0 and at most 1.
    size_bytes, macs_count, latency_ms, memory_bytes : the same in absolute numbers (stored bytes;
        multiply-accumulates; milliseconds of one sample; bytes of activations alive at a time).
    max_drop : how much the score may fall, in the score's own unit (0.005: half a point).
    minimize : "size", "macs" or "latency": push this one as low as `max_drop` allows, by measuring.
    """

    size: float | None = None
    macs: float | None = None
    latency: float | None = None
    memory: float | None = None
    size_bytes: int | None = None
    macs_count: int | None = None
    latency_ms: float | None = None
    memory_bytes: int | None = None
    max_drop: float | None = None
    minimize: str | None = None

    def __post_init__(self) -> None:
        for name in FRACTIONS:
            value = self._number(name)
            if value is not None and not 0 < value <= 1:
                raise InputError(
                    f"Budget {name}={value}: a fraction of the original, above 0 and at most 1, "
                    f"is wanted (0.1: a tenth)."
                )
        for name in ABSOLUTE:
            value = self._number(name)
            if value is not None and not 0 < value <= sys.float_info.max:
                raise InputError(
                    f"Budget {name}={value}: a finite number above 0 is wanted. "
                    "Leave it out for no limit."
                )
        drop = self._number("max_drop")
        if drop is not None and not drop >= 0:
            raise InputError(f"Budget max_drop={drop}: it must be 0 or more.")
        if self.minimize not in (None, *MINIMIZED):
            wanted = " or ".join(repr(name) for name in MINIMIZED)
            raise InputError(f"Budget minimize='{self.minimize}': {wanted} is wanted.")
        if self.minimize is not None and self.max_drop is None:
            raise InputError("Budget minimize= needs max_drop=: how far may the score fall?")

    def _number(self, name: str) -> float | None:
        """A field, None where it was not set; raises `InputError` if it is no number."""
        value: float | None = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise InputError(f"Budget {name}={value!r}: a number is wanted.")
        return value

    def limits(self, original: "Cost") -> dict[str, float]:
        """Absolute upper limits by cost name, for an original of these costs.

        Raises `InputError` for a fraction of a latency that was not measured.
        """
        found: dict[str, float] = {}
        for name in FRACTIONS:
            fraction = getattr(self, name)
            if fraction is None:
                continue
            whole = getattr(original, name)
            if not whole:
                raise InputError(
                    f"Budget {name}={fraction}: the profile holds no {name} of the original. "
                    f"Profile the model again, with its latency measured."
                )
            found[name] = fraction * whole
        for name, cost in ABSOLUTE.items():
            value = getattr(self, name)
            if value is not None:
                found[cost] = min(value, found.get(cost, float("inf")))
        return found

    def asked(self) -> dict[str, float | str]:
        """The fields that were set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
