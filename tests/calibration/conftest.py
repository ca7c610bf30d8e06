"""Plans without a budget: every layer whole, in so many bits."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sft.core.records import Cost, Option, Plan, PlanRow
from sft.models.inspect import inspect

MakePlan = Callable[..., Plan]


def dense_plan(model: nn.Module, example: torch.Tensor, bits: int, target: str) -> Plan:
    rows = tuple(
        PlanRow(layer.name, Option("dense", (), bits), 0.0, Cost(1, 1, 1), "asked for")
        for layer in inspect(model, example, "m").layers
    )
    whole = Cost(1, 1, 1)
    return Plan("m", target, {}, rows, whole, whole, "optimal", 0, 0, 0, tuple(example.shape[1:]))


@pytest.fixture
def make_plan() -> MakePlan:
    return dense_plan
