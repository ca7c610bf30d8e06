"""Shrinking: exact in its gauge; the penalty is the nuclear norm; prices meet the budget."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sft.core.budget import Budget
from sft.core.statistics import Statistics
from sft.decompositions import factorize
from sft.runtimes.targets import find_target
from sft.training import shrinking
from sft.training.product_decay import ProductDecay
from sft.training.rank_menus import menus_of
from sft.training.shrinking import Gauge, Shrinking


def statistics_of(layer: nn.Conv2d, seed: int) -> Statistics:
    """Of made inputs whose channels differ in scale and depend on one another."""
    from sft.profiling.statistics import gather_statistics

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, layer.in_channels, 9, 9, generator=generator)
    x = x * torch.linspace(0.2, 3.0, layer.in_channels)[:, None, None] + 0.5
    x[:, 1:] += 0.7 * x[:, :-1]
    return gather_statistics(nn.Sequential(layer), ["0"], [x])[0]["0"]


@given(
    groups=st.sampled_from([1, 2]),
    scheme=st.sampled_from(["channel_in", "channel_out", "spatial"]),
    width=st.integers(2, 4),
    seed=st.integers(0, 5),
    known=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_balancing_changes_the_gauge_alone(groups, scheme, width, seed, known) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(groups * width, groups * 5, 3, stride=2, padding=1, groups=groups)
    statistics = statistics_of(layer, seed) if known else None
    split = factorize(layer, scheme, 2)
    before = split.kernel().detach().clone()
    gauge = Gauge.of(split, statistics)
    values = gauge.balance()
    torch.testing.assert_close(split.kernel(), before, rtol=1e-3, atol=1e-4)
    a, b = gauge.matrices()
    wanted = torch.linalg.svdvals((a @ b).double())[:, :2]
    torch.testing.assert_close(values, wanted.to(values), rtol=1e-3, atol=1e-4)
    nuclear = 0.5 * (a.square().sum() + b.square().sum())
    torch.testing.assert_close(float(nuclear.detach()), float(values.sum()), rtol=1e-3, atol=1e-4)


def test_a_cut_keeps_the_mean_and_what_is_dropped_stays_zero() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, 8, 8, generator=generator) + 2.0
    from sft.profiling.statistics import gather_statistics

    known = gather_statistics(nn.Sequential(layer), ["0"], [x])[0]["0"]
    split = factorize(layer, "channel_in", 4, known)
    gauge = Gauge.of(split, known)
    gauge.balance()
    wanted = split(x).mean((0, 2, 3))
    gauge.cut(2)
    torch.testing.assert_close(split(x).mean((0, 2, 3)), wanted, rtol=1e-3, atol=1e-3)
    assert not split.first.weight[2:].any()
    assert not split.second.weight[:, 2:].any()


@pytest.fixture
def menus(profiled):
    target = find_target("onnxruntime-avx2")
    return menus_of(profiled, target, Budget(macs=0.5), (), 8, 2)


def shrunk(net, menus, **options):
    layers = {
        name: factorize(net.get_submodule(name), scheme, menus.full_rank(name))
        for name, scheme in menus.schemes.items()
    }
    return Shrinking(layers, menus, **options), layers


def test_rounds_bring_the_costs_along_the_path_and_the_prices_rise(net, menus) -> None:
    net.eval()
    part, _ = shrunk(net, menus)
    first, ranks = part.multipliers.clone(), part.ranks()
    for step in range(1, 13):
        part.after_step(step / 12)
    assert (part.multipliers > first).any()
    assert sum(part.ranks().values()) < sum(ranks.values())
    fixed, _ = shrunk(net, menus, dual_ascent=False)
    for step in range(1, 13):
        fixed.after_step(step / 12)
    assert torch.equal(fixed.multipliers, first)
    assert sum(fixed.ranks().values()) > sum(part.ranks().values())


def test_the_penalty_is_the_price_of_the_nuclear_norm(net, menus, monkeypatch) -> None:
    part, layers = shrunk(net, menus)
    found = float(part.penalty().detach())
    wanted = 0.0
    known = menus.profile.statistics
    for (name, layer), t in zip(layers.items(), part.weights(), strict=True):
        a, b = Gauge.of(layer, known.get(name)).matrices()
        wanted += t * float(torch.linalg.svdvals((a @ b).detach().double()).sum())
    assert found == pytest.approx(wanted, rel=1e-3)
    monkeypatch.setattr(shrinking, "PENALTY", 2 * shrinking.PENALTY)
    assert float(part.penalty().detach()) == pytest.approx(2 * found, rel=1e-6)


def test_the_proximal_step_takes_a_threshold_off_the_singular_values() -> None:
    torch.manual_seed(3)
    split = factorize(nn.Conv2d(3, 4, 3), "channel_in", 3)
    gauge = Gauge.of(split, None)
    values = gauge.balance()
    threshold = float(values[0, 1])
    Shrinking._soften(gauge, values, threshold)
    wanted = (values - threshold).clamp_min(0)
    torch.testing.assert_close(gauge.balance(), wanted, rtol=1e-4, atol=1e-5)


def test_the_proximal_share_is_the_same_at_every_scale(net, menus) -> None:
    def shares(factor: float) -> torch.Tensor:
        scaled = copy.deepcopy(net)
        for name in menus.schemes:
            scaled.get_submodule(name).weight.data.mul_(factor)
        part, layers = shrunk(scaled, menus, proximal=True, dual_ascent=False)
        part.multipliers.fill_(1.0)
        known = menus.profile.statistics
        gauges = [Gauge.of(layer, known.get(n)) for n, layer in layers.items()]
        was = torch.stack([gauge.balance().max() for gauge in gauges])
        part._round(2)
        return 1 - torch.stack([gauge.balance().max() for gauge in gauges]) / was

    found = shares(1.0)
    assert (found > 1e-5).all()
    torch.testing.assert_close(shares(10.0), found, rtol=1e-2, atol=1e-6)


def test_decay_on_the_product_is_that_of_the_dense_kernel_in_any_gauge() -> None:
    torch.manual_seed(4)
    split = factorize(nn.Conv2d(4, 6, 3), "channel_out", 4)
    on_product, on_factors = ProductDecay([split], 0.2), ProductDecay([split], 0.2, False)
    dense = 0.1 * float(split.kernel().detach().square().sum())
    before = float(on_factors.penalty().detach())
    with torch.no_grad():
        split.first.weight.mul_(3.0)
        split.second.weight.div_(3.0)
    assert float(on_product.penalty().detach()) == pytest.approx(dense, rel=1e-4)
    assert float(on_factors.penalty().detach()) > 1.5 * before
    assert ProductDecay([split], 0.0).penalty() is None
