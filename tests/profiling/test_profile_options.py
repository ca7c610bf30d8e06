"""Every option of `profile` moves what it is for, and nonsense is refused by the option's name."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, STORED, Profile
from sft.profiling.profile import profile, trusted
from sft.profiling.request import schemes_asked, widths_asked
from sft.profiling.samples import collect_inputs
from sft.profiling.statistics import gather_statistics
from sft.runtimes.targets import find_target

Measure = Callable[..., Profile]
WHOLE = {KEEP, DENSE, STORED}


@pytest.fixture(scope="module")
def measure(shared, profiled) -> Measure:
    """Each set of options is measured once; nothing here changes a profile."""
    net, data = shared
    known = {"[('rank_multiple', 2)]": profiled}

    def measured(**options: object) -> Profile:
        key = repr(sorted(options.items()))
        if key not in known:
            known[key] = profile(net, data, "onnxruntime-avx2", **options)
        return known[key]

    return measured


def options_of(measured: Profile) -> set:
    return {c.option for entry in measured.layers for c in entry.candidates}


def errors_of(measured: Profile) -> dict:
    return {
        (entry.layer.name, c.option): c.error for entry in measured.layers for c in entry.candidates
    }


def alphas_of(measured: Profile) -> dict:
    return {
        (entry.layer.name, scheme): alpha
        for entry in measured.layers
        for scheme, alpha in entry.alphas.items()
    }


def test_the_menus_hold_only_the_schemes_that_were_asked_for(measure) -> None:
    measured = measure(schemes=["spatial", "interpolative"])
    assert {o.scheme for o in options_of(measured)} == {*WHOLE, "spatial", "interpolative"}
    assert {o.scheme for o in options_of(measure(schemes=()))} == WHOLE


def test_a_single_scheme_and_a_single_width_may_stand_alone() -> None:
    target = find_target("onnxruntime-avx2")
    assert (
        schemes_asked("spatial", target) == schemes_asked(["spatial"] * 2, target) == ("spatial",)
    )
    assert schemes_asked(None, target) == tuple(sorted(target.schemes))
    assert widths_asked(4) == widths_asked([4]) == widths_asked(np.int64(4)) == (4,)
    assert widths_asked(range(2, 5)) == (4, 3, 2)


def test_in_float_no_option_has_bits_and_no_error_of_rounding(measure) -> None:
    rounded, exact = measure(), measure(weight_bits=None)
    assert {o.weight_bits for o in options_of(exact)} == {None}
    assert not {DENSE, STORED} & {o.scheme for o in options_of(exact)}
    splits = {(n, o.scheme, o.rank): e for (n, o), e in errors_of(exact).items() if o.rank}
    assert splits
    for (name, option), error in errors_of(rounded).items():
        if option.rank:
            assert splits[name, option.scheme, option.rank] < error


def test_fewer_bits_are_on_every_option_and_round_more(measure) -> None:
    eight, four = measure(weight_bits=8), measure(weight_bits=4)
    assert {o.weight_bits for o in options_of(four) if o.scheme != KEEP} == {4}
    for before, after in zip(eight.layers, four.layers, strict=True):
        (fine,), (coarse,) = (
            [c for c in entry.candidates if c.option.scheme == DENSE] for entry in (before, after)
        )
        assert coarse.error > 4 * fine.error
        assert coarse.cost.size < fine.cost.size


def test_the_usual_menus_hold_every_width_once(measure) -> None:
    for entry in measure().layers:
        bits = [c.option.weight_bits for c in entry.candidates if c.option.scheme == DENSE]
        assert bits == [8, 4, 2]
        stored = [c.option.weight_bits for c in entry.candidates if c.option.scheme == STORED]
        assert stored == [8]
    assert options_of(measure(weight_bits=[2, 8, 4, 8])) == options_of(measure())


def test_the_gradient_weighs_the_errors(measure) -> None:
    plain, aware = measure(), measure(loss_aware=True)
    assert all(s.gradient_covariance is None for s in plain.statistics.values())
    assert all(s.gradient_covariance is not None for s in aware.statistics.values())
    before, after = errors_of(plain), errors_of(aware)
    shared = [key for key in before if key in after and key[1].rank]
    assert shared
    assert all(before[key] != after[key] for key in shared)


def test_ranks_stand_on_the_multiple(measure) -> None:
    ranks = {r for o in options_of(measure(rank_multiple=2)) for r in o.rank}
    assert {2, 6} <= ranks
    assert all(r % 2 == 0 for r in ranks)
    assert all(r % 8 == 0 for o in options_of(measure()) for r in o.rank)


@pytest.mark.parametrize("option", [{"anchor_samples": 16}, {"anchor_error": 0.9}])
def test_the_anchor_moves_the_damage_and_not_the_error(measure, option) -> None:
    usual, moved = (measure(rank_multiple=2, **o) for o in ({}, option))
    assert errors_of(usual) == errors_of(moved)
    before, after = alphas_of(usual), alphas_of(moved)
    assert before.keys() == after.keys()
    splits = [key for key in before if key[1] not in WHOLE]
    assert any(before[key] != after[key] for key in splits)


@pytest.mark.parametrize(
    ("usual", "option"),
    [
        ({}, {"schemes": ["spatial", "interpolative"]}),
        ({}, {"weight_bits": 4}),
        ({}, {"loss_aware": True}),
        ({}, {"rank_multiple": 2}),
        ({"rank_multiple": 2}, {"anchor_samples": 16}),
        ({"rank_multiple": 2}, {"anchor_error": 0.9}),
    ],
)
def test_a_profile_made_otherwise_has_another_fingerprint(measure, usual, option) -> None:
    assert measure(**usual).fingerprint != measure(**usual, **option).fingerprint


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"schemes": ["cp"]}, "no decomposition 'cp'.*channel_in"),
        ({"weight_bits": 1}, "weight_bits=1: 2 to 8"),
        ({"weight_bits": 9}, "weight_bits=9: 2 to 8"),
        ({"rank_multiple": 0}, "rank_multiple=0"),
        ({"rank_multiple": -2}, "rank_multiple=-2"),
        ({"anchor_samples": 0}, "anchor_samples=0"),
        ({"anchor_error": 0.0}, "anchor_error=0.0"),
        ({"anchor_error": float("nan")}, "anchor_error=nan"),
        ({"anchor_error": float("inf")}, "anchor_error=inf"),
        ({"anchor_error": "0.1"}, "anchor_error='0.1'"),
        ({"anchor_error": None}, "anchor_error=None"),
        ({"anchor_samples": 1.5}, "anchor_samples=1.5: it must be a whole number"),
        ({"rank_multiple": 1.5}, "rank_multiple=1.5: it must be a whole number"),
        ({"rank_multiple": "2"}, "rank_multiple='2'"),
        ({"weight_bits": "8"}, "weight_bits='8': whole numbers"),
        ({"weight_bits": [8, 4.0]}, r"weight_bits=\[8, 4.0\]: whole numbers"),
        ({"schemes": "cp"}, "no decomposition 'cp'"),
        ({"schemes": 3}, "schemes=3: names of decompositions.*channel_in"),
        ({"schemes": ["spatial", 3]}, r"schemes=\['spatial', 3\]"),
    ],
)
def test_nonsense_is_refused(measure, option, words) -> None:
    with pytest.raises(InputError, match=words):
        measure(**option)


class Dividing(nn.Module):
    """The net, but what it takes for class 2 is divided by zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y / (y.argmax(1, keepdim=True) != 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "'odd' gives"), ({"data_free": True}, "'odd' gives"), ({"loss_aware": True}, "gives")],
    ids=str,
)
def test_a_model_whose_outputs_are_not_finite_is_refused(net, data, options, words) -> None:
    broken = int((net(data.calibration.inputs).argmax(1) == 2).sum())
    count = "" if "loss_aware" in options else f" {broken} of 128"
    assert 0 < broken < 128
    with pytest.raises(InputError, match=f"{words} NaN or infinite outputs for{count}"):
        profile(Dividing(net), data, "onnxruntime-avx2", name="odd", **options)


