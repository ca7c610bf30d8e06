"""Plans edited by hand: what fits passes, nonsense is refused by the layer's name."""

import dataclasses
import json

import numpy as np
import pytest

from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import Inspection, Layer, Option, Plan
from sft.planning import check_plan, plan
from sft.planning.edit import FULL_RANKS


@pytest.fixture
def made(profile):
    return plan(profile, Budget(size=0.2, macs=0.6))


@pytest.fixture
def layers(profile):
    return tuple(entry.layer for entry in profile.layers)


def edited(made, name, **option):
    """The plan after a hand changed the JSON of one row."""
    plain = json.loads(made.to_json())
    next(r for r in plain["rows"] if r["name"] == name)["option"] |= option
    return Plan.from_json(json.dumps(plain), "plan.json")


def test_a_made_plan_fits(made, layers, profile):
    check_plan(made, layers)
    check_plan(made, Inspection("made up", (1,), profile.params, profile.macs, layers))


@pytest.mark.parametrize(
    ("scheme", "unfolded"),
    [
        ("channel_in", lambda w: w.transpose(1, 0, 2, 3).reshape(w.shape[1], -1)),
        ("channel_out", lambda w: w.reshape(w.shape[0], -1)),
    ],
)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 8, 1, 1), (30, 2, 3, 3), (2, 30, 3, 3)])
def test_full_rank_is_that_of_the_unfolded_kernel(scheme, unfolded, shape):
    weight = np.random.default_rng(0).normal(size=shape)
    layer = Layer("x", "Conv2d", shape, True, (1,), (1,), 1)
    assert FULL_RANKS[scheme](layer) == np.linalg.matrix_rank(unfolded(weight))


def test_an_edit_that_fits_passes_and_survives_json(made, layers):
    for option in (Option("channel_out", (64,), 3), Option("keep"), Option("dense", (), 2)):
        changed = made.replace("stage2.conv2", option)
        assert changed.rows[4].predicted_damage is None
        again = Plan.from_json(changed.to_json())
        assert again.option("stage2.conv2") == option
        assert again.rows[4].predicted_damage is None
        assert again.to_json() == changed.to_json()
        check_plan(again, layers)


def test_rank_above_the_full_rank(made, layers):
    wrong = edited(made, "stage2.conv2", scheme="channel_out", rank=[65])
    with pytest.raises(InputError, match=r"stage2\.conv2.*\(64, 64, 3, 3\).*rank 1 to 64"):
        check_plan(wrong, layers)


def test_wrong_number_of_ranks(made, layers):
    wrong = edited(made, "stage2.conv2", scheme="channel_in", rank=[4, 4])
    with pytest.raises(InputError, match=r"stage2\.conv2.*takes 1 rank, the plan gives 2"):
        check_plan(wrong, layers)


def test_unknown_and_refused_schemes(made, layers):
    with pytest.raises(InputError, match=r"stage2\.conv2.*no scheme 'magic'.*channel_in"):
        check_plan(edited(made, "stage2.conv2", scheme="magic", rank=[4]), layers)
    with pytest.raises(InputError, match=r"'fc'.*\(10, 128\).*it is linear"):
        check_plan(edited(made, "fc", scheme="channel_in", rank=[4]), layers)


def test_a_scheme_that_is_misspelt_is_named_with_those_there_are(made, layers):
    wrong = edited(made, "stage2.conv2", scheme="chanel", rank=[])
    words = (
        r"'stage2\.conv2' with weight \(64, 64, 3, 3\) .* there is no scheme 'chanel'\. "
        r"Choose one of keep, dense, stored, channel_in, channel_out\."
    )
    with pytest.raises(InputError, match=words):
        check_plan(wrong, layers)
    with pytest.raises(InputError, match="takes 1 rank, the plan gives 0"):
        check_plan(edited(made, "stage2.conv2", scheme="channel_in", rank=[]), layers)


def test_a_transposed_convolution_has_no_integer_kernel(made, layers):
    up = dataclasses.replace(layers[4], kind="ConvTranspose2d", geometry=None)
    layers = [*layers[:4], up, *layers[5:]]
    for bits in (4, 8):
        wrong = made.replace("stage2.conv2", Option("dense", (), bits))
        with pytest.raises(InputError, match=r"'stage2\.conv2'.*no runtime has an integer kernel"):
            check_plan(wrong, layers)
        for option in (Option("stored", (), bits), Option("keep")):
            check_plan(made.replace("stage2.conv2", option), layers)


def test_other_schemes_come_with_their_full_rank(made, layers):
    other = made.replace("stage2.conv2", Option("tucker2", (8, 9), 8))
    ranks = {"tucker2": lambda layer: (layer.weight_shape[1], 8)}
    names = {"stage2.conv2"}
    rows = tuple(r for r in other.rows if r.name in names)
    listed = [layer for layer in layers if layer.name in names]
    with pytest.raises(InputError, match="1 to 64 and 1 to 8"):
        check_plan(_only(other, rows), listed, ranks)
    fits = other.replace("stage2.conv2", Option("tucker2", (8, 8), 8))
    check_plan(_only(fits, tuple(r for r in fits.rows if r.name in names)), listed, ranks)


def test_rows_and_layers_must_match(made, layers):
    with pytest.raises(InputError, match="no row for 'fc'"):
        check_plan(_only(made, made.rows[:-1]), layers)
    with pytest.raises(InputError, match=r"row for 'fc', but the model has no such layer.*stem"):
        check_plan(made, layers[:-1])
    with pytest.raises(InputError, match="two rows for layer 'fc'"):
        check_plan(_only(made, (*made.rows, made.rows[-1])), layers)


def _only(made, rows):
    plain = made.to_dict()
    plain["rows"] = [r.to_dict() for r in rows]
    return Plan.from_json(json.dumps(plain))
