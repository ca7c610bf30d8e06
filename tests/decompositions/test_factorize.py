"""One layer in, one factorised layer out: ranks, objective, refusals, recurrent modules."""

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.decompositions import choose_rank, decompositions, factorize
from sft.layers import FactorizedSFT, geometry_of, open_recurrent


def test_one_number_stands_for_both_ranks_of_tucker2() -> None:
    conv = nn.Conv2d(4, 9, 3)
    assert factorize(conv, "tucker2", 3).rank == (3, 3)
    assert factorize(conv, "tucker2", 6).rank == (4, 6)
    assert factorize(conv, "tucker2", (2, 7)).rank == (2, 7)
    assert factorize(conv, "channel_in", (2,)).rank == (2,)


@pytest.mark.parametrize("scheme", list(decompositions))
def test_the_objective_chooses_the_rank(scheme: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 3).double()
    loose, tight = (factorize(conv, scheme, l1=t, l2=t) for t in (0.01, 0.3))
    assert all(a >= b for a, b in zip(loose.rank, tight.rank, strict=True))
    assert min(tight.rank) >= 1
    if scheme == "residual":
        return
    assert loose.rank != tight.rank
    kernel = conv.weight.detach()
    if scheme == "channel_out":
        assert tight.rank == (choose_rank(kernel.flatten(1), 0.3, 0.3),)
    if scheme in ("channel_in", "tucker2"):
        assert tight.rank[0] == choose_rank(kernel.transpose(0, 1).flatten(1), 0.3, 0.3)


def test_groups_take_the_rank_of_the_one_that_has_most() -> None:
    conv = nn.Conv2d(8, 8, 1, groups=2).double()
    conv.weight.data.zero_()
    conv.weight.data[:2, :2, 0, 0] = torch.eye(2)
    conv.weight.data[4, 0] = 1
    assert factorize(conv, "channel_out", l1=0.1, l2=0.1).rank == (2,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "rank="),
        ({"rank": 3, "l1": 0.1, "l2": 0.1}, "either"),
        ({"rank": 3, "l1": 0.1}, "either"),
        ({"l1": 0.1}, "rank="),
        ({"l1": 0.0, "l2": 1.0}, "above 0"),
        ({"rank": 7}, "Rank 7 does not fit.*1 to 6"),
        ({"rank": 0}, "Rank 0 does not fit"),
        ({"rank": (2, 2)}, "does not fit"),
        ({"rank": 2, "scheme": "spatial"}, "two axes"),
        ({"rank": 2, "scheme": "nothing"}, "Known: channel_in"),
        ({"rank": 2, "statistics": {"a": None}}, "one layer"),
    ],
)
def test_requests_that_cannot_be_met(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        factorize(nn.Conv2d(6, 9, (3, 1)), **{"scheme": "channel_in", **arguments})


def test_refining_without_data_fits_the_weight() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 3).double()
    errors = []
    for refine in (False, True):
        kernel = factorize(conv, "separable", 8, refine=refine).merge().weight.detach()
        errors.append(float((kernel - conv.weight.detach()).square().sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out", "residual"])
@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(5, 4, num_layers=2, bidirectional=True),
        nn.GRU(5, 4, batch_first=True),
        nn.LSTM(6, 5, proj_size=3),
    ],
    ids=["lstm", "gru", "projected"],
)
def test_a_recurrent_module_is_opened_and_exact_at_full_rank(
    scheme: str, module: nn.Module
) -> None:
    module = module.double()
    x = torch.randn(3, 7, module.input_size, dtype=torch.float64)
    small = factorize(module, scheme, 100)
    assert [m for m in small.modules() if isinstance(m, FactorizedSFT)]
    assert not [m for m in small.modules() if type(m) is nn.LSTM]
    torch.testing.assert_close(small(x)[0], module(x)[0], rtol=1e-9, atol=1e-10)
    narrow = factorize(module, scheme, 1)
    ranks = {m.rank for m in narrow.modules() if isinstance(m, FactorizedSFT)}
    assert ranks == {(1,)}
    assert float((narrow(x)[0] - module(x)[0]).detach().abs().max()) > (
        1e-6 if scheme == "residual" else 1e-3
    )


@pytest.mark.parametrize("cell", [nn.LSTMCell(5, 4), nn.GRUCell(5, 4)], ids=["lstm", "gru"])
def test_a_cell_is_opened_too(cell: nn.Module) -> None:
    x = torch.randn(2, 5)
    small = factorize(cell, "channel_out", 9)
    wanted, got = cell(x), small(x)
    if isinstance(cell, nn.LSTMCell):
        wanted, got = wanted[0], got[0]
    torch.testing.assert_close(got, wanted)


def test_recurrent_maps_take_statistics_by_name(seen) -> None:
    module = nn.GRU(5, 4).double()
    opened = open_recurrent(module)
    names = [n for n, m in opened.named_modules() if isinstance(m, nn.Linear)]
    statistics = {names[0]: _linear_statistics(opened.get_submodule(names[0]), seen)}
    plain, aware = (
        factorize(module, "channel_out", 2),
        factorize(module, "channel_out", 2, statistics),
    )
    same = [
        torch.equal(plain.get_submodule(n).kernel(), aware.get_submodule(n).kernel()) for n in names
    ]
    assert same == [False, *([True] * (len(names) - 1))]
    with pytest.raises(InputError, match="by name"):
        factorize(module, "channel_out", 2, statistics[names[0]])


def _linear_statistics(linear: nn.Linear, seen):
    return seen(geometry_of(linear)).statistics


def test_a_scheme_that_splits_no_map_refuses_the_module() -> None:
    with pytest.raises(InputError, match=r"LSTM.*two axes"):
        factorize(nn.LSTM(5, 4), "spatial", 2)


def test_the_recurrent_module_itself_is_not_changed() -> None:
    module = nn.LSTM(5, 4)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    factorize(module, "channel_in", 2)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
