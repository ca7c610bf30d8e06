"""What the user fixed: layers that stay in float and options set by hand, by name or pattern."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sft.core.errors import InputError
from sft.core.records import KEEP, Candidate, LayerProfile, Option, Profile
from sft.planning.menus import runs

NEAREST = 5


def asked_options(
    profile: Profile, keep: Sequence[str], overrides: Mapping[str, Option]
) -> dict[str, Option]:
    """The options that the user fixed, by layer; each is on the menu of its layer.

    An exact name wins over a pattern (`layer1.*`). Raises `InputError` for a name or pattern that
    no layer has, for two patterns that want different things of a layer, and for an option that is
    not on the menu.
    """
    entries = {entry.layer.name: entry for entry in profile.layers}
    exact: dict[str, tuple[str, Option]] = {}
    loose: dict[str, tuple[str, Option]] = {}
    for what, pattern, option in _wishes(keep, overrides):
        names = [pattern] if pattern in entries else [n for n in entries if fnmatchcase(n, pattern)]
        if not names:
            raise InputError(f"{what} matches no layer. The layers are: {', '.join(entries)}.")
        for name in names:
            place = exact if name == pattern else loose
            said, before = place.setdefault(name, (what, option))
            if before != option:
                raise InputError(
                    f"Layer '{name}' is to become '{before}' ({said}) and '{option}' ({what}). "
                    f"Take one of them out."
                )
    found = loose | exact
    return {n: _on_menu(entries[n], found[n][1]).option for n in entries if n in found}


def kept(entry: LayerProfile) -> Candidate:
    """The layer as it is; raises `InputError` if its menu does not say what that costs."""
    for candidate in entry.candidates:
        if candidate.option.scheme == KEEP:
            return candidate
    raise InputError(
        f"The profile has no 'keep' option for layer '{entry.layer.name}', so what the original "
        f"costs is unknown. Profile the model again."
    )


def _wishes(keep: Sequence[str], overrides: Mapping[str, Option]) -> list[tuple[str, str, Option]]:
    """What was said, the name or pattern, and the option it stands for."""
    patterns = (keep,) if isinstance(keep, str) else keep
    wishes = [(f"keep='{pattern}'", pattern, Option(KEEP)) for pattern in patterns]
    return wishes + [(f"the option for '{n}'", n, option) for n, option in overrides.items()]


def _on_menu(entry: LayerProfile, option: Option) -> Candidate:
    if option.scheme == KEEP:
        kept(entry)
    menu = {c.option: c for c in entry.candidates}
    found = menu.get(option)
    if found is not None and runs(found):
        return found
    what = "is not on its menu" if found is None else "could not be measured there"
    if found is not None and math.isfinite(found.damage):
        what = "does not run in the target"
    measured = [c.option for c in entry.candidates if runs(c)]
    nearest = sorted(measured, key=lambda other: _distance(option, other))[:NEAREST]
    why = entry.layer.refusals.get(option.scheme)
    raise InputError(
        f"'{option}' for layer '{entry.layer.name}' with weight {entry.layer.weight_shape} {what}"
        f"{f' ({why})' if why else ''}. The nearest of its {len(measured)} options are: "
        f"{', '.join(map(str, nearest))}."
    )


def _distance(wanted: Option, other: Option) -> tuple[bool, int, int]:
    """How far one option is from another: first the scheme, then the rank, then the bits."""
    rank = abs(sum(wanted.rank) - sum(other.rank))
    bits = abs((wanted.weight_bits or 32) - (other.weight_bits or 32))
    return wanted.scheme != other.scheme, rank, bits
