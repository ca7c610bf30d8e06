"""Closed-form repair: it helps on new data, is the least-squares fit, and does no harm."""

import copy
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.core.data import Batches, Data
from sft.core.errors import InputError
from sft.decompositions import decompositions, factorize
from sft.layers import InterpolativeSFT, ResidualSFT, open_recurrent
from sft.profiling.damage import divergence
from sft.surgery.modules import fold_batch_norm, get_module, replace_module
from sft.training import reconstruct as file
from sft.training import refit
from sft.training.reconstruct import reconstruct

SPLIT = [name for name in decompositions if name != "residual"]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "RIDGE", 1e-10)
    monkeypatch.setattr(file, "POSITIONS", 10**6)


def split_net(net: nn.Module, scheme: str, rank: int, names: tuple[str, ...]) -> nn.Module:
    small = fold_batch_norm(net, torch.zeros(1, 1, 12, 12))
    for name in names:
        replace_module(small, name, factorize(get_module(small, name), scheme, rank))
    return small


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def correlated(count: int, channels: int, *size: int, seed: int = 0) -> Tensor:
    """Inputs with a mean, whose channels and neighbours are correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=generator)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(77))
    x = torch.einsum("ij,nj...->ni...", mixing, x)
    for axis in range(2, x.ndim):
        x = x + 0.8 * x.roll(1, axis)
    return x + torch.arange(channels).view(-1, *[1] * len(size))


@pytest.mark.parametrize("scheme", SPLIT)
@torch.no_grad()
def test_the_outputs_come_closer_to_the_original_s_on_new_data(
    scheme: str, net: nn.Module, data: Data
) -> None:
    small = split_net(net, scheme, 3, ("body", "down"))
    states = state_of(small), state_of(net)
    fitted = reconstruct(small, net, data.calibration)
    x = data.test.inputs
    far, near = (float((m(x) - net(x)).square().mean()) for m in (small, fitted))
    assert near < 0.7 * far
    assert same(states[0], small.state_dict())
    assert same(states[1], net.state_dict())
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in fitted.parameters())
    assert not fitted.training


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 8), ()),
    "tokens": (lambda: nn.Linear(6, 8), (5,)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, 2), (20,)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1), (7, 8)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding_mode="circular", padding=1), (6, 6)),
    "one position": (lambda: nn.Conv2d(6, 8, 3), (3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1), (4, 4)),
}  # fmt: skip


def made_case(name: str, count: int = 400) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, size = CASES[name]
    x = correlated(count, 6, *size)
    if name == "tokens":
        x = x.transpose(1, 2)
    return make(), list(x.split(count // 4))


def unfolded(module: nn.Module, z: Tensor) -> Tensor:
    """Patches ``(N, I S, L)`` of a layer, from the outputs of one-hot kernels by torch itself."""
    if isinstance(module, nn.Linear):
        return z.reshape(-1, z.shape[-1], 1)
    probe = copy.deepcopy(module)
    inputs, taps = module.in_channels // module.groups, module.weight[0, 0].numel()
    rows = []
    for i in range(inputs):
        for tap in range(taps):
            hot = torch.zeros_like(probe.weight).flatten(2)
            for group in range(module.groups):  # the first output of each group reads one number
                width = module.out_channels // module.groups
                if module.transposed:
                    hot[group * inputs + i, 0, tap] = 1
                else:
                    hot[group * width, i, tap] = 1
            probe.weight.data = hot.view_as(probe.weight)
            probe.bias = None
            read = probe(z).flatten(2)
            rows.append(read[:, :: module.out_channels // module.groups])
    return torch.stack(rows, dim=2).flatten(1, 2)  # (N, G, I S, L)


def fitted_outputs(layer: nn.Module, z: Tensor, y: Tensor, groups: int) -> Tensor:
    """Outputs of the least-squares fit of `y` from what a layer reads, by numpy in float64."""
    flat = isinstance(layer, nn.Linear)
    patches = unfolded(layer, z)
    columns = y.reshape(-1, y.shape[-1], 1) if flat else y.flatten(2)
    patches = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    wanted = columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    found = []
    for read, target in zip(patches.double().numpy(), wanted.double().numpy(), strict=True):
        table = numpy.hstack([read, numpy.ones((len(read), 1))])
        found.append(table @ numpy.linalg.lstsq(table, target, rcond=None)[0])
    made = torch.from_numpy(numpy.stack(found)).unflatten(1, (len(columns), -1))
    return made.permute(1, 0, 3, 2).flatten(1, 2).reshape(y.shape)


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out", "interpolative"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_one_layer_is_the_least_squares_fit(name: str, scheme: str) -> None:
    dense, batches = made_case(name)
    teacher = nn.Sequential(dense)
    small = nn.Sequential(factorize(dense, scheme, 2))
    fitted = reconstruct(small, teacher, batches)
    assert fitted is not small
    x = torch.cat(batches)
    y, z = dense(x), x
    for factor in fitted[0].factors[:-1]:
        z = factor(z)
    last = fitted[0].factors[-1]
    wanted = fitted_outputs(last, z, y, dense.groups if hasattr(dense, "groups") else 1)
    got = fitted(x).double()
    assert float((got - wanted).abs().max()) < 1e-4 * float(y.std())
    assert float((got - y).square().mean()) < float((small(x) - y).square().mean())
    assert type(fitted[0]) is type(small[0])


@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_a_layer_that_was_not_split_is_fitted_to_what_it_reads_now() -> None:
    """Two layers: the second, dense, reads the first's changed outputs."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))
    x = correlated(400, 6)
    small = copy.deepcopy(teacher)
    small[0] = factorize(teacher[0], "channel_out", 2)
    fitted = reconstruct(small, teacher, list(x.split(100)))
    read = fitted[:2](x)
    wanted = fitted_outputs(fitted[2], read, teacher(x), 1)
    assert float((fitted(x) - wanted).abs().max()) < 1e-4 * float(teacher(x).std())
    assert fitted[2].bias is not None
    kept = reconstruct(small, teacher, list(x.split(100)), dense=False)
    assert torch.equal(kept[2].weight, teacher[2].weight)
    assert not torch.equal(fitted[2].weight, teacher[2].weight)


