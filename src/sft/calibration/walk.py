"""A captured graph run node by node over several batches, with rounding and in float, in step.

At every node both paths have arrived there: what the layers before were rounded to is already in
the rounded path, so that a layer can be fitted to what it will really see. The float path ends
where nobody asks for it any more. A value is dropped after its last use.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sft.quantizers.fake import ActivationFakeQuantize, WeightFakeQuantize

Values = dict[Node, list[Any]]


class Walk:
    """The float path (`plain`) and the path with rounding (`rounded`), each a list by batch.

    plain_until : the last node whose float value is wanted; None if none is.
    """

    def __init__(
        self, graph: GraphModule, batches: Sequence[Tensor], plain_until: Node | None = None
    ) -> None:
        self.graph, self.batches, self.plain_until = graph, batches, plain_until
        self.plain: Values = {}
        self.rounded: Values = {}
        self._left = {node: len(node.users) for node in graph.graph.nodes}

    def __iter__(self) -> Iterator[Node]:
        """Each node when its inputs are there; then each path runs it unless its value is set."""
        plain = self.plain_until is not None
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return
            if node.op == "get_attr":
                value = _attribute(self.graph, str(node.target))
                self.rounded[node] = [value]
                if plain:
                    self.plain[node] = [value.detach().clone()]
                continue
            yield node
            if plain and node not in self.plain:
                self.plain[node] = self.run(node, self.plain, rounding=False)
            if node not in self.rounded:
                self.rounded[node] = self.run(node, self.rounded, rounding=True)
            self._drop(node)
            if node is self.plain_until:
                plain = False
                self.plain.clear()

    def outputs(self) -> Tensor:
        """The network's first outputs for all batches, rounded, after the walk."""
        last = next(iter(reversed(self.graph.graph.nodes)))
        first = next(n for n in last.all_input_nodes)
        return torch.cat(self.rounded[first])

    def run(self, node: Node, values: Values, rounding: bool) -> list[Any]:
        """What the node gives for each batch on one path."""
        if node.op == "placeholder":
            return list(self.batches)
        if any(len(values[s]) > 1 for s in node.all_input_nodes) or not node.all_input_nodes:
            count = len(self.batches)
        else:
            count = max(len(values[s]) for s in node.all_input_nodes)
        return [self._once(node, values, index, rounding) for index in range(count)]

    def _once(self, node: Node, values: Values, index: int, rounding: bool) -> Any:
        def value_of(source: Node) -> Any:
            found = values[source]
            return found[index] if len(found) > 1 else found[0]

        arguments, named = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            module = self.graph.get_submodule(str(node.target))
            fake = isinstance(module, ActivationFakeQuantize | WeightFakeQuantize)
            return arguments[0] if fake and not rounding else module(*arguments, **named)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
        assert callable(node.target)
        function: Callable[..., Any] = node.target
        return function(*arguments, **named)

    def _drop(self, node: Node) -> None:
        for source in node.all_input_nodes:
            self._left[source] -= 1
            if self._left[source] == 0:
                self.plain.pop(source, None)
                self.rounded.pop(source, None)


def _attribute(graph: GraphModule, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    value: Tensor = getattr(graph.get_submodule(owner), last)
    return value


def weighted_user(rounding: Node) -> Node | None:
    """The only operator that uses a rounded weight, as its second argument; None if several do."""
    users = list(rounding.users)
    if len(users) == 1 and len(users[0].args) > 1 and users[0].args[1] is rounding:
        return users[0]
    return None


__all__ = ["Values", "Walk", "weighted_user"]
