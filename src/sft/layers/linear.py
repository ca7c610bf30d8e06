"""A linear layer whose weight is the product of two smaller ones."""

import torch
from torch import nn

from sft.layers.chains import CHANNEL_IN
from sft.layers.factorized import FactorizedSFT, dense_geometry


class LinearSFT(FactorizedSFT):
    """`nn.Linear` in two factors: ``(*, I) -> (*, rank) -> (*, O)``.

    `first.weight` is ``(rank, I)``, `second.weight` ``(O, rank)``. A linear layer has no taps:
    `channel_in` and `channel_out` are the same split, and there is no other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | tuple[int, ...],
        bias: bool = True,
        *,
        scheme: str = CHANNEL_IN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = dense_geometry(
            nn.Linear, in_features=in_features, out_features=out_features, dtype=dtype
        )
        super().__init__(geometry, rank, scheme, bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
