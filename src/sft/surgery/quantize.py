"""A factorised float model as a graph with rounding in place: trained on, then converted."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sft.core.copies import copy_module
from sft.core.errors import InputError
from sft.core.records import STORED, Plan, Target
from sft.layers.opened import OPENED
from sft.quantizers.annotate import PlanQuantizer
from sft.quantizers.fake import ActivationFakeQuantize, Mode, WeightFakeQuantize
from sft.quantizers.pt2e import convert_pt2e, prepare_qat_pt2e
from sft.surgery.modules import capture


class QuantizedModel(nn.Module):
    """A captured network whose weights and activations are rounded as the target will.

    It can be trained on (gradients pass the rounding straight through); the integers it holds
    when training ends are the integers of the exported file. `example` is ``(1, ...)``.
    """

    def __init__(
        self, graph: GraphModule, example: torch.Tensor, target: Target, plan: Plan
    ) -> None:
        super().__init__()
        self.graph_module, self.target, self.plan = graph, target, plan
        self.register_buffer("example", example.detach().clone(), persistent=False)
        self.example: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.graph_module(x)
        return outputs

    def train(self, mode: bool = True) -> "QuantizedModel":
        """The captured graph is in evaluation form for good (no dropout, frozen batch norm)."""
        self.training = mode
        return self

    def set_modes(self, activations: Mode, weights: Mode) -> None:
        """What the roundings of all activations and of all weights do with what passes."""
        for module in self.graph_module.modules():
            if isinstance(module, ActivationFakeQuantize):
                module.mode = activations
            elif isinstance(module, WeightFakeQuantize):
                module.mode = weights

    def rounded_nodes(self) -> Iterable[tuple[Node, Node, WeightFakeQuantize]]:
        """Each rounded weight: its parameter's node, the rounding's node, and the rounding."""
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
                if isinstance(module, WeightFakeQuantize):
                    parameter = node.args[0]
                    assert isinstance(parameter, Node)
                    if parameter.op == "get_attr":
                        yield parameter, node, module

    def weights(self) -> dict[str, tuple[nn.Parameter, WeightFakeQuantize]]:
        """Every rounded weight with its rounding, by parameter name."""
        return {
            str(parameter.target): (
                self.graph_module.get_parameter(str(parameter.target)),
                rounding,
            )
            for parameter, _, rounding in self.rounded_nodes()
        }

    def activations(self) -> dict[str, ActivationFakeQuantize]:
        """Every activation's rounding, by its module name in the graph."""
        return {
            name: module
            for name, module in self.graph_module.named_modules()
            if isinstance(module, ActivationFakeQuantize)
        }

    def convert(self) -> GraphModule:
        """The graph with integer weights and explicit quantise/dequantise steps (a copy)."""
        copied = copy_module(self).cpu()
        copied.set_modes(Mode.ROUND, Mode.ROUND)
        graph = copied.graph_module
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph(copied.example)
            for weight, rounding in copied.weights().values():
                weight.copy_(rounding.on_grid(weight))
            converted = convert_pt2e(graph)
        assert isinstance(converted, GraphModule)
        return converted


def prepare(small: nn.Module, plan: Plan, target: Target) -> QuantizedModel:
    """The captured graph with rounding in place and ranges still to be observed."""
    first = next(small.parameters())
    example = torch.zeros(1, *plan.input_shape, device=first.device, dtype=first.dtype)
    graph = capture(copy_module(small), example)
    bits = {row.name: row.option.weight_bits for row in plan.rows}
    stored = {row.name for row in plan.rows if row.option.scheme == STORED}
    for name in _closed_recurrent(small):
        own = [r for r in plan.rows if r.name.startswith(f"{name}.") and r.option.scheme == STORED]
        if own:
            bits[name] = max(row.option.weight_bits or 0 for row in own)
            stored.add(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_qat_pt2e(graph, PlanQuantizer(target, bits, frozenset(stored)))
    assert isinstance(prepared, GraphModule)
    model = QuantizedModel(prepared, example, target, plan)
    _check(model, plan, set(_closed_recurrent(small)))
    return model


def _check(model: QuantizedModel, plan: Plan, closed: set[str]) -> None:
    """Every layer that is planned in few bits has a rounded weight."""
    rounded = set(model.weights())
    for row in plan.rows:
        inside = {name for name in closed if row.name.startswith(f"{name}.")}
        names = inside or {row.name}
        if row.option.weight_bits and not any(
            weight.startswith(f"{name}.") for weight in rounded for name in names
        ):
            raise InputError(
                f"Layer '{row.name}' is planned in integers ({row.option}) but its weight is not a "
                f"plain parameter of the captured graph (parametrised or computed?), or target "
                f"'{model.target.name}' has no such layer in integers. Set its scheme to "
                f'"keep".'
            )


def _closed_recurrent(small: nn.Module) -> list[str]:
    return [name for name, module in small.named_modules() if type(module) in OPENED]
