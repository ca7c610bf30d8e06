"""Swinging weights against a plain loop over the algorithm, and what freezing does to a weight."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sft.quantizers.fake import WeightFakeQuantize
from sft.training.oscillation import (
    FIRST_THRESHOLD,
    LAST_THRESHOLD,
    MOMENTUM,
    Oscillations,
    Trace,
)


def frozen_by_hand(path: list[int], thresholds: list[float]) -> tuple[int, int | None]:
    """The last integer of one weight and the step at which it was frozen, after the paper."""
    last, mean, frequency, direction = path[0], float(path[0]), 0.0, 0
    for step, (now, threshold) in enumerate(zip(path[1:], thresholds, strict=True)):
        change = (now > last) - (now < last)
        frequency += MOMENTUM * ((change * direction < 0) - frequency)
        mean += MOMENTUM * (now - mean)
        direction, last = change or direction, now
        if frequency > threshold:
            return round(mean), step
    return last, None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.9))
def test_traces_equal_a_loop_over_each_weight(seed: int, moving: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(-1, 2, (80, 6), generator=generator)
    moves *= torch.rand(80, 6, generator=generator) < moving
    paths = moves.cumsum(0).clamp(-7, 7).to(torch.int8)
    thresholds = torch.linspace(0.06, 0.02, 79).tolist()
    trace = Trace.of(paths[0])
    for now, threshold in zip(paths[1:], thresholds, strict=True):
        trace.follow(now, threshold)
    for column in range(6):
        last, step = frozen_by_hand(paths[:, column].tolist(), thresholds)
        assert bool(trace.frozen[column]) == (step is not None)
        assert int(trace.last[column]) == last


def rounding_of(bits: int) -> WeightFakeQuantize:
    top = 2 ** (bits - 1) - 1
    rounding = WeightFakeQuantize(torch.int8, -top, top)
    rounding.freeze(torch.tensor([0.5, 0.1]))
    return rounding


def test_a_swinging_weight_is_held_and_a_drifting_one_goes_on() -> None:
    rounding = rounding_of(4)
    weight = nn.Parameter(torch.tensor([[0.5, -1.0], [0.3, 0.1]]))
    found = Oscillations({"w": (weight, rounding)})
    assert found.frozen_share() == 0
    for step in range(200):
        with torch.no_grad():
            weight[0, 0] = 0.5 if step % 10 else 1.0  # mostly at 1
            weight[0, 1] = -1.0 + 0.01 * step
        found.follow(step / 200)
    assert found.traces["w"].frozen.tolist() == [[True, False], [False, False]]
    assert found.frozen_share() == 0.25
    held, drifting = weight.detach()[0].tolist()
    assert held == 0.5
    assert math.isclose(drifting, 0.99, rel_tol=1e-5)
    rounding.scale = torch.tensor([0.6, 0.1])
    found.follow(1.0)  # the integer stays, the step may move on
    assert math.isclose(float(weight.detach()[0, 0]), 0.6, rel_tol=1e-6)


def test_the_threshold_falls_as_training_goes_on() -> None:
    frozen = {}
    for progress in (0.0, 1.0):
        rounding = rounding_of(4)
        weight = nn.Parameter(torch.zeros(2, 1))
        found = Oscillations({"w": (weight, rounding)})
        for step in range(8):
            with torch.no_grad():
                weight[0, 0] = 0.5 * ((step // 2) % 2)
            found.follow(progress)
        frozen[progress] = bool(found.traces["w"].frozen[0, 0])
    assert frozen == {0.0: False, 1.0: True}
    assert LAST_THRESHOLD < 2.9 * MOMENTUM < FIRST_THRESHOLD


def test_fine_weights_are_not_followed() -> None:
    weight = nn.Parameter(torch.zeros(2, 1))
    assert Oscillations({"w": (weight, rounding_of(8))}).state() == {}
    assert set(Oscillations({"w": (weight, rounding_of(4))}).state()) == {
        f"oscillation:w:{field}" for field in ("frequency", "mean", "last", "direction", "frozen")
    }
