"""Cross-layer equalisation: channels of one activation are brought to like ranges.

An activation has one scale, so its narrow channels get few levels. Between two layers a channel may
be multiplied by any positive number if the next layer divides by it, through a ReLU as through
nothing, and through a bounded activation as long as it stays within the bound (after Nagel et al.
2019, arXiv:1906.04721, with ranges of activations in place of those of weights). The layer before
has a scale for each output channel, so it loses nothing; nor does a depthwise layer behind. A dense
layer behind loses in its weights what it gains in its inputs: there half the way, in logarithms,
is gone.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from sft.quantizers.equalize import LARGEST
from sft.quantizers.fake import ActivationFakeQuantize, WeightFakeQuantize
from sft.quantizers.operators import CLAMPING, WEIGHTED, name_in, pads_with_zero
from sft.surgery.quantize import QuantizedModel

HALF_WAY = 0.5
MARGIN = 2.0  # of a bound, kept free for values that the data did not show
LEAST_BITS = 7  # of a dense layer behind: coarser weights cannot give anything away


@dataclasses.dataclass(frozen=True)
class Link:
    """Two weighted operators with nothing between them but what channels pass one by one.

    seen : the value that the second one reads. bound : the least magnitude at which a
    function between them clips.
    """

    first: Node
    second: Node
    seen: Node
    bound: float


@torch.no_grad()
def equalize(model: QuantizedModel, data: Callable[[], Iterable[Tensor]]) -> int:
    """Scale channels between layers, in the weights of the model; how many links there were.

    model : in float (all roundings pass). data : gives the batches that show the ranges. The
    outputs stay the same up to float rounding on data within these ranges.
    """
    links = list(find_links(model))
    peaks = _peaks(model, [link.seen for link in links], data() if links else ())
    for link, peak in zip(links, peaks, strict=True):
        _scale(model, link, peak)
    return len(links)


def find_links(model: QuantizedModel) -> Iterator[Link]:
    """All links of the graph, in its order."""
    for node in model.graph_module.graph.nodes:
        if name_in(WEIGHTED, node) is None:
            continue
        place, bound = node, math.inf
        while len(place.users) == 1:
            user = next(iter(place.users))
            if name_in(WEIGHTED, user) is not None:
                if user.args[0] is place and _plain(model, node) and _plain(model, user):
                    yield Link(node, user, place, bound)
                break
            if name_in(CLAMPING, user) is not None:
                bound = min(bound, _bound_of(user))
            elif not _passes(model, user):
                break
            place = user


def _peaks(model: QuantizedModel, nodes: list[Node], batches: Iterable[Tensor]) -> list[Tensor]:
    """Greatest magnitude of each channel of each node's value."""
    found: dict[Node, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if n in wanted and isinstance(value, Tensor):
                axis = 1 if value.ndim > 2 else -1
                peak = value.movedim(axis, 0).flatten(1).abs().amax(1)
                found[n] = torch.maximum(found[n], peak) if n in found else peak
            return value

    wanted = set(nodes)
    for batch in batches:
        Watch(model.graph_module).run(batch)
    return [found[node] for node in nodes]


def _scale(model: QuantizedModel, link: Link, peak: Tensor) -> None:
    first, second = _parameter(model, link.first, 1), _parameter(model, link.second, 1)
    bias = _parameter(model, link.first, 2)
    assert first is not None
    assert second is not None
    room = torch.where(peak > 0, peak.max() / peak.clamp(min=1e-30), torch.ones_like(peak))
    depthwise = _groups(link.second) > 1
    scale = room.clamp(1, LARGEST) if depthwise else room.clamp(1, LARGEST) ** HALF_WAY
    if not depthwise and _bits(model, link.second) < LEAST_BITS:
        return
    if math.isfinite(link.bound):  # a channel that reaches the bound may not move
        most = link.bound / (MARGIN * peak.clamp(min=1e-30))
        scale = scale.minimum(most.clamp(min=1))
    first.mul_(scale.reshape([-1] + [1] * (first.ndim - 1)))
    if bias is not None:
        bias.mul_(scale)
    axis = 0 if depthwise else 1
    shape = [-1 if a == axis else 1 for a in range(second.ndim)]
    repeat = len(second) // len(scale) if depthwise else 1
    second.div_(scale.repeat_interleave(repeat).reshape(shape))


def _plain(model: QuantizedModel, node: Node) -> bool:
    """Whether the weights belong to this operator alone, in one group or depthwise."""
    weight = _source(model, node, 1)
    if weight is None or len(weight.users) != 1:
        return False
    own = len(next(iter(weight.users)).users) == 1
    value = _parameter(model, node, 1)
    return own and value is not None and (_groups(node) == 1 or value.shape[1] == 1)


def _passes(model: QuantizedModel, node: Node) -> bool:
    if node.op == "call_module":
        module = model.graph_module.get_submodule(str(node.target))
        return isinstance(module, ActivationFakeQuantize)
    return "pad" in str(node.target) and pads_with_zero(node)


def _source(model: QuantizedModel, node: Node, place: int) -> Node | None:
    """The parameter at a place among the arguments, behind its rounding if it has one."""
    found = node.args[place] if place < len(node.args) else None
    if isinstance(found, Node) and found.op == "call_module":
        module = model.graph_module.get_submodule(str(found.target))
        found = found.args[0] if isinstance(module, WeightFakeQuantize) else None
    return found if isinstance(found, Node) and found.op == "get_attr" else None


def _parameter(model: QuantizedModel, node: Node, place: int) -> Tensor | None:
    source = _source(model, node, place)
    return None if source is None else model.graph_module.get_parameter(str(source.target))


def _groups(node: Node) -> int:
    groups = node.args[6] if len(node.args) > 6 else 1
    return groups if isinstance(groups, int) else 1


def _bits(model: QuantizedModel, node: Node) -> int:
    fake = node.args[1]
    if not isinstance(fake, Node) or fake.op != "call_module":
        return 32
    module = model.graph_module.get_submodule(str(fake.target))
    return module.bits if isinstance(module, WeightFakeQuantize) else 32


def _bound_of(node: Node) -> float:
    if name_in(CLAMPING, node) == "relu":
        return math.inf
    if "relu6" in str(node.target):
        return 6.0
    low, high = [*node.args[1:], None, None][:2]
    if "hardtanh" in str(node.target):
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    ends = [abs(end) for end in (low, high) if isinstance(end, int | float) and end != 0]
    return float(min(ends, default=math.inf))
