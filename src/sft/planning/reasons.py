"""Why a layer got its option, in words made of the menu's own numbers."""

from sft.core.records import DENSE, KEEP, STORED, Candidate, LayerProfile
from sft.planning.edit import default_full_rank

SIZE_ONLY = "this saves size, not time: the runtime has no integer kernel for it"


def explain(entry: LayerProfile, chosen: Candidate, asked: bool, limited: bool) -> str:
    """One sentence on the chosen candidate of a layer.

    asked : the user fixed this option. limited : a limit on size or MACs was asked.
    """
    option = chosen.option
    if option.scheme == KEEP:
        if asked:
            return "kept in float as asked"
        dense = _first(entry, DENSE) or _first(entry, STORED)
        if dense is None:
            return "kept in float: its menu has no integer option"
        return f"kept in float: rounding it alone would have damage {number(dense.damage)}"
    text = f"{_title(entry, chosen)}{' as asked' if asked else ''}: "
    if option.scheme == STORED:
        return f"{text}{_facts(entry, chosen, _smaller(entry, chosen))}; {SIZE_ONLY}"
    if option.scheme == DENSE:
        text += _facts(entry, chosen, _smaller(entry, chosen))
    else:
        text += _facts(entry, chosen, _fewer_macs(entry, chosen) or _smaller(entry, chosen))
    if asked:
        return text
    if not limited:
        return f"{text}; no limit on size or MACs was asked, so nothing more is done"
    other = _why_not_low_rank(entry, chosen) if option.scheme == DENSE else _dense(entry, chosen)
    return f"{text}; {other}" if other else text


def number(value: float) -> str:
    """Damage for people: 0.0012."""
    return f"{value:.2g}"


def amount(value: float, unit: str) -> str:
    """A count for people: 7.2 M MACs, 12.0 kB."""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            glue = "" if unit == "B" else " "
            return f"{value / scale:.1f} {prefix}{glue}{unit}"
    return f"{value:.0f} {unit}"


def _title(entry: LayerProfile, chosen: Candidate) -> str:
    option = chosen.option
    if option.scheme == STORED:
        return f"stored in {option.weight_bits} bits, multiplied in float"
    rank = ""
    if option.rank:
        full = default_full_rank(option.scheme, entry.layer)
        rank = f" rank {','.join(map(str, option.rank))}"
        rank += f" of {','.join(map(str, full))}" if full else ""
    bits = f"at {option.weight_bits} bits" if option.weight_bits else "in float"
    return f"{option.scheme}{rank} {bits}"


def _facts(entry: LayerProfile, chosen: Candidate, gain: str) -> str:
    damage = f"damage {number(chosen.damage)}"
    if chosen.option.scheme in (DENSE, STORED):
        return f"{damage}, {gain}" if gain else damage
    return f"{gain} for {damage}" if gain else f"{damage}, with no saving in size or MACs"


def _smaller(entry: LayerProfile, chosen: Candidate) -> str:
    kept = _first(entry, KEEP)
    ratio = kept.cost.size / max(chosen.cost.size, 1) if kept else 0.0
    return f"{ratio:.1f}x smaller" if ratio >= 1.05 else ""


def _fewer_macs(entry: LayerProfile, chosen: Candidate) -> str:
    kept = _first(entry, KEEP)
    ratio = kept.cost.macs / max(chosen.cost.macs, 1) if kept else 0.0
    return f"{ratio:.1f}x fewer MACs" if ratio >= 1.05 else ""


def _dense(entry: LayerProfile, chosen: Candidate) -> str:
    """What the whole kernel would cost, at the bits of the chosen option where there are such."""
    dense = [c for c in entry.candidates if c.option.scheme == DENSE]
    same = [c for c in dense if c.option.weight_bits == chosen.option.weight_bits] or dense
    if not same:
        return ""
    best = min(same, key=lambda c: c.damage)
    return f"dense would cost {amount(best.cost.macs, 'MACs')} and {amount(best.cost.size, 'B')}"


def _why_not_low_rank(entry: LayerProfile, chosen: Candidate) -> str:
    low = [c for c in entry.candidates if c.option.scheme not in (KEEP, DENSE, STORED)]
    if not low:
        if entry.layer.refusals:
            refused = "; ".join(f"{scheme}: {why}" for scheme, why in entry.layer.refusals.items())
            return f"no low rank ({refused})"
        return "no low rank is on its menu"
    cost = chosen.cost
    cheaper = [c for c in low if c.cost.macs < cost.macs or c.cost.size < cost.size]
    if not cheaper:
        return "low rank saves nothing here"
    mildest = min(cheaper, key=lambda c: (c.damage, c.cost.macs))
    return (
        f"the mildest low rank, {mildest.option}, would have damage {number(mildest.damage)}, "
        f"{amount(mildest.cost.macs, 'MACs')} and {amount(mildest.cost.size, 'B')}"
    )


def _first(entry: LayerProfile, scheme: str) -> Candidate | None:
    return next((c for c in entry.candidates if c.option.scheme == scheme), None)