@torch.no_grad()
def test_activations_in_place_do_not_spoil_what_a_layer_is_fitted_to() -> None:
    torch.manual_seed(0)
    x = correlated(300, 4, 6, 6)
    results = []
    for inplace in (False, True):
        torch.manual_seed(1)
        teacher = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.Flatten()
        )
        small = copy.deepcopy(teacher)
        for index in (0, 2):
            small[index] = factorize(teacher[index], "channel_out", 3)
        results.append(reconstruct(small, teacher, list(x.split(75)), passes=1)(x))
    assert torch.equal(*results)


@torch.no_grad()
def test_the_ridge_holds_what_the_data_does_not_tell() -> None:
    """A channel that never moves: its weights stay, and all stay finite."""
    torch.manual_seed(0)
    dense = nn.Linear(6, 8)
    x = correlated(300, 6)
    x[:, 2] = 0
    small = nn.Sequential(nn.Sequential(nn.Linear(6, 6), dense))
    small[0][0].weight.copy_(torch.eye(6))
    small[0][0].bias.zero_()
    teacher = copy.deepcopy(small)
    small[0][1].weight.add_(0.1 * torch.randn(8, 6))
    fitted = reconstruct(small, teacher, list(x.split(75)))
    torch.testing.assert_close(fitted[0][1].weight[:, 2], small[0][1].weight[:, 2])
    torch.testing.assert_close(
        fitted[0][1].weight[:, :2], teacher[0][1].weight[:, :2], rtol=1e-2, atol=1e-2
    )


