"""Activations that are alive at a time, against a count that reads every operator's values."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.core.records import DENSE, KEEP, STORED, Layer, Option
from sft.decompositions import decompositions
from sft.layers.interpolative import INTERPOLATIVE
from sft.layers.residual import RESIDUAL
from sft.models.inspect import inspect
from sft.profiling.memory import Memory, alive_numbers
from sft.surgery.modules import capture


class Residual(nn.Module):
    """A wide branch beside a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 12, 1)
        self.back, self.fc = nn.Conv2d(12, 4, 3, padding=1), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.back(torch.relu(self.wide(x)))
        return self.fc(x.flatten(1))


class Viewing(nn.Module):
    """A value that lives on only because a view of it is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(12, 24), nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x).view(-1, 2, 12)
        turned = halves.transpose(1, 2).permute(0, 2, 1)
        y = self.middle(self.middle(x))
        return self.last(y + turned.mean(1))


class Heads(nn.Module):
    """Large values where no layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(self.only(x), scale_factor=4)
        return (x * 2 + x).mean((2, 3))


NETS = {
    "residual": (Residual, (2, 6, 6)),
    "viewing": (Viewing, (12,)),
    "heads": (Heads, (1, 6, 6)),
    "chain": (lambda: nn.Sequential(nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 4)), (9,)),
}


def made(kind: str) -> tuple[nn.Module, Tensor, tuple[Layer, ...]]:
    build, shape = NETS[kind]
    network, x = build().eval(), torch.randn(2, *shape)
    return network, x, inspect(network, x, "net").layers


class Counting(torch.fx.Interpreter):
    """Runs a graph and, at every operator, adds up the memory that is still wanted.

    What belongs together is told by the memory of the values themselves: a view shares it.
    """

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[torch.fx.Node, Tensor] = {}
        self.totals: dict[torch.fx.Node, int] = {}
        self.beside: dict[torch.fx.Node, int] = {}
        self.lasting: set[torch.fx.Node] = set()
        self.order = list(graph.graph.nodes)

    def run_node(self, node: torch.fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, Tensor) and node.op != "get_attr":
            self.values[node] = value
        later = {n for user in self.order[self.order.index(node) :] for n in user.all_input_nodes}
        alive = [v for n, v in self.values.items() if n in later or n is node]
        touched = [self.values[n] for n in (node, *node.all_input_nodes) if n in self.values]
        self.totals[node] = numbers(alive)
        own = {v.untyped_storage().data_ptr() for v in touched}
        read = [n for n in node.all_input_nodes if n in self.values]
        users = self.order[self.order.index(node) + 1 :]
        last = {n for user in users for n in user.all_input_nodes if n in self.values}
        memory = {self.values[n].untyped_storage().data_ptr() for n in last}
        if any(self.values[n].untyped_storage().data_ptr() in memory for n in read):
            self.lasting.add(node)
        self.beside[node] = numbers([v for v in alive if v.untyped_storage().data_ptr() not in own])
        return value


def numbers(values: list[Tensor]) -> int:
    """Numbers of one sample (of two) in the memory of some values, each memory once."""
    sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
    return sum(sizes.values()) // 4 // 2


@pytest.mark.parametrize("kind", NETS)
def test_what_is_alive_is_what_the_values_of_a_run_hold(kind: str) -> None:
    network, x, layers = made(kind)
    count = Counting(capture(network, x))
    with torch.no_grad():
        count.run(x)
    weights = {f"{layer.name}.weight": layer.name for layer in layers}
    beside: dict[str, int] = {}
    lasting: set[str] = set()
    elsewhere = 0
    for node, total in count.totals.items():
        own = [weights[str(s.target)] for s in node.all_input_nodes if str(s.target) in weights]
        for name in own:
            beside[name] = max(beside.get(name, 0), count.beside[node])
            if node in count.lasting:
                lasting.add(name)
        if not own:
            elsewhere = max(elsewhere, total)
    found = alive_numbers(network, x, layers)
    assert found == Memory(max(count.totals.values()), beside, elsewhere, frozenset(lasting))


