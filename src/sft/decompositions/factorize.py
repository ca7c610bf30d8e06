"""One dense layer in, one factorised layer out."""

from torch import nn

from sft.core.errors import InputError
from sft.core.statistics import Statistics
from sft.decompositions.base import decompositions
from sft.decompositions.regularized import choose_rank


def factorize(
    layer: nn.Module,
    scheme: str = "channel_in",
    rank: int | None = None,
    statistics: Statistics | None = None,
    *,
    l1: float | None = None,
    l2: float | None = None,
) -> nn.Module:
    """Split one layer; the layer itself is not changed.

    scheme : name of a decomposition (`sft list` names them).
    rank : inner width, 1 to the full rank; or None, and `l1`, `l2` choose it by the SFT objective.
        The factors of the chosen rank are unshrunk (the shrinking would be a bias).
    statistics : what the data looks like at this layer; None means plain SVD of the weight.
    Raises `InputError` that names the layer's shape and the reason.
    """
    method = decompositions[scheme]
    reason = method.unsupported(layer)
    shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
    if reason is not None:
        raise InputError(f"Layer with weight {shape} cannot be split by '{scheme}': {reason}.")
    assert isinstance(layer, nn.Conv2d)
    if rank is None:
        if l1 is None or l2 is None:
            raise InputError("factorize needs rank=, or l1= and l2= to choose it.")
        weight = layer.weight
        unfolded = (
            weight.flatten(1) if scheme == "channel_out" else weight.transpose(0, 1).flatten(1)
        )
        rank = max(1, choose_rank(unfolded, l1, l2))
    elif l1 is not None or l2 is not None:
        raise InputError("Give factorize either rank=, or l1= and l2=, not both.")
    full = method.full_rank(shape)
    if not 1 <= rank <= full:
        raise InputError(
            f"Rank {rank} does not fit a layer with weight {shape}: '{scheme}' takes 1 to {full}."
        )
    return method.build(layer, rank, statistics)
