"""What was chosen: one option per layer, and the front of all such choices."""

import dataclasses
import math
from typing import Any

from pydantic.dataclasses import dataclass

from sft.core.errors import InputError
from sft.core.records.layers import Cost, Option
from sft.core.records.record import FORMAT, STRICT, Record

STATUSES = ("optimal", "feasible", "edited")


@dataclass(frozen=True, config=STRICT)
class PlanRow(Record):
    """One layer of a plan, with the reason in words."""

    name: str
    option: Option
    predicted_damage: float | None
    cost: Cost
    reason: str

    def __post_init__(self) -> None:
        if self.predicted_damage is not None and math.isnan(self.predicted_damage):
            raise ValueError(
                f"predicted_damage of '{self.name}' is nan; a number or null is wanted"
            )
        _check_cost(f"the cost of '{self.name}'", self.cost)


@dataclass(frozen=True, config=STRICT)
class Plan(Record):
    """One option per layer; made by `plan`, edited by people, read by `apply`.

    `value` is the predicted damage of the whole, `bound` a proven lower bound of that of any plan
    within the limits, `gap` their relative distance. `status` is "optimal" (the gap is closed),
    "feasible" (it is not) or "edited". Costs are of the whole network.
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

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is '{self.status}'; it is one of {', '.join(STATUSES)}")
        for name in ("value", "bound", "gap"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; a finite number is wanted")
        if any(side < 1 for side in self.input_shape):
            raise ValueError(f"input_shape is {self.input_shape}; each side must be at least 1")
        _check_cost("cost", self.cost)
        _check_cost("original", self.original)

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


def _check_cost(what: str, cost: Cost) -> None:
    for name, value in dataclasses.asdict(cost).items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} in {what} is {value}; it must be 0 or more")


@dataclass(frozen=True, config=STRICT)
class FrontPoint(Record):
    """A whole network: what it costs, its predicted damage, and a proven lower bound of the damage
    at that cost. `layers` says in words what becomes of each layer.
    """

    cost: Cost
    damage: float
    bound: float
    layers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Front(Record):
    """The least damage at each cost ("size" or "latency"), from the cheapest network up.

    No point is beaten by another: with rising cost the damage falls.
    """

    model: str
    target: str
    cost: str
    points: tuple[FrontPoint, ...]
    format: int = FORMAT
