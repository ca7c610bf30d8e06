"""Which layer of a file computes something else than its simulation.

Each weighted operator of the simulation gets what the file gave before it, so that an error is
seen where it is made and nowhere behind.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sft.core.errors import InputError
from sft.core.records import Artifact
from sft.quantizers.fake import ActivationFakeQuantize
from sft.quantizers.operators import CLAMPING, STORED, WEIGHTED, module_of
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel
from sft.verification.taps import read_taps

SAMPLES = 8
SHARE = 1e-3  # of a layer's outputs; a tie between two integers may be decided either way
FLOAT_STEPS = 255  # an output in float is measured in this part of its greatest magnitude
RECURRENT = tuple(op for op, (place, _) in STORED.items() if place != 1)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A layer, the share of its outputs that are off by more than a step, and by how many steps."""

    layer: str
    share: float
    steps: float

    def __str__(self) -> str:
        return (
            f"The first layer that differs is '{self.layer}': {self.share:.1%} of its outputs are "
            f"off by more than one step, by up to {self.steps:.1f}."
        )


def first_divergence(
    artifact: Artifact, simulation: QuantizedModel, x: Tensor
) -> Divergence | None:
    """The first of `divergences`, or None."""
    return next(iter(divergences(artifact, simulation, x)), None)


def divergences(artifact: Artifact, simulation: QuantizedModel, x: Tensor) -> list[Divergence]:
    """The layers of which file and simulation differ by more than a step, in their order.

    x : samples ``(N, ...)``, of which the first 8 are used. A step is that of the integers behind
    the layer, or 1/255 of the greatest output where they stay float. Recurrent operators are not
    compared. Raises `InputError` if the file has other layers than the simulation.
    """
    x, graph = x[:SAMPLES].cpu(), simulation.graph_module
    layers = [n for n in graph.graph.nodes if n.target in WEIGHTED or _is_transposed(n)]
    runtime = find_target(artifact.target).runtime
    given = [torch.from_numpy(values) for values in read_taps(artifact.path, runtime, x.numpy())]
    if len(layers) != len(given):
        raise InputError(
            f"'{artifact.path}' has {len(given)} layers with weights, its simulation has "
            f"{len(layers)}: they are not of one network."
        )
    places = {_place(graph, node): index for index, node in enumerate(layers)}
    off: dict[int, list[Tensor]] = {index: [] for index in range(len(layers))}
    for sample in range(len(x)):
        comparison = _Comparison(graph, places, [values[sample] for values in given])
        comparison.run(x[sample : sample + 1].to(simulation.example.device))
        for index, steps in comparison.off.items():
            off[index].append(steps)
    found = ((layers[index], torch.cat(steps)) for index, steps in off.items() if steps)
    judged = [
        Divergence(_layer_of(node), float((steps > 1.01).float().mean()), float(steps.max()))
        for node, steps in found
    ]
    return [each for each in judged if each.share > SHARE]


class _Comparison(Interpreter):
    """Runs the simulation of one sample and puts the file's values in place of its own.

    places : the index of a layer, by the node whose value is compared. given : by index, the
    file's values, flat. `off` : by index, how many steps each value is off.
    """

    def __init__(self, graph: GraphModule, places: dict[Node, int], given: list[Tensor]) -> None:
        super().__init__(graph)
        self.places, self.given = places, given
        self.off: dict[int, Tensor] = {}

    @torch.no_grad()
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n not in self.places:
            return value
        index = self.places[n]
        found = self.given[index].to(value)
        if found.numel() != value.numel():
            raise InputError(
                f"Layer '{_layer_of(n)}' gives {tuple(value.shape)} in the simulation and "
                f"{found.numel()} numbers in the file: they are not of one network."
            )
        step = value.abs().max() / FLOAT_STEPS
        if n.op == "call_module":
            step = self.fetch_attr(str(n.target)).scale.detach()
        found = found.reshape(value.shape)
        self.off[index] = ((found - value).abs() / step.clamp_min(1e-30)).flatten().cpu()
        return found


def _place(graph: GraphModule, node: Node) -> Node:
    """The rounding behind a layer, through a rectifier; the layer itself where there is none."""
    last = node
    while len(last.users) == 1:
        last = next(iter(last.users))
        if last.op == "call_module":
            module = graph.get_submodule(str(last.target))
            return last if isinstance(module, ActivationFakeQuantize) else node
        if last.target not in CLAMPING:
            return node
    return node


def _is_transposed(node: Node) -> bool:
    return node.target in STORED and node.target not in RECURRENT


def _layer_of(node: Node) -> str:
    """The module whose weight a node multiplies with, or the one before it."""
    source = node
    while source.target not in WEIGHTED and not _is_transposed(source):
        source = source.all_input_nodes[0]
    weight = source.args[1]
    while isinstance(weight, Node) and weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    assert isinstance(weight, Node)
    return module_of(weight)


__all__ = ["Divergence", "divergences", "first_divergence"]
