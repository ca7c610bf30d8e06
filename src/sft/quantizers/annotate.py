"""The PT2E quantizer: which tensors of the graph become integers, and of which layout.

Convolutions and linear layers get integer inputs, per-channel integer weights and integer outputs
(behind the activation function that the runtime fuses); additions, pooling and reshapes between
them stay in integers, so that nothing falls back to float on the way.
"""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from sft.core.records import Target
from sft.quantizers.fake import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from sft.quantizers.pt2e import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

aten = torch.ops.aten
WEIGHTED = {
    aten.conv1d.default: "conv",
    aten.conv2d.default: "conv",
    aten.conv3d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.padding: "conv",
    aten.linear.default: "linear",
}
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
RECTIFIERS = {aten.relu.default, aten.relu_.default}
PASSING = {
    aten.flatten.using_ints: "flatten",
    aten.view.default: "flatten",
    aten.reshape.default: "flatten",
    aten.max_pool2d.default: "pool",
    aten.adaptive_avg_pool2d.default: "pool",
    aten.avg_pool2d.default: "pool",
}
KEY = "quantization_annotation"


class PlanQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a captured graph with a plan's bits and a target's integer layout.

    bits : bits of a layer's weights by the module's name (a factorised layer's factors inherit
        it); a name that is missing, or None, stays in float.
    """

    def __init__(self, target: Target, bits: Mapping[str, int | None]) -> None:
        super().__init__()
        layout = target.layout
        self.bits, self.operators, self.layout = bits, set(target.operators), layout
        self.activation = QuantizationSpec(
            getattr(torch, layout.activation_dtype),
            ActivationFakeQuantize,
            layout.activation_min,
            layout.activation_max,
            torch.per_tensor_affine,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target in WEIGHTED and WEIGHTED[node.target] in self.operators:
                self._annotate_weighted(node)
        for node in model.graph.nodes:
            if node.target in ADDITIONS and "add" in self.operators:
                self._annotate_addition(node)
            elif node.target in RECTIFIERS and "relu" in self.operators:
                if _is_annotated(node.args[0]):
                    self._mark(node, {}, self.activation)
            elif node.target in PASSING and PASSING[node.target] in self.operators:
                self._annotate_passing(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what the target does not take was not annotated."""

    def weight_spec(self, bits: int) -> QuantizationSpec:
        """Symmetric per-channel integers of `bits` bits, within the target's safe range."""
        top = min(2 ** (bits - 1) - 1, self.layout.weight_max)
        return QuantizationSpec(
            torch.int8, WeightPerChannelFakeQuantize, -top, top, torch.per_channel_symmetric, 0
        )

    def _annotate_weighted(self, node: Node) -> None:
        bits = self._bits_of(node)
        data, weight = node.args[0], node.args[1]
        if bits is None or not isinstance(data, Node) or not isinstance(weight, Node):
            return
        inputs: dict[Node, QuantizationSpecBase] = {
            data: self.activation,
            weight: self.weight_spec(bits),
        }
        self._mark(node, inputs, None if self._fuses(node) else self.activation)

    def _annotate_addition(self, node: Node) -> None:
        operands = node.args[:2]
        tensors = [a for a in operands if isinstance(a, Node)]
        if len(tensors) == 2 and any(_is_annotated(a) for a in tensors):
            inputs = dict.fromkeys(tensors, self.activation)
            self._mark(node, inputs, None if self._fuses(node) else self.activation)

    def _annotate_passing(self, node: Node) -> None:
        source = node.args[0]
        if isinstance(source, Node) and _is_annotated(source):
            self._mark(node, {source: self.activation}, SharedQuantizationSpec((source, node)))

    def _fuses(self, node: Node) -> bool:
        """Whether the runtime fuses the only user, a rectifier, so that its output is stored."""
        users = list(node.users)
        return len(users) == 1 and users[0].target in RECTIFIERS and "relu" in self.operators

    def _bits_of(self, node: Node) -> int | None:
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return None
        module = str(weight.target).rpartition(".")[0]
        while module and module not in self.bits:
            module = module.rpartition(".")[0]
        return self.bits.get(module)

    def _mark(
        self,
        node: Node,
        inputs: Mapping[Node, QuantizationSpecBase],
        output: QuantizationSpecBase | None,
    ) -> None:
        node.meta[KEY] = QuantizationAnnotation(
            input_qspec_map=dict(inputs), output_qspec=output, _annotated=True
        )


def _is_annotated(node: object) -> bool:
    return isinstance(node, Node) and KEY in node.meta