@torch.no_grad()
def test_where_the_fit_does_harm_the_network_itself_comes_back() -> None:
    """Fitted to noise of one kind, judged by the held-out batch, which is of another."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    small = copy.deepcopy(teacher)
    small[0] = factorize(teacher[0], "channel_out", 4)
    fit, judge = 1e-3 * torch.randn(4, 250, 6) - 3, correlated(250, 6)
    harmed = [*fit, judge]
    assert reconstruct(small, teacher, harmed) is small
    helped = [*correlated(1000, 6, seed=1).split(250), judge]
    assert reconstruct(small, teacher, helped) is not small
    assert reconstruct(teacher, teacher, helped) is teacher


@torch.no_grad()
def test_the_held_out_batch_is_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 8)
    small = nn.Sequential(factorize(dense, "channel_out", 2))
    parts = list(correlated(600, 6).split(100))
    one = reconstruct(small, nn.Sequential(dense), parts)
    parts[4] = correlated(100, 6, seed=5)
    assert same(one.state_dict(), reconstruct(small, nn.Sequential(dense), parts).state_dict())
    parts[3] = correlated(100, 6, seed=5)
    assert not same(one.state_dict(), reconstruct(small, nn.Sequential(dense), parts).state_dict())


@torch.no_grad()
def test_too_few_positions_leave_a_layer_as_it_is() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 8)
    small = nn.Sequential(factorize(dense, "channel_out", 2))
    x = correlated(40, 6)
    assert reconstruct(small, nn.Sequential(dense), [x[:39]]) is small
    assert reconstruct(small, nn.Sequential(dense), [x]) is not small


@torch.no_grad()
def test_passes_dense_and_seed_move_the_result(net: nn.Module, data: Data) -> None:
    small = split_net(net, "channel_out", 3, ("body", "down"))
    base = reconstruct(small, net, data.calibration)
    assert same(base.state_dict(), reconstruct(small, net, data.calibration, seed=0).state_dict())
    for options in ({"passes": 1}, {"dense": False}, {"seed": 1}):
        other = reconstruct(small, net, data.calibration, **options)
        assert other is not small
        assert not same(base.state_dict(), other.state_dict()), options
    dense = reconstruct(small, net, data.calibration, dense=False)
    assert torch.equal(dense.stem.weight, small.stem.weight)


@torch.no_grad()
def test_a_loader_that_shuffles_gives_the_same_and_leaves_the_generator(
    net: nn.Module, data: Data
) -> None:
    small = split_net(net, "channel_out", 3, ("body",))
    loader = Batches(data.calibration.inputs, None, 16, shuffle=True)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = reconstruct(small, net, loader)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert same(first.state_dict(), reconstruct(small, net, loader).state_dict())


@torch.no_grad()
def test_networks_in_training_mode_are_not_changed(net: nn.Module, data: Data) -> None:
    small = split_net(net, "channel_out", 3, ("body",)).train()
    small.extra = nn.BatchNorm2d(1)
    net.train()
    states = state_of(small), state_of(net)
    fitted = reconstruct(small, net, data.calibration)
    assert fitted is not small
    assert same(states[0], small.state_dict())
    assert same(states[1], net.state_dict())
    assert small.training
    assert net.training


def test_frozen_weights_stay_frozen(net: nn.Module, data: Data) -> None:
    small = split_net(net, "interpolative", 3, ("body",)).requires_grad_(False)
    fitted = reconstruct(small, net, data.calibration)
    assert fitted is not small
    assert not any(p.requires_grad for p in fitted.parameters())
    x = data.test.inputs
    assert fitted(x).grad_fn is None


@torch.no_grad()
def test_a_layer_with_a_dense_branch_is_left(net: nn.Module, data: Data) -> None:
    small = split_net(net, "channel_out", 3, ("stem",))
    small.body = factorize(small.body, "residual", 2)
    assert isinstance(small.body, ResidualSFT)
    with torch.no_grad():
        small.body.second.weight.mul_(1.5)
    fitted = reconstruct(small, net, data.calibration)
    assert fitted is not small
    assert same(small.body.state_dict(), fitted.body.state_dict())


class Recurrent(nn.Module):
    """A recurrent module between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.after = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gru(self.before(x))[0])


