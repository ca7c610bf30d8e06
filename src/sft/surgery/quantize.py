"""From a factorised float model to integers: prepared for training, then converted for export."""

import warnings

import torch
from torch import nn
from torch.fx import GraphModule

from sft.core.copies import copy_module
from sft.core.data import Loader, inputs_of
from sft.core.errors import InputError
from sft.core.records import Plan, Target
from sft.quantizers.annotate import PlanQuantizer
from sft.quantizers.fake import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from sft.quantizers.pt2e import convert_pt2e, prepare_qat_pt2e
from sft.runtimes.targets import find_target
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

    def observe(self, enabled: bool) -> None:
        """Let the activation ranges grow with what passes, or freeze them."""
        for module in self.graph_module.modules():
            if isinstance(module, ActivationFakeQuantize):
                module.observing = enabled

    def weights(self) -> dict[str, tuple[nn.Parameter, WeightPerChannelFakeQuantize]]:
        """Every rounded weight with its rounding, by parameter name."""
        found: dict[str, tuple[nn.Parameter, WeightPerChannelFakeQuantize]] = {}
        for node in self.graph_module.graph.nodes:
            if node.op != "call_module":
                continue
            module = self.graph_module.get_submodule(str(node.target))
            if isinstance(module, WeightPerChannelFakeQuantize):
                name = str(node.args[0].target)
                found[name] = (self.graph_module.get_parameter(name), module)
        return found

    def activations(self) -> dict[str, ActivationFakeQuantize]:
        """Every activation's rounding, by its module name in the graph."""
        return {
            name: module
            for name, module in self.graph_module.named_modules()
            if isinstance(module, ActivationFakeQuantize)
        }

    def convert(self) -> GraphModule:
        """The graph with integer weights and explicit quantise/dequantise steps (a copy)."""
        graph = copy_module(self).graph_module.cpu()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph(self.example.cpu())
            converted = convert_pt2e(graph)
        assert isinstance(converted, GraphModule)
        return converted


def quantize(
    small: nn.Module, plan: Plan, target: Target | str, calibration: Loader
) -> QuantizedModel:
    """Round weights and activations as the plan and the target say; ranges from calibration data.

    target : a target or its name.
    `small` is not touched. Raises `InputError` if it cannot be captured or the data is empty.
    """
    found = find_target(target) if isinstance(target, str) else target
    prepared = prepare(small, plan, found)
    device = next(small.parameters()).device
    batches = 0
    with torch.no_grad():
        for batch in calibration:
            prepared(inputs_of(batch).to(device))
            batches += 1
    if batches == 0:
        raise InputError("The calibration data is empty: activation ranges need at least a batch.")
    prepared.observe(False)
    return prepared


def prepare(small: nn.Module, plan: Plan, target: Target) -> QuantizedModel:
    """The captured graph with rounding in place and ranges still to be observed."""
    first = next(small.parameters())
    example = torch.zeros(1, *plan.input_shape, device=first.device, dtype=first.dtype)
    graph = capture(copy_module(small), example)
    bits = {row.name: row.option.weight_bits for row in plan.rows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_qat_pt2e(graph, PlanQuantizer(target, bits))
    assert isinstance(prepared, GraphModule)
    model = QuantizedModel(prepared, example, target, plan)
    rounded = set(model.weights())
    for row in plan.rows:
        if row.option.weight_bits and not any(w.startswith(f"{row.name}.") for w in rounded):
            raise InputError(
                f"Layer '{row.name}' is planned in integers ({row.option}) but its weight is not a "
                f"plain parameter of the captured graph (parametrised or computed?). Set its "
                f'scheme to "keep".'
            )
    return model
