"""Kernels drawn towards low rank while they are still dense: ADMM, before a network is split.

    loss + rho/2 sum_l ||K_l - Z_l + U_l||^2        Z = [K + U]_r        U <- U + K - Z

`[.]_r` is the nearest kernel of rank r in the form of the layer's scheme: the best approximation by
its two factors. What a cut to rank r loses afterwards is what the training has left of K - Z.

Source: Yin, Sui, Liao, Yuan 2021, "Towards efficient tensor decomposition-based DNN model
compression with optimization framework" (arXiv:2107.12422).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sft.core.kernels import compose, from_canonical, geometry_of, to_canonical, weight_of
from sft.decompositions import decompositions
from sft.training.loop import Idle

RHO = 0.02  # relative: times the number of a kernel's weights over its squared norm
UPDATES = 20  # of Z and U, evenly spaced over the training


class Nearness(Idle):
    """The penalty that draws dense layers to their nearest kernels of low rank.

    layers : dense layers of `torch.nn` by name, in the network that is trained. ranks : scheme and
    rank of each. rho : weight of the squared distance from Z, relative to the kernel's own square.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ranks: Mapping[str, tuple[str, tuple[int, ...]]],
        rho: float = RHO,
    ) -> None:
        self._layers, self._ranks = dict(layers), dict(ranks)
        self._done = torch.zeros(1, dtype=torch.int64)
        self._near: dict[str, Tensor] = {}
        self._dual: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        for name, layer in self._layers.items():
            weight = weight_of(layer).detach()
            self._weights[name] = rho / max(float(weight.square().sum()), 1e-12)
            self._dual[name] = torch.zeros_like(weight)
            self._near[name] = self._nearest(name, weight)

    def state(self) -> dict[str, Tensor]:
        near = {f"admm:near:{name}": z for name, z in self._near.items()}
        dual = {f"admm:dual:{name}": u for name, u in self._dual.items()}
        return {"admm:updates": self._done, **near, **dual}

    def penalty(self) -> Tensor | None:
        terms = [
            0.5
            * self._weights[name]
            * (weight_of(layer) - self._near[name] + self._dual[name]).square().sum()
            for name, layer in self._layers.items()
        ]
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if int(progress * UPDATES) <= int(self._done):
            return
        self._done += 1
        for name, layer in self._layers.items():
            shifted = weight_of(layer).detach() + self._dual[name]
            self._near[name].copy_(self._nearest(name, shifted))
            self._dual[name].copy_(shifted - self._near[name])

    def distance(self) -> float:
        """The greatest share of a kernel's energy that its cut to low rank would leave out."""
        shares = []
        for name, layer in self._layers.items():
            weight = weight_of(layer).detach()
            lost = (weight - self._nearest(name, weight)).square().sum()
            shares.append(float(lost / weight.square().sum().clamp_min(1e-30)))
        return max(shares, default=0.0)

    def _nearest(self, name: str, weight: Tensor) -> Tensor:
        """``[weight]_r``, of the weight's shape."""
        layer, (scheme, rank) = self._layers[name], self._ranks[name]
        geometry, method = geometry_of(layer), decompositions[scheme]
        kernel = to_canonical(weight.double(), geometry)
        factors = method.analyse(kernel, geometry, None).factors(rank)
        product = compose(factors, method.factors(geometry, rank), geometry)
        return from_canonical(product, geometry).to(weight)
