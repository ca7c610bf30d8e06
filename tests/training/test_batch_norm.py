"""Batch-norm statistics estimated anew, against moments computed by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sft.core.data import Batches
from sft.core.errors import InputError
from sft.training.batch_norm import reestimate_batch_norm


def made_batches(count: int = 5, seed: int = 0, shift: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 3, 6, 6, generator=generator)
    return list(x * torch.tensor([0.5, 1.0, 3.0])[:, None, None] + shift)


def small_net(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, momentum=momentum, affine=False),
    )
    return net.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def mean_moments(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over batches of their means and unbiased variances by channel, in float64."""
    columns = [b.double().transpose(0, 1).flatten(1) for b in batches]
    means = torch.stack([c.mean(1) for c in columns])
    return means.mean(0), torch.stack([c.var(1) for c in columns]).mean(0)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@torch.no_grad()
def test_statistics_are_the_mean_over_all_batches(momentum: float | None) -> None:
    net, batches = small_net(momentum), made_batches()
    before = state_of(net)
    renewed = reestimate_batch_norm(net, [(b, None) for b in batches])
    read = [net[0](b) for b in batches]
    mean, variance = mean_moments(read)
    torch.testing.assert_close(renewed[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(renewed[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    behind = []  # the second norm reads what the first one makes of each batch, without dropout
    for r in read:
        spread = (r.var((0, 2, 3), unbiased=False, keepdim=True) + net[1].eps).sqrt()
        normed = (r - r.mean((0, 2, 3), keepdim=True)) / spread
        behind.append(net[5](normed.relu().flatten(1)))
    mean, variance = mean_moments(behind)
    torch.testing.assert_close(renewed[6].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(renewed[6].running_var.double(), variance, rtol=1e-4, atol=1e-5)
    assert int(renewed[6].num_batches_tracked) == len(batches)
    assert [renewed[i].momentum for i in (1, 6)] == [momentum] * 2
    assert same(before, net.state_dict())
    assert [net[i].momentum for i in (1, 6)] == [momentum] * 2


def test_all_else_is_kept() -> None:
    net = small_net()
    net[1].weight.requires_grad_(False)
    net[0].requires_grad_(False)
    renewed = reestimate_batch_norm(net, made_batches())
    assert renewed is not net
    for (name, one), (_, other) in zip(
        net.named_parameters(), renewed.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name
        assert other.grad is None, name


def test_training_flags_are_those_of_the_model() -> None:
    net = small_net().train()
    net[1].eval()
    state = state_of(net)
    renewed = reestimate_batch_norm(net, made_batches(), small_net().train())
    assert same(state, net.state_dict())
    assert [m.training for m in renewed.modules()] == [m.training for m in net.modules()]
    assert [m.training for m in net.children()] == [True, False, *[True] * 5]


def test_norms_without_statistics_and_norms_that_are_not_called_are_left() -> None:
    net = small_net()
    net[6] = nn.BatchNorm1d(5, track_running_stats=False).eval()
    net[1].spare = nn.BatchNorm2d(3)
    net[1].spare.running_mean.fill_(7)
    renewed = reestimate_batch_norm(net, made_batches())
    assert renewed[6].running_mean is None
    assert not renewed[6].training
    assert renewed[1].spare.running_mean.tolist() == [7, 7, 7]
    assert not torch.equal(renewed[1].running_mean, net[1].running_mean)
    none = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reestimate_batch_norm(none, made_batches()) is none
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    assert reestimate_batch_norm(plain, made_batches()) is plain


@torch.no_grad()
def test_with_a_teacher_the_copy_comes_back_only_if_it_is_closer() -> None:
    batches = made_batches(10)
    teacher = reestimate_batch_norm(small_net(), batches)
    state = state_of(teacher)
    small = copy.deepcopy(teacher)
    small[0].weight.mul_(0.5)  # what the norm read has changed, and new statistics mend that
    renewed = reestimate_batch_norm(small, batches, teacher)
    assert renewed is not small
    x = made_batches(1, seed=3)[0]
    far, near = (float((m(x) - teacher(x)).square().mean()) for m in (small, renewed))
    assert near < 0.1 * far
    assert same(state, teacher.state_dict())
    other = made_batches(10, seed=1, shift=-3.0)  # data of another kind, judged by the teacher's
    other[4], other[9] = batches[4], batches[9]
    assert reestimate_batch_norm(teacher, other, teacher) is teacher
    assert reestimate_batch_norm(teacher, other) is not teacher


@torch.no_grad()
def test_held_out_batches_are_not_estimated_from() -> None:
    batches = made_batches(10)
    small = small_net()
    teacher = reestimate_batch_norm(small, batches)
    renewed = reestimate_batch_norm(small, batches, teacher)
    kept = [small[0](b) for i, b in enumerate(batches) if i not in (4, 9)]
    mean, variance = mean_moments(kept)
    torch.testing.assert_close(renewed[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(renewed[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    few = reestimate_batch_norm(small, batches[:4], reestimate_batch_norm(small, batches[:4]))
    mean, _ = mean_moments([small[0](b) for b in batches[:4]])
    torch.testing.assert_close(few[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)


def test_a_loader_that_shuffles_gives_the_same_and_leaves_the_generator() -> None:
    loader = Batches(torch.cat(made_batches()), None, 24, shuffle=True)
    net = small_net()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = reestimate_batch_norm(net, loader)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert same(one.state_dict(), reestimate_batch_norm(net, loader).state_dict())


def test_bad_data_is_named() -> None:
    net = small_net()
    with pytest.raises(InputError, match="empty"):
        reestimate_batch_norm(net, [])
    with pytest.raises(InputError, match="read only once"):
        reestimate_batch_norm(net, iter(made_batches()))
    with pytest.raises(InputError, match="NaN"):
        reestimate_batch_norm(net, [torch.full((2, 3, 6, 6), torch.nan)])
    with pytest.raises(InputError, match="one value a channel"):
        reestimate_batch_norm(net, [torch.zeros(1, 3, 6, 6)])