@pytest.mark.parametrize("options", [{}, {"data_free": True}], ids=str)
@pytest.mark.parametrize("at", [1, 6])
def test_samples_that_differ_in_shape_are_refused(net, data, options, at: int) -> None:
    batches = [batch for batch, _ in data.calibration] * 2
    batches[at] = batches[at][..., :9]
    words = rf"batch {at + 1} of the calibration data has shape \(1, 12, 9\), .* \(1, 12, 12\)"
    mixed = dataclasses.replace(data, calibration=batches)
    with pytest.raises(InputError, match=words):
        profile(net, mixed, "onnxruntime-avx2", **options)
    with pytest.raises(InputError, match=words):
        collect_inputs(batches, 32 * 8)


def test_statistics_of_too_few_positions_are_not_trusted(net: nn.Module, data: Data) -> None:
    found, _ = gather_statistics(net, ["down", "fc"], data.calibration, gradients=True)
    assert set(trusted(found)) == {"down"}
    assert found["fc"].count < 10 * 32
    rare = dataclasses.replace(found["down"], count=10 * 144)
    assert trusted({"down": rare})["down"].gradient_covariance is not None
    wide = dataclasses.replace(rare, output_mean=torch.zeros(1, 145))
    assert trusted({"down": wide})["down"].gradient_covariance is None
