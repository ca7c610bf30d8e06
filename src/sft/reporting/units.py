"""Numbers as people read them: KB of 1000 bytes, K and M, ms, %, "4.20x less".

Every function takes what stands in a record or a JSON file; what is no number (None, NaN, text)
gives `DASH`. Values are rounded to three digits unless said otherwise.
"""

import math
from typing import Any

DASH = "-"


def number(value: Any) -> float | None:
    """`value` as a float, or None if it is no number (a truth value and NaN are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def finite(value: Any) -> float | None:
    """`number`, but None for an infinite one."""
    x = number(value)
    return None if x is None or math.isinf(x) else x


def short(value: Any) -> str:
    """Three digits, without an exponent: 0.0123, 1.63, 80.5, 1234."""
    x = number(value)
    if x is None:
        return DASH
    if x == 0 or math.isinf(x):
        return f"{x:g}"
    rounded = float(f"{x:.2e}")
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def general(value: Any) -> str:
    """Three digits, with an exponent where the number is very small or great: 1.2e-05."""
    x = number(value)
    return DASH if x is None else f"{x:.3g}"


def size(value: Any) -> str:
    """Bytes: 512 B, 3.00 KB, 2.79 MB."""
    return _scaled(value, (" B", " KB", " MB", " GB", " TB"))


def count(value: Any) -> str:
    """Parameters or multiply-accumulates: 512, 696 K, 80.5 M."""
    return _scaled(value, ("", " K", " M", " G", " T"))


def milliseconds(value: Any) -> str:
    return _with_unit(value, " ms")


def decibels(value: Any) -> str:
    return _with_unit(value, " dB")


def percent(value: Any) -> str:
    """A share of one as a percentage with two decimals: 0.942 is 94.20%."""
    x = number(value)
    return DASH if x is None else f"{100 * x:.2f}%"


def duration(value: Any) -> str:
    """Seconds: 0.10 s, 40.0 s, 2 min 30 s, 1 h 5 min."""
    x = number(value)
    if x is None or math.isinf(x) or x < 59.95:
        return _with_unit(value, " s")
    minutes, seconds = divmod(round(x), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {seconds} s"


def shape(sides: Any) -> str:
    """Sides of a shape or ranks: 64 x 3 x 3; a dash where there are none."""
    if isinstance(sides, list | tuple):
        return " x ".join(str(side) for side in sides) or DASH
    return DASH if sides is None else str(sides)


def factor(before: Any, after: Any) -> float | None:
    """How many times smaller `after` is than `before` (below 1: it grew); None if unknown."""
    b, a = finite(before), finite(after)
    if b is None or a is None or b <= 0 or a <= 0:
        return None
    return b / a


def times(before: Any, after: Any, less: str = "less", more: str = "more") -> tuple[str, str]:
    """The change as a number that is at least 1 and a word: ("9.30", less), ("1.25", more)."""
    ratio = factor(before, after)
    if ratio is None:
        return DASH, less
    return (short(ratio), less) if ratio >= 1 else (short(1 / ratio), more)


def ratio_text(before: Any, after: Any) -> str:
    """`times` in one cell: "9.30x less"; "1.00x" where nothing changed."""
    value, word = times(before, after)
    if value in (DASH, "1.00"):
        return value if value == DASH else "1.00x"
    return f"{value}x {word}"


def is_share(*scores: Any) -> bool:
    """Whether the scores read as shares of one (all that are known lie from 0 to 1)."""
    known = [x for x in map(number, scores) if x is not None]
    return all(0 <= x <= 1 for x in known)


def score(value: Any, share: bool) -> str:
    """A score in percent if it is a share, else in its own unit with four digits."""
    x = number(value)
    if x is None:
        return DASH
    return percent(x) if share else f"{x:.4g}"


def score_change(before: Any, after: Any) -> tuple[str, str]:
    """The change with its sign, and its unit: ("-0.30", "points"), or the score's own unit."""
    b, a = number(before), number(after)
    if b is None or a is None:
        return DASH, ""
    if is_share(b, a):
        return f"{round(100 * (a - b), 2) + 0.0:+.2f}", "points"
    return f"{a - b:+.3g}", ""


def _with_unit(value: Any, unit: str) -> str:
    text = short(value)
    return text if text == DASH else text + unit


def _scaled(value: Any, units: tuple[str, ...]) -> str:
    x = number(value)
    if x is None:
        return DASH
    if math.isinf(x):
        return f"{x:g}"
    step = 0
    while step < len(units) - 1 and abs(float(f"{x:.2e}")) >= 1000:
        x, step = x / 1000, step + 1
    whole = step == 0 and x == int(x)
    return (f"{x:.0f}" if whole else short(x)) + units[step]
