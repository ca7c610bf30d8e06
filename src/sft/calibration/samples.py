"""A few samples that stand for all: drawn from the whole loader, within a limit of memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sft.core.distributed import gather_tensors, is_distributed
from sft.core.errors import InputError

aten = torch.ops.aten
BOUND_TO_LAYOUT = {aten.view.default, aten.view_as.default, aten.as_strided.default}
NUMBERS = 2**28  # of activations that may be alive at a time, over all kept samples


class Reservoir:
    """Keeps `limit` samples, each of all that were seen with equal chance (Vitter 1985)."""

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seen = limit, 0
        self._kept: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, batch: Tensor) -> None:
        """Offer a batch ``(N, ...)``; what is kept is copied."""
        for sample in batch:
            self.seen += 1
            if len(self._kept) < self.limit:
                self._kept.append(sample.clone())
                continue
            place = int(torch.randint(self.seen, (1,), generator=self._generator))
            if place < self.limit:
                self._kept[place] = sample.clone()

    def share(self) -> None:
        """Of several processes: keep the same samples in each, an equal part from every one.

        Raises `InputError` in all of them if one has seen none.
        """
        if min(int(seen) for seen in gather_tensors(torch.tensor([self.seen]))) == 0:
            raise InputError(
                "The calibration data is empty: activation ranges need at least a batch "
                "(in every process, where there are several)."
            )
        if is_distributed():
            parts = gather_tensors(torch.stack(self._kept))
            part = -(-self.limit // len(parts))
            self._kept = list(torch.cat([p[:part] for p in parts])[: self.limit])

    def batches(self, size: int = 32) -> list[Tensor]:
        """The kept samples as batches of at most `size`."""
        parts = [self._kept[i : i + size] for i in range(0, len(self._kept), size)]
        return [torch.stack(part) for part in parts]


def quick_layout(graph: GraphModule) -> Callable[[Tensor], Tensor]:
    """What puts a batch into the memory layout in which the graph runs fastest.

    Convolutions of images run up to a third faster with channels last; a graph that looks at memory
    directly (`view`) gets its batches as they are.
    """
    targets = {node.target for node in graph.graph.nodes}

    def arrange(x: Tensor) -> Tensor:
        if x.ndim != 4 or targets & BOUND_TO_LAYOUT:
            return x
        return x.contiguous(memory_format=torch.channels_last)

    return arrange


def samples_that_fit(graph: GraphModule, most: int, paths: int = 2) -> int:
    """How many samples can pass a graph side by side, `paths` times, within `NUMBERS`."""
    alive = peak = 0
    left: dict[Node, int] = {}
    for node in graph.graph.nodes:
        left[node] = len(node.users)
        alive += _numbers(node)
        peak = max(peak, alive)
        for source in node.all_input_nodes:
            left[source] -= 1
            if left[source] == 0:
                alive -= _numbers(source)
    return max(4, min(most, NUMBERS // max(1, paths * peak)))


def _numbers(node: Node) -> int:
    """Numbers of a node's value that belong to one sample (the graph was captured with two)."""
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor):
        return 0
    return int(value.shape[1:].numel()) if value.ndim else 0
