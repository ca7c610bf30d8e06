"""A network with another layer in the place of one: what it gives then, without running all of it.

Everything before a layer is the same whatever stands in its place. The captured graph is run once,
node by node, and at each layer only what follows is run again for each stand-in. A layer that has
no single operator of the graph to itself (it is called more than once, pads by itself, computes its
weight) is exchanged in the module, and the whole network is run.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sft.core.copies import copy_module
from sft.core.errors import InputError
from sft.core.kernels import KINDS, bias_of, geometry_of, weight_of
from sft.profiling.reading import kernel_rows, weight_of_rows
from sft.profiling.regression import solve_rows
from sft.surgery.modules import capture, get_module, replace_module

Values = dict[Node, Any]
Map = Callable[[Tensor], Tensor]
Mend = Callable[[Node, list[Tensor]], Map | None]

MENDED = 1  # layers behind one that are solved again: the second gains little more


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer where it stands.

    inputs : what it reads, batch by batch. outputs_with : the network's outputs ``(N, ...)`` with a
    module in the layer's place. outputs_mended : the same, with the layer behind it solved again,
    as `quantize` does: for what it then reads, to give what it gives with the second module in the
    place; None where the graph does not show it. All are valid until the next place is asked for.
    """

    name: str
    inputs: list[Tensor]
    outputs_with: Callable[[nn.Module], Tensor]
    outputs_mended: Callable[[nn.Module, nn.Module], Tensor] | None = None


def places(
    network: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    stand_ins: Mapping[str, nn.Module] | None = None,
) -> Iterator[Place]:
    """Every named layer in its place, in the order in which the network runs them.

    Layers that are exchanged in the module come last, in the order of `names`.
    network : in eval mode; it is not changed. batches : inputs ``(N, ...)``.
    stand_ins : modules that take the places of layers for good; `outputs_with` exchanges one of
    them. `inputs` are then those behind the stand-ins. One that is put in while its own place is
    out stands there from then on.
    """
    others = {} if stand_ins is None else stand_ins
    graph = _graph_of(network, batches[0])
    nodes = {} if graph is None else _own_nodes(graph, network, names)
    if graph is not None and set(others) <= set(nodes):
        yield from _in_graph(graph, network, nodes, batches, others)
    else:
        nodes = {}
    rest = [name for name in names if name not in nodes]
    if rest:
        yield from _in_modules(network, rest, batches, others)


def _graph_of(network: nn.Module, batch: Tensor) -> GraphModule | None:
    try:
        return capture(network, batch[:1])
    except InputError:
        return None


def _own_nodes(graph: GraphModule, network: nn.Module, names: Sequence[str]) -> dict[str, Node]:
    """The operator of each layer that is one operator and nothing else."""
    found: dict[str, Node] = {}
    for node in graph.graph.nodes:
        name = str(node.target).removesuffix(".weight")
        if node.op != "get_attr" or name not in names or len(node.users) != 1:
            continue
        module, (user,) = get_module(network, name), node.users
        plain = type(module) in KINDS.values() and getattr(module, "padding_mode", "") in (
            "",
            "zeros",
        )
        if plain and user.op == "call_function" and user.args[1] is node:
            found[name] = user
    return found


def _in_graph(
    graph: GraphModule,
    network: nn.Module,
    nodes: Mapping[str, Node],
    batches: Sequence[Tensor],
    stand_ins: Mapping[str, nn.Module],
) -> Iterator[Place]:
    names = {node: name for name, node in nodes.items()}
    order = list(graph.graph.nodes)
    values: list[Values] = [{} for _ in batches]
    left = {node: len(node.users) for node in order}
    for index, node in enumerate(order):
        if node in names:
            rest = _Rest(graph, order[index:], values, left, batches, names)
            fixed = {n: stand_ins[name] for n, name in names.items() if name in stand_ins}
            data = node.args[0]
            assert isinstance(data, Node)
            yield Place(
                names[node],
                [known[data] for known in values],
                partial(_with, rest, node, fixed),
                partial(_mended, rest, node, network),
            )
        if node.op == "output":
            return
        name = names.get(node, "")
        own: dict[Node, Map] = {node: stand_ins[name]} if name in stand_ins else {}
        for known, batch in zip(values, batches, strict=True):
            known[node] = _value(graph, node, known, batch, own)
        for source in _done(node, left):
            for known in values:
                known.pop(source, None)


