"""Weight decay on the product of two factors, instead of on the factors.

    decay/2 sum_l ||A_l B_l||_F^2 = decay/2 sum_l tr((A^T A)(B B^T))

Decay on the factors is a nuclear norm: once the ranks are fixed it goes on shrinking the small
components, which are to stay. Decay on the product is that of the dense layer, whatever the gauge.

Source: Khodak, Tenenholtz, Mackey, Fusi 2021, "Initialization and regularization of factorized
neural layers" (arXiv:2105.01029).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.core.kernels import weight_of
from sft.layers import FactorizedSFT
from sft.training.loop import Idle
from sft.training.shrinking import Gauge


class ProductDecay(Idle):
    """Decay of split layers: on their products, or (`on_product=False`) on each factor."""

    def __init__(
        self, layers: Sequence[FactorizedSFT], decay: float, on_product: bool = True
    ) -> None:
        self._layers, self._decay, self._on_product = tuple(layers), decay, on_product

    def penalty(self) -> Tensor | None:
        if not self._layers or not self._decay:
            return None
        return 0.5 * self._decay * torch.stack([self._square(x) for x in self._layers]).sum()

    def _square(self, layer: FactorizedSFT) -> Tensor:
        if not self._on_product:
            return torch.stack([weight_of(f).square().sum() for f in layer.factors]).sum()
        a, b = Gauge.of(layer, None).matrices()
        return ((a.mT @ a) * (b @ b.mT)).sum()
