"""A dense layer with a low-rank branch beside it, for few-bit weights: ``W ~ Q + A B``."""

import torch
from torch import Tensor, nn

from sft.core.geometry import Geometry
from sft.core.kernels import bias_of, compose, weight_of
from sft.layers.chains import CHAINS, CHANNEL_OUT
from sft.layers.factorized import FactorizedSFT, default_square, draw

RESIDUAL = "residual"


class ResidualSFT(FactorizedSFT):
    """``dense(x) + second(first(x))``: a layer of full width and one of low rank, added.

    `dense` has the layer's geometry and no bias; `first` and `second` are the chain of
    `channel_out`, and `second` has the bias. `factors` are `dense`, `first` and `second`.

    The default initialisation is that of `torch.nn` in `dense`, the bias and `first`, and zero in
    `second`, so that a new layer is a dense one. Raises as `FactorizedSFT` does.
    """

    dense: nn.Module
    first: nn.Module
    second: nn.Module

    def __init__(
        self,
        geometry: Geometry,
        rank: int | tuple[int, ...],
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(geometry, rank, RESIDUAL, bias, device=device, dtype=dtype)

    def _layout(self) -> dict[str, Geometry]:
        first, second = CHAINS[CHANNEL_OUT](self.geometry, self.rank)
        return {"dense": self.geometry, "first": first, "second": second}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw `dense`, `first` and the bias anew; `second` becomes zero."""
        draw(weight_of(self.dense), default_square(self.geometry))
        draw(weight_of(self.first), default_square(self.parts[1]))
        weight_of(self.second).zero_()
        bias = bias_of(self.second)
        if bias is not None:
            draw(bias, default_square(self.geometry))

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.dense(input) + self.second(self.first(input))
        return y

    def _product(self, kernels: list[Tensor]) -> Tensor:
        return kernels[0] + compose(kernels[1:], self.parts[1:], self.geometry)
