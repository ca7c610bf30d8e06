"""Plans and options as JSON that a hand has changed: nonsense is refused by the field's name."""

import json

import pytest

from sft.core.errors import InputError
from sft.core.records import Cost, Option, Plan, PlanRow

COST = Cost(10, 20, 30, 0.5, 40)
ROWS = (PlanRow("fc", Option("dense"), 0.25, COST, "because"),)
PLAN = Plan("m", "t", {}, ROWS, COST, COST, "optimal", 0.25, 0.25, 0.0, input_shape=(3, 8, 8))


def edited(place: str, value: object) -> str:
    """The plan's JSON with one value changed; `place` is its path, `rows` standing for the row."""
    plain = PLAN.to_dict()
    *path, last = place.split(".")
    inner = plain
    for key in path:
        inner = inner[key][0] if key == "rows" else inner[key]
    assert last in inner
    inner[last] = value
    return json.dumps(plain)


@pytest.mark.parametrize("status", ["optimal", "feasible", "edited"])
def test_what_makes_sense_is_read_back(status) -> None:
    assert Plan.from_json(edited("status", status)).status == status
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(edited("rows.predicted_damage", None)).rows[0].predicted_damage is None
    for option in ({"scheme": "keep", "weight_bits": None}, {"scheme": "stored", "weight_bits": 4}):
        assert Plan.from_json(edited("rows.option", option)).option("fc") == Option(**option)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("status", "banana", "status is 'banana'; it is one of optimal, feasible, edited"),
        ("status", "infeasible", "status is 'infeasible'"),
        ("value", float("nan"), "value is nan"),
        ("bound", float("-inf"), "bound is -inf"),
        ("gap", float("nan"), "gap is nan"),
        ("input_shape", [3, -1, 12], r"input_shape is \(3, -1, 12\); each side must be at least 1"),
        ("input_shape", [3, 0, 12], "input_shape is"),
        ("cost.size", -1, "size in cost is -1; it must be 0 or more"),
        ("original.latency", float("nan"), "latency in original is nan"),
        ("rows.cost.macs", -5, "macs in the cost of 'fc' is -5"),
        ("rows.predicted_damage", float("nan"), "predicted_damage of 'fc' is nan"),
        (
            "rows.option.weight_bits",
            None,
            "'dense' needs weight_bits, 2 to 8; 'keep' stays in float",
        ),
        ("rows.option", {"scheme": "stored", "weight_bits": None}, "'stored' needs weight_bits"),
        ("rows.option.weight_bits", 9, "weight_bits is 9"),
        ("rows.option.rank", [3], r"'dense' takes no rank; \(3,\) was given"),
        ("rows.option", {"scheme": "channel_in", "rank": [0]}, "each must be at least 1"),
    ],
)
def test_nonsense_is_refused_with_the_file_and_the_field(place, value, words) -> None:
    with pytest.raises(InputError, match=f"'plan.json' is not a valid Plan.*{words}"):
        Plan.from_json(edited(place, value), "plan.json")
