"""How many bytes of activations are alive while a layer runs: computed, from the captured graph.

A value is alive from the operator that gives it to the last one that reads it. A runtime may need
more (scratch space, padded layouts) or less (operators that work in place); the measured memory of
the process is reported apart.
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sft.core.errors import InputError
from sft.core.records import KEEP, STORED, Layer, Option
from sft.decompositions import decompositions
from sft.layers.interpolative import INTERPOLATIVE
from sft.layers.residual import RESIDUAL
from sft.surgery.modules import capture

FLOAT_BYTES, INTEGER_BYTES = 4, 1
VIEWS = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "detach")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Numbers of activations of one sample that are alive at a time.

    peak : the most in the whole network; beside : while each layer runs, without what it reads and
    gives; elsewhere : the most while no listed layer runs; lasting : layers behind which what they
    read is read once more.
    """

    peak: int
    beside: dict[str, int]
    elsewhere: int
    lasting: frozenset[str] = frozenset()

    def of(self, layer: Layer, option: Option, integers: bool) -> int:
        """Bytes alive while a layer runs under an option.

        integers : whether the network around it keeps its activations in integers.
        """
        around = INTEGER_BYTES if integers else FLOAT_BYTES
        floats = option.weight_bits is None or option.scheme in (KEEP, STORED)
        own = FLOAT_BYTES if floats else INTEGER_BYTES
        widest = _widest_step(layer, option, layer.name in self.lasting)
        return self.beside.get(layer.name, 0) * around + widest * own


def alive_numbers(network: nn.Module, example: Tensor, layers: Sequence[Layer]) -> Memory:
    """What is alive beside each layer; where the network cannot be captured, only the layers."""
    try:
        graph = capture(network, example[:1])
    except InputError:
        widest = max(_widest_step(x, Option(KEEP, weight_bits=None), False) for x in layers)
        return Memory(widest, {}, 0)
    return _of_graph(graph, {f"{layer.name}.weight": layer.name for layer in layers})


def _of_graph(graph: GraphModule, weights: dict[str, str]) -> Memory:
    """A view lives in its source, which is alive while any view of it is read."""
    order = list(graph.graph.nodes)
    ends: dict[Node, int] = {}
    for index, node in enumerate(order):
        for source in node.all_input_nodes:
            ends[_held_in(source)] = index
    alive: dict[Node, int] = {}
    beside: dict[str, int] = {}
    lasting: set[str] = set()
    peak = elsewhere = 0
    for index, node in enumerate(order):
        if _held_in(node) is node:
            alive[node] = _numbers(node)
        total = sum(alive.values())
        peak = max(peak, total)
        own = [weights[str(s.target)] for s in node.all_input_nodes if str(s.target) in weights]
        touched = {node, *map(_held_in, node.all_input_nodes)}
        for name in own:
            rest = sum(numbers for n, numbers in alive.items() if n not in touched)
            beside[name] = max(beside.get(name, 0), rest)
            if any(_numbers(n) and ends[n] > index for n in touched - {node}):
                lasting.add(name)
        if not own:
            elsewhere = max(elsewhere, total)
        alive = {n: numbers for n, numbers in alive.items() if ends.get(n, -1) > index}
    return Memory(peak, beside, elsewhere, frozenset(lasting))


def _widest_step(layer: Layer, option: Option, lasting: bool) -> int:
    """The most numbers of a layer that are alive at one of its operators.

    lasting : what the layer reads stays alive through all of them.
    """
    read = math.prod(layer.input_shape)
    return max(n + read * (lasting and not reads) for n, reads in _steps(layer, option))


def _steps(layer: Layer, option: Option) -> list[tuple[int, bool]]:
    """Of each operator of a layer: the numbers alive, and whether what the layer reads is among
    them. A `ResidualSFT` adds a branch to its whole kernel, an `InterpolativeSFT` joins and orders
    the outputs of its factors, every other split layer is a chain.
    """
    read, given = math.prod(layer.input_shape), math.prod(layer.output_shape)
    if not option.rank or layer.geometry is None:
        return [(read + given, True)]
    parts = decompositions[option.scheme].factors(layer.geometry, option.rank)
    if option.scheme == RESIDUAL:
        middle = parts[1].outputs * math.prod(parts[1].output_size(layer.input_size))
        return [(read + given + middle, True), (2 * given + middle, False), (3 * given, False)]
    values, size = [read], layer.input_size
    for part in parts:
        size = part.output_size(size)
        values.append(part.outputs * math.prod(size))
    steps = [(a + b, not place) for place, (a, b) in enumerate(pairwise(values))]
    return [*steps, (2 * given, False)] if option.scheme == INTERPOLATIVE else steps


def _held_in(node: Node) -> Node:
    """The node whose memory a view shows; any other node itself."""
    while node.op == "call_function" and str(node.target).split(".")[1:2] in [[v] for v in VIEWS]:
        node = node.all_input_nodes[0]
    return node


def _numbers(node: Node) -> int:
    """Numbers of a node's value that belong to one sample (the graph was captured with two)."""
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor):
        return 0
    return int(value.shape[1:].numel()) if value.ndim else 0