@dataclasses.dataclass(frozen=True)
class _Rest:
    """What is left to run from a node on, for every batch."""

    graph: GraphModule
    nodes: list[Node]
    values: list[Values]
    left: dict[Node, int]
    batches: Sequence[Tensor]
    names: dict[Node, str]

    def run(self, maps: Mapping[Node, Map], mend: Mend | None = None) -> Tensor:
        """The first output ``(N, ...)``, on the processor.

        mend : gets each layer's node with what it reads, and may give another map for it.
        """
        own_copy = _apart if any(map(_writes, self.nodes)) else dict
        values, left = [own_copy(known) for known in self.values], dict(self.left)
        for node in self.nodes:
            if node.op == "output":
                return torch.cat([known[node.all_input_nodes[0]].cpu() for known in values])
            own: Mapping[Node, Map] = maps
            if mend is not None and node in self.names and node not in maps:
                read: Any = node.args[0]
                changed = mend(node, [known[read] for known in values])
                own = maps if changed is None else {**maps, node: changed}
            for known, batch in zip(values, self.batches, strict=True):
                known[node] = _value(self.graph, node, known, batch, own)
            for source in _done(node, left):
                for known in values:
                    known.pop(source, None)
        raise AssertionError("a graph ends with its outputs")


def _with(rest: _Rest, node: Node, fixed: Mapping[Node, Map], module: nn.Module) -> Tensor:
    return rest.run({**fixed, node: module})


def _mended(
    rest: _Rest, node: Node, network: nn.Module, module: nn.Module, like: nn.Module
) -> Tensor:
    """With the next `MENDED` layers solved again for the outputs that they have behind `like`."""
    wanted: dict[Node, list[Tensor]] = {}

    def remember(later: Node, inputs: list[Tensor]) -> Map | None:
        if len(wanted) < MENDED:
            layer = get_module(network, rest.names[later])
            wanted[later] = [layer(x) for x in inputs]
        return None

    def mend(later: Node, inputs: list[Tensor]) -> Map | None:
        layer = get_module(network, rest.names[later])
        bias, part = bias_of(layer), geometry_of(layer)
        if later not in wanted or bias is None or part.transposed:
            return None
        mended = copy_module(layer)
        weight = weight_of(mended)
        solved = solve_rows(kernel_rows(weight, part), part, inputs, wanted[later], 0)
        if solved is not None:
            weight.data.copy_(weight_of_rows(solved[0].to(weight), part))
            bias_of(mended).data.copy_(solved[1])  # type: ignore[union-attr]
        return mended

    rest.run({node: like}, remember)
    return rest.run({node: module}, mend)


def _writes(node: Node) -> bool:
    """Whether an operator writes into what it reads."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _apart(values: Values) -> Values:
    """Copies of the activations, in which views of one another stay views."""
    own = [node for node in values if node.op != "get_attr"]
    copies = copy.deepcopy([values[node] for node in own])
    return {**values, **dict(zip(own, copies, strict=True))}


def _done(node: Node, left: dict[Node, int]) -> Iterator[Node]:
    """The inputs of a node that nothing else reads after it."""
    for source in node.all_input_nodes:
        left[source] -= 1
        if left[source] == 0:
            yield source


def _value(
    graph: GraphModule, node: Node, values: Values, batch: Tensor, maps: Mapping[Node, Map]
) -> Any:
    if node.op == "placeholder":
        return batch
    if node.op == "get_attr":
        owner, _, last = str(node.target).rpartition(".")
        return getattr(graph.get_submodule(owner), last)
    arguments = map_arg(node.args, lambda source: values[source])
    named = map_arg(node.kwargs, lambda source: values[source])
    if node in maps:
        given: Any = arguments[0]
        return maps[node](given)
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*arguments, **named)
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
    assert callable(node.target)
    return node.target(*arguments, **named)


def _in_modules(
    network: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    stand_ins: Mapping[str, nn.Module],
) -> Iterator[Place]:
    """The same by exchanging modules in a copy of the network and running all of it."""
    copied = copy_module(network)
    for name, module in stand_ins.items():
        replace_module(copied, name, module)
    for name in names:
        own = get_module(copied, name)

        def outputs_with(module: nn.Module, name: str = name, own: nn.Module = own) -> Tensor:
            replace_module(copied, name, module)
            try:
                return torch.cat([copied(x).cpu() for x in batches])
            finally:
                replace_module(copied, name, own)

        yield Place(name, _inputs_of(copied, own, batches), outputs_with)


def _inputs_of(network: nn.Module, layer: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a layer reads in all its calls; copies, since the network may write into it."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((arguments[0] if arguments else named["input"]).detach().clone())

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for x in batches:
            network(x)
    finally:
        hook.remove()
    return seen
