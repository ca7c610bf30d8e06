"""The PT2E quantizer: which tensors of the graph become integers, and of which layout.

Convolutions and linear layers get integer inputs, per-channel integer weights and integer outputs
(behind the activation function that the range of the output stands for); what lies between them
stays in integers where the target has a kernel, so that nothing falls back to float on the way.
"""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from sft.core.records import Target
from sft.quantizers.fake import ActivationFakeQuantize, WeightFakeQuantize
from sft.quantizers.operators import (
    BINARY,
    CLAMPING,
    CONCATENATION,
    PASSING,
    RESCALING,
    SPLITTING,
    STORED,
    WEIGHTED,
    module_of,
    name_in,
    nearest_owner,
    pads_with_zero,
    pieces_of,
    stands_on,
)
from sft.quantizers.pt2e import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

KEY = "quantization_annotation"
Inputs = dict[Node, QuantizationSpecBase]


class PlanQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a captured graph with a plan's bits and a target's integer layout.

    bits : bits of a layer's weights by the module's name (a factorised layer's factors inherit
        it); a name that is missing, or None, stays in float.
    stored : those of the layers whose weights are stored in their bits and multiplied in float.
    """

    def __init__(
        self,
        target: Target,
        bits: Mapping[str, int | None],
        stored: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        layout = target.layout
        self.bits, self.stored = bits, stored
        self.operators, self.layout = set(target.operators), layout
        self.activation = QuantizationSpec(
            getattr(torch, layout.activation_dtype),
            ActivationFakeQuantize,
            layout.activation_min,
            layout.activation_max,
            torch.per_tensor_affine,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        nodes = list(model.graph.nodes)
        for node in nodes:
            if name_in(WEIGHTED, node) in self.operators:
                self._annotate_weighted(node)
            elif node.target in STORED:
                self._annotate_stored(node, *STORED[node.target])
        for node in nodes:
            for table, annotate in (
                (BINARY, self._annotate_binary),
                (CONCATENATION, self._annotate_concatenation),
                (CLAMPING, self._annotate_clamping),
                (SPLITTING, self._annotate_splitting),
                (PASSING, self._annotate_passing),
                (RESCALING, self._annotate_rescaling),
            ):
                if name_in(table, node) in self.operators:
                    annotate(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what the target does not take was not annotated."""

    def weight_spec(self, bits: int, axis: int = 0, paired: bool = False) -> QuantizationSpec:
        """Symmetric per-channel integers of `bits` bits, within the target's safe range.

        paired : whether the kernel adds neighbouring products in 16 bits.
        """
        top = min(2 ** (bits - 1) - 1, self.layout.weight_max)
        rounding = WeightFakeQuantize.with_args(pair_sum=self.layout.pair_sum if paired else None)
        return QuantizationSpec(torch.int8, rounding, -top, top, torch.per_channel_symmetric, axis)

    def _annotate_weighted(self, node: Node) -> None:
        bits, stored = self._bits_of(node.args[1])
        data, weight = node.args[0], node.args[1]
        if bits is None or not isinstance(data, Node) or not isinstance(weight, Node):
            return
        if stored:
            self._mark(node, {weight: self.weight_spec(bits)}, None, integer=False)
            return
        value = weight.meta.get("val")
        depthwise = value is not None and value.ndim > 2 and value.shape[1] == 1 and _one_each(node)
        inputs: Inputs = {data: self.activation, weight: self.weight_spec(bits, 0, not depthwise)}
        convolves = name_in(WEIGHTED, node) == "conv"
        stays = convolves and not self._is_clamped(node)
        self._mark(node, inputs, self.activation if stays else None)

    def _annotate_stored(self, node: Node, place: int, axis: int) -> None:
        inputs: Inputs = {}
        for weight in stands_on(node, place):
            bits, _ = self._bits_of(weight)
            value = weight.meta.get("val")
            if bits is not None and value is not None and value.ndim > 1:
                inputs[weight] = self.weight_spec(bits, axis)
        if inputs:
            self._mark(node, inputs, None, integer=False)

    def _annotate_binary(self, node: Node) -> None:
        tensors = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(tensors) == 2 and any(_is_integer(a) for a in tensors):
            inputs: Inputs = dict.fromkeys(tensors, self.activation)
            self._mark(node, inputs, None if self._is_clamped(node) else self.activation)

    def _annotate_concatenation(self, node: Node) -> None:
        """All parts and the whole have one scale, so that nothing is computed to join them."""
        parts = node.args[0]
        if not isinstance(parts, list | tuple):
            return
        tensors = [a for a in parts if isinstance(a, Node)]
        if len(tensors) != len(parts) or not any(_is_integer(a) for a in tensors):
            return
        shared = SharedQuantizationSpec((tensors[0], node))
        inputs: Inputs = dict.fromkeys(tensors, shared)
        inputs[tensors[0]] = self.activation
        self._mark(node, inputs, shared)

    def _annotate_splitting(self, node: Node) -> None:
        source = node.args[0]
        if isinstance(source, Node) and _is_integer(source):
            self._mark(node, {source: self.activation}, None)
            for piece in pieces_of(node):
                self._mark(piece, {}, SharedQuantizationSpec((source, node)))

    def _annotate_clamping(self, node: Node) -> None:
        if _is_integer(node.args[0]) and _holds_zero(node):
            self._mark(node, {}, self.activation)

    def _annotate_passing(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or not _is_integer(source):
            return
        if name_in(PASSING, node) != "pad" or pads_with_zero(node):
            shared = SharedQuantizationSpec((source, node))
            self._mark(node, {source: self.activation}, shared)

    def _annotate_rescaling(self, node: Node) -> None:
        source = node.args[0]
        if isinstance(source, Node) and _is_integer(source):
            self._mark(node, {source: self.activation}, self.activation)

    def _is_clamped(self, node: Node) -> bool:
        """Whether the only user is a function that the range of its output stands for."""
        users = list(node.users)
        return (
            len(users) == 1
            and name_in(CLAMPING, users[0]) in self.operators
            and _holds_zero(users[0])
        )

    def _bits_of(self, weight: object) -> tuple[int | None, bool]:
        """Bits of a weight, and whether it is only stored in them."""
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return None, False
        owner = nearest_owner(module_of(weight), self.bits)
        if owner is None:  # weights of a recurrent module have rows of their own
            owner = nearest_owner(str(weight.target), self.bits)
        return (None, False) if owner is None else (self.bits[owner], owner in self.stored)

    def _mark(
        self,
        node: Node,
        inputs: Mapping[Node, QuantizationSpecBase],
        output: QuantizationSpecBase | None,
        integer: bool = True,
    ) -> None:
        node.meta[KEY] = QuantizationAnnotation(
            input_qspec_map=dict(inputs), output_qspec=output, _annotated=True
        )
        node.meta["integer_output"] = integer


def _is_integer(node: object) -> bool:
    return isinstance(node, Node) and bool(node.meta.get("integer_output"))


def _holds_zero(node: Node) -> bool:
    """Whether a clamping function leaves zero as it is, so that a grid can stand for it."""
    if name_in(CLAMPING, node) == "relu" or node.target == torch.ops.aten.relu6.default:
        return True
    low, high = [*node.args[1:], None, None][:2]
    if "hardtanh" in str(node.target):
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    below = low is None or (isinstance(low, int | float) and low <= 0)
    return below and (high is None or (isinstance(high, int | float) and high >= 0))


def _one_each(node: Node) -> bool:
    """Whether each group of a convolution has one output channel: another kernel, without pairs."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    groups = node.args[6] if len(node.args) > 6 else 1
    return bool(groups == weight.meta["val"].shape[0])