@pytest.mark.parametrize(
    ("name", "scheme", "rank"),
    [
        ("wide", KEEP, ()),
        ("wide", "channel_in", (2,)),
        ("wide", RESIDUAL, (2,)),
        ("wide", INTERPOLATIVE, (3,)),
        ("back", "tucker2", (3, 2)),
        ("back", RESIDUAL, (1,)),
        ("back", INTERPOLATIVE, (2,)),
        ("back", INTERPOLATIVE, (4,)),
    ],
)
def test_a_split_layer_holds_what_its_own_operators_hold(
    name: str, scheme: str, rank: tuple[int, ...]
) -> None:
    """Also behind splits that are no chain, and where a shortcut needs the input ("wide")."""
    network, x, layers = made("residual")
    (layer,) = [each for each in layers if each.name == name]
    found = alive_numbers(network, x, layers)
    if rank:
        dense = network.get_submodule(name)
        network.set_submodule(name, decompositions[scheme].build(dense, rank, None))
    count = Counting(capture(network.eval(), x))
    with torch.no_grad():
        count.run(x)
    inside = [
        total
        for node, total in count.totals.items()
        if any(path == name for path, _ in node.meta.get("nn_module_stack", {}).values())
    ]
    assert len(inside) >= max(len(rank), 1)
    assert found.of(layer, Option(scheme, rank, None), False) == 4 * max(inside)


def test_by_hand() -> None:
    network, x, layers = made("residual")
    found = alive_numbers(network, x, layers)
    stem, wide = 4 * 36, 12 * 36
    # While `back` runs, its input and output, and the stem's output for the addition.
    assert found.beside == {"stem": 0, "wide": 0, "back": stem, "fc": 0}
    assert found.peak == max(2 * wide + stem, wide + 2 * stem)
    network, x, layers = made("heads")
    found = alive_numbers(network, x, layers)
    assert found.elsewhere == found.peak == 3 * 2 * 24 * 24
    network, x, layers = made("viewing")
    assert alive_numbers(network, x, layers).beside["middle"] == 24
    assert alive_numbers(network, x, layers).beside["last"] == 0


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out", "spatial"])
def test_of_factors_the_widest_counts(scheme: str) -> None:
    network, x, layers = made("residual")
    found = alive_numbers(network, x, layers)
    (layer,) = [each for each in layers if each.name == "back"]
    assert layer.geometry is not None
    for rank in (1, 4, 12):
        first, second = decompositions[scheme].factors(layer.geometry, (rank,))
        between = math.prod(first.output_size((6, 6)))
        widest = max(12 * 36 + first.outputs * between, first.outputs * between + 4 * 36)
        option = Option(scheme, (rank,), 8)
        assert second.inputs == first.outputs
        assert found.of(layer, option, True) == 4 * 36 + widest
        floats = dataclasses.replace(option, weight_bits=None)
        assert found.of(layer, floats, False) == 4 * (4 * 36 + widest)
    whole = 4 * 36 + 12 * 36 + 4 * 36
    assert found.of(layer, Option(DENSE), True) == whole


@pytest.mark.parametrize(
    ("option", "around", "own"),
    [
        (Option(DENSE, (), 8), 1, 1),
        (Option(DENSE, (), 2), 1, 1),
        (Option(KEEP), 1, 4),
        (Option(STORED, (), 8), 1, 4),
        (Option("channel_in", (12,), 4), 1, 1),
        (Option("channel_in", (12,), None), 1, 4),
    ],
    ids=str,
)
def test_integers_take_a_byte_and_floats_four(option: Option, around: int, own: int) -> None:
    network, x, layers = made("residual")
    found = alive_numbers(network, x, layers)
    (layer,) = [each for each in layers if each.name == "back"]
    beside, widest = 4 * 36, 12 * 36 + (12 if option.rank else 4) * 36
    assert found.of(layer, option, True) == around * beside + own * widest
    assert found.of(layer, option, False) == 4 * beside + own * widest


def test_a_network_that_cannot_be_captured_counts_its_layers() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > -1e9 else -x)

    network, x = Branching().eval(), torch.randn(2, 2, 6, 6)
    layers = inspect(network, x, "net").layers
    found = alive_numbers(network, x, layers)
    assert found == Memory(16 * 36, {}, 0)
    assert found.of(layers[2], Option(DENSE), True) == 16 * 36
