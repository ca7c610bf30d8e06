"""Plans on networks with recurrent modules, and on modules and weights that are used twice."""

import pytest
import torch
from torch import Tensor, nn

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.data import Batches, Data
from sft.core.errors import InputError
from sft.core.records import Option, Plan, Profile
from sft.decompositions import factorize
from sft.layers import GRUSFT, FactorizedSFT, open_recurrent
from sft.planning.allocate import plan as make_plan
from sft.profiling.profile import profile
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm, replace_module

CHANNELS, STEPS = 6, 9


class Listener(nn.Module):
    """A convolution along the time, a GRU over its outputs, and an answer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, 16, 3, padding=1)
        self.gru = nn.GRU(16, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).transpose(1, 2)
        return self.head(self.gru(x)[0][:, -1])


class Twice(nn.Module):
    """One convolution that runs twice, and has two names; two others that share their weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv1d(CHANNELS, 16, 1)
        self.body = nn.Conv1d(16, 16, 3, padding=1)
        self.again = nn.Conv1d(16, 16, 3, padding=1) if tied else self.body
        self.again.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return self.again(x).mean(2)


def sequences(count: int, seed: int) -> Tensor:
    return torch.randn(count, CHANNELS, STEPS, generator=torch.Generator().manual_seed(seed))


def made(kind: type[nn.Module], **options: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(**options).eval()


def measured(model: nn.Module) -> Profile:
    data = Data(calibration=Batches(sequences(64, 0), batch_size=16))
    return profile(
        model, data, "onnxruntime-avx2", weight_bits=None, rank_multiple=2, anchor_samples=16
    )


def planned(model: nn.Module) -> Plan:
    """Every layer stays as it is; the tests change rows."""
    return make_plan(measured(model), Budget())


@pytest.fixture(scope="module")
def listener() -> nn.Module:
    return made(Listener)


@pytest.fixture(scope="module")
def plan(listener) -> Plan:
    return planned(listener)


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module) -> float:
    """Relative error of the outputs on new sequences."""
    x = sequences(32, 7)
    return float((model(x) - other(x)).norm() / other(x).norm())


def test_the_maps_of_an_opened_module_are_layers_of_the_profile(listener) -> None:
    layers = {entry.layer.name: entry for entry in measured(listener).layers}
    assert set(layers) == {"conv", "gru.input_maps.0", "gru.hidden_maps.0", "head"}
    inside, state = layers["gru.input_maps.0"].layer, layers["gru.hidden_maps.0"].layer
    assert (inside.weight_shape, inside.macs) == ((36, 16), STEPS * 36 * 16)
    assert (state.weight_shape, state.macs, state.calls) == ((36, 12), STEPS * 36 * 12, STEPS)
    assert type(listener.gru) is nn.GRU


def test_a_split_map_costs_all_time_steps(listener) -> None:
    layers = {entry.layer.name: entry for entry in measured(listener).layers}
    for name, inputs in (("gru.input_maps.0", 16), ("gru.hidden_maps.0", 12)):
        (split,) = [c for c in layers[name].candidates if c.option.rank == (8,)]
        assert split.cost.macs == STEPS * 8 * (inputs + 36)


def test_a_plan_that_splits_a_map_opens_the_module(listener, plan) -> None:
    small = apply(listener, plan.replace("gru.input_maps.0", Option("channel_out", (14,), None)))
    assert isinstance(small.gru, GRUSFT)
    assert isinstance(small.gru.input_maps[0], FactorizedSFT)
    assert small.gru.input_maps[0].rank == (14,)
    assert type(small.gru.hidden_maps[0]) is nn.Linear
    assert type(listener.gru) is nn.GRU
    assert 1e-6 < distance(small, listener) < 0.1


def test_more_rank_is_nearer_and_full_rank_is_equal(listener, plan) -> None:
    errors = []
    for rank in (2, 6, 12):
        both = plan
        for name in ("gru.input_maps.0", "gru.hidden_maps.0"):
            full = 16 if name == "gru.input_maps.0" and rank == 12 else rank
            both = both.replace(name, Option("channel_out", (full,), None))
        errors.append(distance(apply(listener, both), listener))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_a_plan_that_splits_no_map_keeps_the_module_whole(listener, plan) -> None:
    small = apply(listener, plan.replace("conv", Option("channel_out", (8,), None)))
    assert isinstance(small.conv, FactorizedSFT)
    assert type(small.gru) is nn.GRU
    for name, weight in listener.gru.named_parameters():
        assert torch.equal(small.gru.get_parameter(name), weight)
    assert type(apply(listener, plan).gru) is nn.GRU


def test_a_module_that_is_used_twice_is_split_once() -> None:
    model = made(Twice)
    small = apply(model, planned(model).replace("body", Option("channel_out", (16,), None)))
    assert isinstance(small.body, FactorizedSFT)
    assert small.again is small.body
    assert model.again is model.body
    assert type(model.body) is nn.Conv1d
    assert distance(small, model) < 1e-5
    with torch.no_grad():
        small.body.second.weight.zero_()
        bias = small.body.second.bias
    assert torch.allclose(small(sequences(2, 1)), bias.expand(2, -1))


def test_a_module_that_is_used_twice_costs_both_runs() -> None:
    layers = {entry.layer.name: entry for entry in measured(made(Twice)).layers}
    assert set(layers) == {"stem", "body"}
    body = layers["body"]
    assert (body.layer.calls, body.layer.macs) == (2, 2 * STEPS * 16 * 16 * 3)
    (split,) = [c for c in body.candidates if c.option == Option("channel_in", (8,), None)]
    assert split.cost.macs == 2 * STEPS * (16 * 8 + 8 * 16 * 3)


def test_tied_weights_are_refused_by_name() -> None:
    model = made(Twice, tied=True)
    plan = planned(model)
    with pytest.raises(InputError, match=r"'again' with weight \(16, 16, 3\).*shared with another"):
        apply(model, plan.replace("again", Option("channel_out", (8,), None)))
    assert model.again.weight is model.body.weight


def test_a_module_whose_maps_are_planned_in_integers_is_opened(listener, plan) -> None:
    whole = plan
    for name in ("gru.input_maps.0", "gru.hidden_maps.0"):
        whole = whole.replace(name, Option("dense"))
    small = apply(listener, whole)
    assert isinstance(small.gru, GRUSFT)
    rounded = quantize(small, whole, "onnxruntime-avx2", Batches(sequences(16, 0), batch_size=16))
    assert {"gru.input_maps.0.weight", "gru.hidden_maps.0.weight"} <= set(rounded.weights())


def test_an_opened_module_takes_the_arguments_of_torch_by_name() -> None:
    closed = nn.LSTM(5, 7)
    x, state = torch.randn(3, 2, 5), (torch.randn(1, 2, 7), torch.randn(1, 2, 7))
    opened = open_recurrent(closed)
    assert torch.allclose(opened(input=x, hx=state)[0], closed(input=x, hx=state)[0], atol=1e-6)


def test_a_split_layer_of_a_transformer_is_called() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    small = fold_batch_norm(layer, x)
    replace_module(small, "linear1", factorize(layer.linear1, "channel_out", 8))
    with torch.no_grad():
        assert torch.allclose(small(x), layer(x), atol=1e-5)
