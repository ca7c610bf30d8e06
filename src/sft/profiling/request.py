"""What a profile was asked for, and what its numbers depend on."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from types import CodeType

import torch
from torch import nn

from sft import __version__
from sft.core.data import Data, fingerprint_data
from sft.core.errors import InputError
from sft.core.randomness import forked_rng
from sft.core.records import Profile, Target
from sft.decompositions import decompositions
from sft.models.inspect import inspect
from sft.profiling.candidates import WEIGHT_BITS

ANCHOR_ERROR = 0.1
DIGITS = 12  # of each hash
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
CONSTANTS = (bool, int, float, str, tuple, type(None))


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How a profile is measured: what `profile` was asked for."""

    schemes: tuple[str, ...]
    weight_bits: tuple[int, ...] = (WEIGHT_BITS,)
    data_free: bool = False
    loss_aware: bool = False
    rank_multiple: int | None = None
    anchor_samples: int | None = None
    anchor_error: float = ANCHOR_ERROR
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank_multiple", "anchor_samples"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) > 0):
                raise InputError(f"{name}={value!r}: it must be a whole number above 0.")
        error = self.anchor_error
        if not isinstance(error, Real) or not 0 < error < math.inf:
            raise InputError(f"anchor_error={error!r}: it must be a finite number above 0.")
        if not all(2 <= bits <= 8 for bits in self.weight_bits):
            given = ", ".join(map(str, self.weight_bits))
            raise InputError(f"weight_bits={given}: 2 to 8, or None to stay in float.")
        for scheme in self.schemes:
            decompositions[scheme]


def schemes_asked(schemes: str | Collection[str] | None, target: Target) -> tuple[str, ...]:
    """The names in order, each once; a single one may stand alone, None takes the target's."""
    given = target.schemes if schemes is None else schemes
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        known = ", ".join(decompositions)
        raise InputError(f"schemes={schemes!r}: names of decompositions are wanted ({known}).")
    return tuple(sorted(set(names)))


def widths_asked(weight_bits: int | Collection[int] | None) -> tuple[int, ...]:
    """The widths in falling order, each once."""
    if weight_bits is None:
        return ()
    widths = list(weight_bits) if isinstance(weight_bits, Iterable) else [weight_bits]
    if not all(isinstance(bits, Integral) for bits in widths):
        raise InputError(
            f"weight_bits={weight_bits!r}: whole numbers from 2 to 8, or None to stay in float."
        )
    return tuple(sorted({int(bits) for bits in widths}, reverse=True))


def fingerprint(
    model: nn.Module, data: Data, target: Target, how: Measuring | None = None, seed: int = 0
) -> str:
    """What a profile depends on, part by part: a short hash of each, and the versions.

    A loader that shuffles is read with torch's generators at the seed; they are left as they were.
    Raises what `inspect` raises.
    """
    how = Measuring(schemes=target.schemes, seed=seed) if how is None else how
    with forked_rng(how.seed):
        parts = {
            "weights": weights_of(model),
            "network": _network(model, data),
            "data": _hash(fingerprint_data(data.calibration, batches=None)),
            "target": _hash(target.to_json()),
            "options": _hash(str(how)),
            "sft": __version__,
            "torch": torch.__version__,
        }
    return " ".join(f"{part}:{value}" for part, value in parts.items())


def parts_of(request: str) -> dict[str, str]:
    """The parts of a fingerprint by name."""
    return dict(part.partition(":")[::2] for part in request.split())


def refuse_other_weights(measured: Profile, model: nn.Module) -> None:
    """Raise `InputError` if a profile's fingerprint tells of other weights than the model's."""
    told = parts_of(measured.fingerprint).get("weights")
    if told is not None and told != weights_of(model):
        raise InputError(
            f"The profile of '{measured.model}' was measured with other weights than this model "
            "has. Give the model that was profiled, or profile this one."
        )


def weights_of(model: nn.Module) -> str:
    """A short hash of the names, shapes and values of all parameters and buffers."""
    weights = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        weights.update(f"{key} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        weights.update(flat.view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()[:DIGITS]


def _network(model: nn.Module, data: Data) -> str:
    """A short hash of what is computed with the weights.

    Counted are the modules as they print themselves, the class and the code of `forward` of each,
    and what `inspect` finds; not what a `forward` calls outside modules.
    """
    found = inspect(model, data.example())
    code = [_code(module) for module in model.modules()]
    return _hash(f"{ADDRESS.sub('', repr(model))} {code} {found.to_json()}")


def _code(module: nn.Module) -> str:
    """The class of a module, and the instructions of its `forward`, names and constants."""
    kind = type(module).__qualname__
    code = getattr(getattr(module, "forward", None), "__code__", None)
    if not isinstance(code, CodeType):
        return kind
    constants = [c for c in code.co_consts if isinstance(c, CONSTANTS)]
    return f"{kind} {code.co_code.hex()} {code.co_names} {constants}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
