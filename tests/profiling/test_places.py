"""A network with another layer in one place: as if the module were exchanged and all of it run."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.core.copies import copy_module
from sft.profiling import places as rooms
from sft.profiling.places import places
from sft.surgery.modules import get_module, replace_module


class Twice(nn.Module):
    """The middle layer is called twice; the others once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.middle(x))
        return self.last(self.middle(x))


class Branching(nn.Module):
    """Takes a branch on the values of its input, which no capture follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(x) if float(x.sum()) > -1e9 else x)


class Overwriting(nn.Module):
    """Writes into what its layers read, and into a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.rest = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        half = x[:, :2]
        x += self.middle(x)
        y = self.last(x)
        half.mul_(2)
        return y + self.rest(functional.relu_(x))


class Named(nn.Module):
    """Gives its layer's input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.own(input=x)).mean((2, 3))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ConvTranspose2d(6, 4, 2, 2),
    )  # fmt: skip


def reflecting() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding="same"),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.Linear(6, 4)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain, "depthwise": depthwise, "reflecting": reflecting, "perceptron": perceptron,
    "twice": Twice, "branching": Branching, "overwriting": Overwriting, "named": Named,
}  # fmt: skip
BY_MODULES = {"reflecting": {"0"}, "twice": {"middle"}, "branching": {"first", "last"}}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        yield


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in network.named_modules() if isinstance(getattr(m, "weight", None),
            nn.Parameter) and not isinstance(m, nn.BatchNorm2d)}  # fmt: skip


def changed(module: nn.Module) -> nn.Module:
    """Another layer of the same form."""
    other = copy_module(module)
    for parameter in other.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return other


def exchanged(network: nn.Module, modules: dict[str, nn.Module], x: Tensor) -> Tensor:
    """The outputs of a copy in which modules have been exchanged."""
    copied = copy_module(network)
    for name, module in modules.items():
        replace_module(copied, name, module)
    return copied(x)


@pytest.mark.parametrize("kind", NETS)
def test_a_place_gives_what_the_whole_network_would(kind: str) -> None:
    network = NETS[kind]().eval()
    batches = list(torch.randn(5, 2, 8, 8).split(3))
    names = list(layers_of(network))
    seen = []
    for place in places(network, names, batches):
        own = get_module(network, place.name)
        for module in (changed(own), own, changed(own)):
            want = torch.cat([exchanged(network, {place.name: module}, x) for x in batches])
            torch.testing.assert_close(place.outputs_with(module), want, rtol=1e-5, atol=1e-6)
        seen.append(place.name)
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("kind", NETS)
def test_stand_ins_stand_wherever_their_place_is_not_out(kind: str) -> None:
    network = NETS[kind]().eval()
    batches = list(torch.randn(4, 2, 8, 8).split(2))
    others = {name: changed(module) for name, module in layers_of(network).items()}
    for place in places(network, list(others), batches, others):
        own = get_module(network, place.name)
        for module in (own, others[place.name]):
            wanted = {**others, place.name: module}
            want = torch.cat([exchanged(network, wanted, x) for x in batches])
            torch.testing.assert_close(place.outputs_with(module), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("standing", [False, True])
def test_inputs_are_those_that_a_hook_sees(kind: str, standing: bool) -> None:
    network = NETS[kind]().eval()
    batches = list(torch.randn(5, 2, 8, 8).split(3))
    names = list(layers_of(network))
    others = {n: changed(get_module(network, n)) for n in names} if standing else {}
    copied = copy_module(network)
    for name, module in others.items():
        replace_module(copied, name, copy_module(module))
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        get_module(copied, name).register_forward_pre_hook(
            lambda _, args, named, name=name: seen[name].append(
                [*args, *named.values()][0].clone()
            ),
            with_kwargs=True,
        )
    for x in batches:
        copied(x)
    for place in places(network, names, batches, others or None):
        place.outputs_with(changed(get_module(network, place.name)))
        assert len(place.inputs) == len(seen[place.name])
        for found, want in zip(place.inputs, seen[place.name], strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
def test_only_layers_without_an_operator_of_their_own_run_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[str] = []
    slow = rooms._in_modules

    def counted(network: nn.Module, names: list[str], *more: object) -> Iterator[rooms.Place]:
        whole.extend(names)
        return slow(network, names, *more)

    monkeypatch.setattr(rooms, "_in_modules", counted)
    network = NETS[kind]().eval()
    names = list(layers_of(network))
    order = [p.name for p in places(network, names, [torch.randn(2, 2, 8, 8)])]
    assert set(whole) == BY_MODULES.get(kind, set())
    assert order == [n for n in names if n not in whole] + whole


@pytest.mark.parametrize("kind", NETS)
def test_neither_network_nor_batches_are_changed(kind: str) -> None:
    network = NETS[kind]().eval()
    batches = [torch.randn(3, 2, 8, 8)]
    modules = dict(network.named_modules())
    state = {k: v.clone() for k, v in network.state_dict().items()}
    before = batches[0].clone()
    for place in places(network, list(layers_of(network)), batches):
        place.outputs_with(changed(get_module(network, place.name)))
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert torch.equal(batches[0], before)


def test_a_residual_network_with_a_norm(net, data) -> None:
    x = data.calibration.inputs[:6]
    names = ["stem", "body", "down", "fc"]
    walked = list(places(net, ["body", "stem", "fc", "down"], [x[:4], x[4:]]))
    assert [p.name for p in walked] == names
    for place in places(net, names, [x[:4], x[4:]]):
        module = changed(get_module(net, place.name))
        want = exchanged(net, {place.name: module}, x)
        torch.testing.assert_close(place.outputs_with(module), want, rtol=1e-5, atol=1e-5)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).mean((2, 3))


@torch.no_grad()
def test_the_layer_behind_takes_up_a_loss_that_is_linear() -> None:
    """Halved outputs of the first layer are a loss that the second can mend wholly."""
    torch.manual_seed(0)
    network = TwoLayers().eval()
    batches = [torch.randn(16, 2, 12, 12) for _ in range(2)]
    wanted = torch.cat([network(x) for x in batches])
    halved = copy_module(network.first)
    halved.weight.mul_(0.5)
    halved.bias.mul_(0.5)
    place = next(iter(places(network, ["first", "second"], batches)))
    assert place.outputs_mended is not None
    alone = (place.outputs_with(halved) - wanted).square().mean()
    mended = (place.outputs_mended(halved, network.first) - wanted).square().mean()
    assert mended < 1e-4 * alone
    like_it = place.outputs_mended(halved, halved)  # nothing is lost against itself
    assert torch.allclose(like_it, place.outputs_with(halved), atol=1e-4)


@torch.no_grad()
def test_nothing_is_mended_behind_the_last_layer() -> None:
    torch.manual_seed(0)
    network = TwoLayers().eval()
    batches = [torch.randn(8, 2, 12, 12)]
    halved = copy_module(network.second)
    halved.weight.mul_(0.5)
    for place in places(network, ["first", "second"], batches):
        if place.name == "second":
            assert place.outputs_mended is not None
            mended = place.outputs_mended(halved, network.second)
            assert torch.equal(mended, place.outputs_with(halved))
