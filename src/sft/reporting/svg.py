"""The two pictures of the page as inline SVG: size against score, and bars a layer.

Built with `xml.etree`, so they are well-formed and escaped whatever a layer is called. Colours
and fonts are classes that the page's style sheet fills in; no reference leaves the page.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from xml.etree import ElementTree

from sft.reporting import units

WIDTH, HEIGHT = 600, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 20, 48
LOG_FROM = 3.0
MOST_BARS = 40
ROW, BAR, NAMES, VALUES, LONGEST_NAME = 30, 9, 170, 80, 24


@dataclasses.dataclass(frozen=True)
class Point:
    """One network: `size` in bytes, `score` in the unit of the axis; `kind` is its CSS class."""

    name: str
    kind: str
    size: float
    score: float


@dataclasses.dataclass(frozen=True)
class Bar:
    """One layer before and after; what is None is not drawn."""

    name: str
    before: float | None
    after: float | None

    @property
    def longest(self) -> float:
        return max(self.before or 0.0, self.after or 0.0)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values `low` to `high` laid out over pixels `start` to `end`, evenly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log(low), math.log(high), math.log(value)
        return round(self.start + (self.end - self.start) * (x - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Round values inside the axis: steps of 1, 2 or 5, or 1-2-5 a decade."""
        if self.log:
            exponents = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            found = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
            inside = [t for t in found if self.low <= t <= self.high]
            return inside if len(inside) <= 7 else inside[:: math.ceil(len(inside) / 7)]
        step = self.step()
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def step(self) -> float:
        rough = (self.high - self.low) / 4
        base = 10.0 ** math.floor(math.log10(rough))
        return next(m * base for m in (1, 2, 5, 10) if m * base >= rough * 0.999)


def size_against_score(points: Sequence[Point], metric: str, unit: str) -> str:
    """Size of the file (x) against score (y), each point labelled.

    points : one or two, of positive size. unit : "%" or "" (the score's own).
    """
    x_axis = _size_axis([p.size for p in points])
    y_axis = _score_axis([p.score for p in points], unit)
    picture = _picture(WIDTH, HEIGHT, f"Size of the file against {metric}")
    _draw_axes(picture, x_axis, y_axis, metric, unit)
    if len(points) == 2:
        ends = [(x_axis.at(p.size), y_axis.at(p.score)) for p in points]
        (x1, y1), (x2, y2) = ends
        _add(picture, "line", "way", x1=x1, y1=y1, x2=x2, y2=y2)
    highest = max(points, key=lambda p: p.score)
    for point in points:
        _draw_point(picture, point, x_axis, y_axis, unit, above=point is highest)
    return ElementTree.tostring(picture, encoding="unicode")


def front_line(
    points: Sequence[tuple[float, float]], what: str, text: Callable[[float], str]
) -> str:
    """Damage (y) against a cost (x), both by logarithm, as joined dots; empty below two points.

    points : pairs of cost and damage by rising cost; those that are not above 0 are left out.
    what : the cost. text : a cost in words.
    """
    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in shown}) < 2 or len({y for _, y in shown}) < 2:
        return ""
    costs, damages = [x for x, _ in shown], [y for _, y in shown]
    x = Axis(min(costs) / 1.1, max(costs) * 1.1, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min(damages) / 1.5, max(damages) * 1.5, HEIGHT - BOTTOM, TOP, log=True)
    picture = _picture(WIDTH, HEIGHT, f"Damage against {what}")
    for tick in x.ticks():
        _add(picture, "line", "grid", x1=x.at(tick), y1=TOP, x2=x.at(tick), y2=HEIGHT - BOTTOM)
        label = _add(picture, "text", "tick", text(tick), x=x.at(tick), y=HEIGHT - BOTTOM + 17)
        label.set("text-anchor", "middle")
    for tick in y.ticks():
        _add(picture, "line", "grid", x1=LEFT, y1=y.at(tick), x2=WIDTH - RIGHT, y2=y.at(tick))
        label = _add(picture, "text", "tick", f"{tick:g}", x=LEFT - 8, y=y.at(tick) + 4)
        label.set("text-anchor", "end")
    for (x1, y1), (x2, y2) in pairwise(shown):
        _add(picture, "line", "way", x1=x.at(x1), y1=y.at(y1), x2=x.at(x2), y2=y.at(y2))
    for cost, damage in shown:
        _add(picture, "circle", "after", cx=x.at(cost), cy=y.at(damage), r=3)
    return ElementTree.tostring(picture, encoding="unicode")


