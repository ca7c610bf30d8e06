"""What states are told apart by: everything that counts changes it, nothing else does."""

import copy

import pytest
import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.copies import copy_module
from sft.core.data import Batches
from sft.core.errors import InputError
from sft.planning.allocate import plan
from sft.surgery.apply import apply
from sft.training.checkpoint import load_state, restore, save_state, state_of
from sft.training.identity import identity_of, identity_of_data, identity_of_start


def test_every_tensor_of_a_network_counts_and_so_does_its_form(net) -> None:
    whole = identity_of(net)
    assert identity_of(copy.deepcopy(net).train()) == whole
    for name in state_of(net):
        other = copy.deepcopy(net)
        tensor = state_of(other)[name].detach()
        tensor.view(-1)[-1:] += 1
        assert identity_of(other) != whole, name
        assert identity_of(other, exact=False) == identity_of(net, exact=False)
    for other in (nn.Sequential(net), copy.deepcopy(net).double()):
        assert identity_of(other, exact=False) != identity_of(net, exact=False)


def test_the_bits_of_a_network_in_integers_count(net, data, profiled) -> None:
    chosen = plan(profiled, Budget(macs=0.6))
    rounded = quantize(apply(net, chosen), chosen, "onnxruntime-avx2", data.calibration)
    whole = identity_of(rounded)
    assert identity_of(copy_module(rounded)) == whole
    rounded.plan = plan(profiled, Budget(macs=0.9))
    assert identity_of(rounded) != whole


def test_where_a_start_is_not_repeatable_its_form_counts(net) -> None:
    other = copy.deepcopy(net)
    nn.init.zeros_(other.fc.weight)
    assert identity_of_start(other) != identity_of_start(net)
    meta = copy.deepcopy(net).to("meta")  # stands for a GPU
    assert identity_of_start(meta) == identity_of(net, exact=False)


def test_targets_of_every_form_count_where_they_are_asked_for() -> None:
    x = torch.zeros(4, 2)
    forms = [
        [torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1), torch.zeros(0), torch.zeros(0, 1)],
        [{"box": torch.ones(4), "name": "a"}, {"box": torch.ones(4), "name": "b"}],
        [torch.ones(3).numpy(), torch.zeros(3).numpy()],
        [[1, (2, 3)], [(1, 2), 3], [1, 2, 3]],
        [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)],
    ]
    found = [identity_of_data([(x, y)], 0, True) for form in forms for y in form]
    assert len(set(found)) == len(found)
    assert len({identity_of_data([(x, y)], 0, False) for form in forms for y in form}) == 1


def test_an_iterator_is_left_unread() -> None:
    stream = iter([torch.zeros(1, 1), torch.ones(1, 1)])
    identity_of_data(stream, 0, False)
    assert len(list(stream)) == 2


def test_shuffled_data_is_read_alike_with_a_seed_and_unlike_with_another(data) -> None:
    x = data.train.inputs
    found = []
    for outer, seed in ((1, 0), (2, 0), (3, 7)):
        torch.manual_seed(outer)
        state = torch.get_rng_state()
        found.append(identity_of_data(Batches(x, None, 32, True), seed, False))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != found[2]


class Holder(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, width)
        self.register_buffer("seen", torch.full((seen,), 5.0))


def test_a_parameter_of_another_shape_is_refused_and_a_buffer_is_not(tmp_path) -> None:
    path, own = tmp_path / "state", Holder(3, 2)
    save_state(Holder(3, 4), path)
    load_state(own, path)
    assert own.seen.tolist() == [5.0] * 4
    other = Holder(4, 2)
    before = {k: v.detach().clone() for k, v in state_of(other).items()}
    words = r"state' is of another network.* 'last\.weight' has shape \(3, 2\), here .*\(4, 2\)"
    with pytest.raises(InputError, match=rf"{words}.* Delete the file"):
        load_state(other, path)
    with pytest.raises(InputError, match=r"'last\.bias'"):
        restore(other, state_of(own) | {"last.weight": torch.zeros(4, 2)}, path)
    assert all(torch.equal(v, before[k]) for k, v in state_of(other).items())
