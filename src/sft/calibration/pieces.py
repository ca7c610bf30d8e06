"""A captured graph cut where a single tensor is alive, and one piece of it run by itself.

Every way from the input to the output passes a cut, so residual and parallel branches stay whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sft.quantizers.fake import ActivationFakeQuantize, WeightFakeQuantize
from sft.surgery.quantize import QuantizedModel

SIZE = torch.ops.aten.sym_size.int

Rounded = Callable[[ActivationFakeQuantize, Tensor], Tensor]  # what a rounding does with a tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a graph with one tensor in and one out, both ``(N, ...)`` over N samples.

    nodes : what is run, in the graph's order, constants included; the last gives the result.
    weights : parameters that are rounded in this piece and used nowhere else; at least one.
    activations : modules that round activations here and in no piece before.
    """

    source: Node
    nodes: tuple[Node, ...]
    weights: tuple[str, ...]
    activations: tuple[str, ...]

    @property
    def first(self) -> Node:
        """The first node that works on data."""
        return next(node for node in self.nodes if self.source in node.all_input_nodes)

    @property
    def last(self) -> Node:
        """The node that gives the result."""
        return self.nodes[-1]


def cut(model: QuantizedModel) -> list[Piece]:
    """The graph as pieces, each with a rounded weight of its own, in order.

    A piece ends behind its weighted operators, after what keeps as many numbers (an activation
    function and its rounding); pooling goes to the next. What stands behind the last piece has no
    rounded weight, or no single tensor comes out of it.
    """
    graph = model.graph_module
    nodes = list(graph.graph.nodes)
    moving = _moving(nodes)
    segments = _segments(nodes, moving)
    own = _own_weights(model, segments, moving)
    pieces: list[Piece] = []
    names: dict[nn.Module, str] = {m: name for name, m in model.activations().items()}
    left = set(names.values())
    for start, stop in _groups(segments, set(own)):
        run = [node for segment in segments[start:stop] for node in segment]
        weights = tuple(name for index in range(start, stop) for name in own.get(index, []))
        modules = [graph.get_submodule(str(n.target)) for n in run if n.op == "call_module"]
        fresh = tuple(dict.fromkeys(names[m] for m in modules if names.get(m) in left))
        left -= set(fresh)
        needed = _with_constants(run, moving)
        ordered = tuple(node for node in nodes if node in needed)
        pieces.append(Piece(segments[start - 1][-1], ordered, weights, fresh))
    return pieces


class Runner(Interpreter):
    """Runs pieces of a graph with other parameters in place, and its own rounding of activations.

    parameters : by name, taken instead of the graph's own, which are read detached. Weights are
        not rounded: give them on their grid. rounded : what is done at every rounding of an
        activation.
    """

    def __init__(
        self, graph: GraphModule, parameters: Mapping[str, Tensor], rounded: Rounded
    ) -> None:
        super().__init__(graph)
        self._parameters, self._rounded = parameters, rounded

    def run_piece(self, piece: Piece, x: Tensor) -> Tensor:
        """What the piece gives, ``(N, ...)``, for the tensor ``(N, ...)`` that enters it."""
        self.env = {piece.source: x}
        for node in piece.nodes:
            unknown = node.target == SIZE and node.args[0] not in self.env
            self.env[node] = len(x) if unknown else self.run_node(node)
        result: Tensor = self.env[piece.last]
        self.env = {}
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter that was given, or the graph's own."""
        if target in self._parameters:
            return self._parameters[target]
        value = self.fetch_attr(target)
        return value.detach() if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Weights pass, activations are rounded as was said, other modules run."""
        module = self.fetch_attr(target)
        if isinstance(module, WeightFakeQuantize):
            return args[0]
        if isinstance(module, ActivationFakeQuantize):
            return self._rounded(module, args[0])
        return super().call_module(target, args, kwargs)


def _moving(nodes: list[Node]) -> set[Node]:
    """Nodes that depend on the input's values; the size of the batch is no such value."""
    entry = next(node for node in nodes if node.op == "placeholder")
    batch = str(entry.meta["val"].shape[0])
    moving = {entry}
    for node in nodes:
        known = node.target == SIZE and str(node.meta.get("val")) == batch
        if not known and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _segments(nodes: list[Node], moving: set[Node]) -> list[list[Node]]:
    """The moving nodes, from one place where a single tensor is alive to the next.

    The first segment is the input alone; each ends with the tensor.
    """
    left = {node: sum(user in moving for user in node.users) for node in moving}
    batch = str(next(n for n in nodes if n.op == "placeholder").meta["val"].shape[0])
    segments: list[list[Node]] = []
    alive: set[Node] = set()
    run: list[Node] = []
    for node in nodes:
        if node not in moving or node.op == "output":
            continue
        run.append(node)
        alive.add(node)
        for source in node.all_input_nodes:
            if source in moving:
                left[source] -= 1
                alive -= {source} if left[source] == 0 else set()
        if alive == {node} and (node.op == "placeholder" or _is_batch(node, batch)):
            segments.append(run)
            run = []
    return segments


def _groups(segments: list[list[Node]], weighted: set[int]) -> list[tuple[int, int]]:
    """Ranges of segments, from start to before stop, that each have one or more with a weight."""
    groups: list[tuple[int, int]] = []
    start, closing = 1, False
    for index in range(1, len(segments)):
        kept = _numbers(segments[index][-1]) == _numbers(segments[index - 1][-1])
        if closing and (index in weighted or not kept):
            groups.append((start, index))
            start, closing = index, False
        closing = closing or index in weighted
        if closing and index == len(segments) - 1:
            groups.append((start, index + 1))
    return groups


def _own_weights(
    model: QuantizedModel, segments: list[list[Node]], moving: set[Node]
) -> dict[int, list[str]]:
    """By segment, the rounded parameters that are read there and nowhere else."""
    place = {node: index for index, segment in enumerate(segments) for node in segment}
    found: dict[int, list[str]] = {}
    for parameter, _, _ in model.rounded_nodes():
        places = {place.get(reader) for reader in _readers(parameter, moving)}
        where = places.pop() if len(places) == 1 and len(parameter.users) == 1 else None
        if where is not None:
            found.setdefault(where, []).append(str(parameter.target))
    return found


def _readers(constant: Node, moving: set[Node]) -> set[Node]:
    """The moving nodes that read a constant, or what is computed from it."""
    readers: set[Node] = set()
    waiting = list(constant.users)
    while waiting:
        node = waiting.pop()
        if node in moving:
            readers.add(node)
        else:
            waiting += list(node.users)
    return readers


def _with_constants(run: list[Node], moving: set[Node]) -> set[Node]:
    """The nodes of a run and those that they need and that do not depend on data."""
    needed, waiting = set(run), list(run)
    while waiting:
        node = waiting.pop()
        fresh = {s for s in node.all_input_nodes if s not in moving} - needed
        needed |= fresh
        waiting += list(fresh)
    return needed


def _is_batch(node: Node, batch: str) -> bool:
    """Whether a node gives a floating tensor with the samples along its first axis."""
    value = _value(node)
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
    return floating and str(value.shape[0]) == batch


def _numbers(node: Node) -> int:
    return int(_value(node).shape[1:].numel())


def _value(node: Node) -> Any:
    """A node's example value; a rounding has that of what it rounds."""
    while "val" not in node.meta and node.op == "call_module":
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node.meta.get("val")
