"""A budget refuses what is no limit, by the name of the field."""

import math
from fractions import Fraction

import numpy as np
import pytest

from sft.core.budget import ABSOLUTE, FRACTIONS, Budget
from sft.core.errors import InputError
from sft.core.records import Cost


@pytest.mark.parametrize("value", ["0.1", [0.1], True, math.nan, math.inf, -math.inf, 0, -0.1])
@pytest.mark.parametrize("name", [*FRACTIONS, *ABSOLUTE])
def test_what_is_no_number_above_zero_is_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"Budget {name}="):
        Budget(**{name: value})


@pytest.mark.parametrize(
    "wrong",
    [{"size": 1.1}, {"macs_count": 10**400}, {"max_drop": "0.1"}, {"max_drop": -0.1},
     {"max_drop": math.nan}, {"minimize": "memory", "max_drop": 0.1}, {"minimize": "size"}],
    ids=lambda wrong: " ".join(wrong),
)  # fmt: skip
def test_other_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"Budget {next(iter(wrong))}="):
        Budget(**wrong)


def test_numbers_of_any_kind_are_limits() -> None:
    original = Cost(params=10, macs=1000, size=400, latency=8.0)
    budget = Budget(size=np.float32(0.5), macs=Fraction(1, 4), size_bytes=np.int64(100), latency=1)
    assert budget.limits(original) == {"size": 100, "macs": 250, "latency": 8.0}
    assert Budget().limits(original) == {}
    assert set(budget.asked()) == {"size", "macs", "size_bytes", "latency"}