@torch.no_grad()
def test_maps_that_are_called_at_each_step_are_left_and_the_others_fitted() -> None:
    torch.manual_seed(0)
    teacher = Recurrent().eval()
    small = copy.deepcopy(teacher)
    small.gru = open_recurrent(teacher.gru).eval()
    small.gru.hidden_maps[0] = factorize(small.gru.hidden_maps[0], "channel_out", 3)
    small.gru.input_maps[0] = factorize(small.gru.input_maps[0], "interpolative", 3)
    x = correlated(200, 6, 5).transpose(1, 2)
    fitted = reconstruct(small, teacher, list(x.split(50)))
    assert fitted is not small
    inner = small.gru.hidden_maps[0], fitted.gru.hidden_maps[0]
    assert same(inner[0].state_dict(), inner[1].state_dict())
    moved = fitted.gru.input_maps[0]
    assert not same(small.gru.input_maps[0].state_dict(), moved.state_dict())
    new = correlated(200, 6, 5, seed=9).transpose(1, 2)
    assert divergence(teacher(new), fitted(new)) < divergence(teacher(new), small(new))


@torch.no_grad()
def test_tied_and_computed_weights_are_left() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    teacher[4].weight = teacher[2].weight
    small = copy.deepcopy(teacher)
    small[0] = factorize(teacher[0], "channel_out", 3)
    fitted = reconstruct(small, teacher, list(correlated(400, 6).split(100)))
    assert fitted is not small
    assert fitted[4].weight is fitted[2].weight
    assert torch.equal(fitted[2].weight, teacher[2].weight)


@torch.no_grad()
def test_an_interpolative_layer_of_full_rank_in_another_order() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, 3)
    own = InterpolativeSFT(factorize(dense, "channel_in", 1).geometry, 8)
    own.select(torch.randperm(8)[None])
    x = correlated(200, 6, 6, 6)
    fitted = reconstruct(nn.Sequential(own), nn.Sequential(dense), list(x.split(50)))
    torch.testing.assert_close(fitted(x), dense(x), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_samples_without_a_batch_axis_count_too() -> None:
    """A layer that is called on one sample without its batch axis."""

    class Single(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    small = Single(factorize(conv, "channel_out", 2))
    x = list(correlated(80, 6, 5).split(20))
    fitted = reconstruct(small, Single(conv), x)
    far, near = (
        sum(float((m(part) - Single(conv)(part)).square().mean()) for part in x)
        for m in (small, fitted)
    )
    assert near < far


def test_bad_passes_and_bad_data_are_named(net: nn.Module, data: Data) -> None:
    small = split_net(net, "channel_out", 3, ("body",))
    with pytest.raises(InputError, match="At least 1 pass"):
        reconstruct(small, net, data.calibration, passes=0)
    with pytest.raises(InputError, match="empty"):
        reconstruct(small, net, [])
    with pytest.raises(InputError, match="empty"):
        reconstruct(small, net, [torch.zeros(0, 1, 12, 12)])
    with pytest.raises(InputError, match="read only once"):
        reconstruct(small, net, iter([torch.zeros(2, 1, 12, 12)]))
    with pytest.raises(InputError, match="NaN"):
        reconstruct(small, net, [torch.full((2, 1, 12, 12), torch.nan)])


def test_padding_is_read_as_the_layer_reads_it() -> None:
    """The independent patches themselves: torch's own unfold agrees where it can."""
    x = torch.randn(2, 3, 6, 5)
    conv = nn.Conv2d(3, 4, 3, 2, 1)
    with torch.no_grad():
        assert torch.equal(unfolded(conv, x), functional.unfold(x, 3, stride=2, padding=1))


@pytest.mark.parametrize("scheme", ["channel_in", "spatial"])
def test_refined_factors_are_nearer_to_the_original(
    net: nn.Module, data: Data, scheme: str
) -> None:
    small = split_net(net, scheme, 3, ("body",))
    x = data.test.inputs
    with torch.no_grad():
        errors = [
            float((reconstruct(small, net, data.calibration, refine=r)(x) - net(x)).square().mean())
            for r in (False, True)
        ]
    assert errors[1] < errors[0]


def test_patch_covariances_are_gathered_a_few_layers_at_a_time(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = fold_batch_norm(net, torch.zeros(1, 1, 12, 12))
    names = ["stem", "body", "down"]
    assert refit._groups(folded, names) == [names]
    monkeypatch.setattr(refit, "AT_A_TIME", 144**2 + 9**2)
    assert refit._groups(folded, names) == [["stem", "body"], ["down"]]
