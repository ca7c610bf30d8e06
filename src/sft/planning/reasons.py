"""Why a layer got its option, in words made of the menu's own numbers."""

from collections.abc import Collection

from sft.core.records import DENSE, KEEP, STORED, Candidate, LayerProfile
from sft.planning.edit import default_full_rank
from sft.planning.menus import fastest, gains_no_time, is_low_rank

SIZE_ONLY = "this saves size, not time: the runtime has no integer kernel for it"


def explain(entry: LayerProfile, chosen: Candidate, asked: bool, limits: Collection[str]) -> str:
    """A few clauses on the chosen candidate of a layer.

    asked : the user fixed this option. limits : the costs that were limited.
    """
    option = chosen.option
    if option.scheme == KEEP:
        return _why_kept(entry, asked)
    said = [f"{_title(entry, chosen)}{' as asked' if asked else ''}: {_facts(entry, chosen)}"]
    if option.scheme == STORED:
        said.append(SIZE_ONLY)
    if asked or (option.scheme == STORED and not limits):
        return "; ".join(said)
    if not limits:
        return f"{said[0]}; no limit on its cost was asked, so nothing more is done"
    if option.scheme == DENSE:
        said.append(_why_not_low_rank(entry, chosen))
    elif is_low_rank(chosen):
        said += [_dense(entry, chosen), _in_vain(entry)]
    said.append(_these_bits(entry, chosen))
    return "; ".join(clause for clause in said if clause)


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


def milliseconds(value: float) -> str:
    """A latency for people: 0.031 ms, 12.3 ms."""
    return f"{value:.3g} ms"


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


def _why_kept(entry: LayerProfile, asked: bool) -> str:
    if asked:
        return "kept in float as asked"
    dense = _first(entry, DENSE) or _first(entry, STORED)
    if dense is None:
        return "kept in float: its menu has no integer option"
    return f"kept in float: rounding it alone would have damage {number(dense.damage)}"


def _facts(entry: LayerProfile, chosen: Candidate) -> str:
    """What is gained over the original layer, and the damage."""
    damage, low = f"damage {number(chosen.damage)}", is_low_rank(chosen)
    fewer, smaller = (
        _gain(entry, chosen, *of) for of in (("macs", "fewer MACs"), ("size", "smaller"))
    )
    gains = [(fewer or smaller) if low else smaller, _gain(entry, chosen, "latency", "faster")]
    gain = " and ".join(filter(None, gains))
    if not low:
        return f"{damage}, {gain}" if gain else damage
    return f"{gain} for {damage}" if gain else f"{damage}, with no saving in size or MACs"


def _gain(entry: LayerProfile, chosen: Candidate, cost: str, word: str) -> str:
    """ "1.8x faster" than the layer in float; empty below 1.05 or where it is not known."""
    kept = _first(entry, KEEP)
    before = getattr(kept.cost, cost) if kept else None
    after = getattr(chosen.cost, cost)
    if before is None or after is None:
        return ""
    ratio = before / max(after, 1e-12)
    return f"{ratio:.1f}x {word}" if ratio >= 1.05 else ""


def _dense(entry: LayerProfile, chosen: Candidate) -> str:
    """What the whole kernel would cost, at the bits of the chosen option where there are such."""
    dense = [c for c in entry.candidates if c.option.scheme == DENSE]
    same = [c for c in dense if c.option.weight_bits == chosen.option.weight_bits] or dense
    return f"dense would cost {_prices(min(same, key=lambda c: c.damage))}" if same else ""


def _prices(candidate: Candidate) -> str:
    """ "7.2 M MACs and 12.0 kB", with the latency where it is known."""
    cost = candidate.cost
    texts = [amount(cost.macs, "MACs"), amount(cost.size, "B")]
    if cost.latency is not None:
        texts.append(milliseconds(cost.latency))
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def _in_vain(entry: LayerProfile) -> str:
    """That no low rank is faster here, where that is known; else empty."""
    found = fastest(entry)
    if found is None or not gains_no_time(entry):
        return ""
    low, whole = found
    scheme = "dense" if whole.option.scheme == DENSE else "whole in float"
    return (
        f"low rank gains no time here: the fastest, {_split(low)}, takes "
        f"{milliseconds(low.cost.latency or 0.0)}, {scheme} "
        f"{milliseconds(whole.cost.latency or 0.0)}"
    )


def _split(candidate: Candidate) -> str:
    """ "channel_in rank 8"."""
    return f"{candidate.option.scheme} rank {','.join(map(str, candidate.option.rank))}"


def _these_bits(entry: LayerProfile, chosen: Candidate) -> str:
    """What the next wider weights would cost, or what damage the next narrower would do."""
    option, bits = chosen.option, chosen.option.weight_bits
    if bits is None:
        return ""
    like = {
        c.option.weight_bits: c
        for c in entry.candidates
        if (c.option.scheme, c.option.rank) == (option.scheme, option.rank) and c.option.weight_bits
    }
    wider = min((b for b in like if b and b > bits), default=None)
    narrower = max((b for b in like if b and b < bits), default=None)
    if wider is not None:
        other = like[wider]
        return f"{wider} bits would take {amount(other.cost.size, 'B')} for {number(other.damage)}"
    if narrower is not None:
        return f"{narrower} bits would have damage {number(like[narrower].damage)}"
    return ""


def _why_not_low_rank(entry: LayerProfile, chosen: Candidate) -> str:
    low = [c for c in entry.candidates if is_low_rank(c)]
    if not low:
        if entry.layer.refusals:
            refused = "; ".join(f"{scheme}: {why}" for scheme, why in entry.layer.refusals.items())
            return f"no low rank ({refused})"
        return "no low rank is on its menu"
    if vain := _in_vain(entry):
        return vain
    cost = chosen.cost
    cheaper = [c for c in low if c.cost.macs < cost.macs or c.cost.size < cost.size]
    if not cheaper:
        return "low rank saves nothing here"
    mildest = min(cheaper, key=lambda c: (c.damage, c.cost.macs))
    return (
        f"the mildest low rank, {mildest.option}, would have damage {number(mildest.damage)}, "
        f"{_prices(mildest)}"
    )


def _first(entry: LayerProfile, scheme: str) -> Candidate | None:
    return next((c for c in entry.candidates if c.option.scheme == scheme), None)