def layer_bars(bars: Sequence[Bar], what: str, text: Callable[[float], str]) -> str:
    """Horizontal bars, before over after, a row a layer; of many layers the greatest.

    what : what the bars measure, for the title. text : a value in words ("2.00 M").
    """
    shown = _greatest(bars)
    longest = max((bar.longest for bar in shown), default=0.0) or 1.0
    picture = _picture(WIDTH, ROW * len(shown) + 8, f"{what} of each layer, before and after")
    for index, bar in enumerate(shown):
        top = 4 + ROW * index
        label = _add(picture, "text", "name", _tail(bar.name), x=NAMES - 10, y=top + 14)
        label.set("text-anchor", "end")
        _add(label, "title", "", bar.name)
        for row, (kind, value) in enumerate((("before", bar.before), ("after", bar.after))):
            if value is None:
                continue
            y = top + 1 + row * (BAR + 2)
            length = round((WIDTH - NAMES - VALUES) * value / longest, 1)
            _add(picture, "rect", kind, x=NAMES, y=y, width=length, height=BAR)
            _add(picture, "text", "value", text(value), x=NAMES + length + 6, y=y + BAR)
    return ElementTree.tostring(picture, encoding="unicode")


def _picture(width: int, height: int, title: str) -> ElementTree.Element:
    picture = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img"})
    _add(picture, "title", "", title)
    return picture


def _add(
    parent: ElementTree.Element, tag: str, kind: str, text: str = "", **attributes: float
) -> ElementTree.Element:
    made = ElementTree.SubElement(parent, tag, {k: f"{v:g}" for k, v in attributes.items()})
    if kind:
        made.set("class", kind)
    made.text = text or None
    return made


def _size_axis(sizes: Sequence[float]) -> Axis:
    low, high = min(sizes), max(sizes)
    start, end = LEFT, WIDTH - RIGHT
    if high / low >= LOG_FROM:
        return Axis(low / 1.6, high * 1.6, start, end, log=True)
    return Axis(0.0, high * 1.15, start, end)


def _score_axis(scores: Sequence[float], unit: str) -> Axis:
    low, high = min(scores), max(scores)
    least = 0.5 if unit == "%" else 0.01 * max(abs(low), abs(high)) or 1.0
    room = max(0.6 * (high - low), least)
    return Axis(low - room, high + room, HEIGHT - BOTTOM, TOP)


def _draw_axes(picture: ElementTree.Element, x: Axis, y: Axis, metric: str, unit: str) -> None:
    for tick in x.ticks():
        at = x.at(tick)
        _add(picture, "line", "grid", x1=at, y1=TOP, x2=at, y2=HEIGHT - BOTTOM)
        label = _add(picture, "text", "tick", units.size(tick), x=at, y=HEIGHT - BOTTOM + 17)
        label.set("text-anchor", "middle")
    decimals = max(0, -math.floor(math.log10(y.step())))
    for tick in y.ticks():
        if unit == "%" and not -1e-9 <= tick <= 100 + 1e-9:
            continue
        at = y.at(tick)
        _add(picture, "line", "grid", x1=LEFT, y1=at, x2=WIDTH - RIGHT, y2=at)
        text = f"{tick + 0.0:.{decimals}f}{unit}"
        _add(picture, "text", "tick", text, x=LEFT - 8, y=at + 4).set("text-anchor", "end")
    scale = ", log scale" if x.log else ""
    below = _add(picture, "text", "tick", f"size of the file{scale}", x=WIDTH - RIGHT, y=HEIGHT - 8)
    below.set("text-anchor", "end")
    _add(picture, "text", "tick", metric, x=LEFT + 6, y=TOP + 4)


def _draw_point(
    picture: ElementTree.Element, point: Point, x: Axis, y: Axis, unit: str, above: bool
) -> None:
    across, down = x.at(point.size), y.at(point.score)
    _add(picture, "circle", point.kind, cx=across, cy=down, r=6)
    score = f"{point.score:.2f}%" if unit == "%" else f"{point.score:.4g}"
    text = f"{point.name}: {units.size(point.size)}, {score}"
    label = _add(picture, "text", "label", text, x=across, y=down + (-13 if above else 24))
    place = (across - LEFT) / (WIDTH - LEFT - RIGHT)
    label.set("text-anchor", "start" if place < 0.4 else "end" if place > 0.6 else "middle")


def _greatest(bars: Sequence[Bar]) -> list[Bar]:
    """The `MOST_BARS` greatest, in the order given."""
    ranked = sorted(range(len(bars)), key=lambda i: -bars[i].longest)
    return [bars[i] for i in sorted(ranked[:MOST_BARS])]


def _tail(name: str) -> str:
    """The end of a long name: it tells layers apart better than the start."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]
