"""Ranks that shrink while a network is trained: the SFT penalty, its weight found by dual ascent.

    loss + sum_l t_l/2 (||A_l||^2 + ||B_l S_l||^2)      t_l = sum_k mu_k cost_kl / ||A_l B_l S_l||_2

`cost_kl` is what one component of layer l adds to cost k, as a share of its limit; `S_l S_l^T` is
the covariance of what the layer reads, taken apart into that of channels and that of taps. Where A
and B are balanced the penalty is the nuclear norm of the product in the metric of its outputs: the
convex envelope of the price of its components, so it draws those to zero that matter least.

In rounds the factors are balanced again (QR of both, SVD of the small product) and components are
dropped, which stay zero for good: each layer takes the rank of least

    damage_l(r) + sum_k mu_k cost_kl(r)

and the multipliers rise until the costs are on their path to the budget (dual ascent):

    mu_k <- mu_k exp(eta (cost_k / limit_k - 1))

Sources: Srebro, Rennie, Jaakkola 2004 (the nuclear norm as a penalty on factors); the ascent is
mirror ascent on the Lagrangian dual of the knapsack of ranks.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from sft.core.kernels import from_canonical, to_canonical, weight_of
from sft.core.statistics import Statistics
from sft.decompositions.metric import Metric, Root, channel_covariance, root_of
from sft.layers import FactorizedSFT
from sft.training.loop import Idle
from sft.training.rank_menus import Menus

ROUNDS = 3
PENALTY = 0.3  # of the prices of components
RIDGE = 1e-3  # of the mean variance
FIRST_PRICE, ASCENT, FINEST, ASCENTS = 1e-6, 0.3, 0.02, 2000


@dataclasses.dataclass(frozen=True)
class Gauge:
    """A split layer and the metric of what its first factor reads.

    inward : takes a kernel ``(G, r, i, S)`` of the first factor into the metric; back : out of it.
    mean : ``(G, D)`` of a patch, where it is known.
    """

    layer: FactorizedSFT
    inward: Metric
    back: Metric
    mean: Tensor | None = None

    @classmethod
    def of(cls, layer: FactorizedSFT, statistics: Statistics | None) -> "Gauge":
        """The metric of the data, each covariance at mean variance 1; without data, none."""
        weight, part = weight_of(layer.factors[0]), layer.parts[0]
        if statistics is None:
            return cls(layer, Metric(), Metric())
        channels, taps = channel_covariance(statistics), statistics.tap_covariance
        inputs = None if channels is None else _root(channels, weight)
        along = _root(taps, weight) if 1 < part.taps == len(taps) else None
        turned = (None if r is None else Root(r.inverse, r.root) for r in (inputs, along))
        mean = statistics.patch_mean.to(weight.device)
        return cls(layer, Metric(inputs=inputs, taps=along), Metric(None, *turned), mean)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``A (G, m, r)`` and ``B S (G, r, n)``: their product is the kernel in the metric."""
        first, second = (
            to_canonical(weight_of(f), p)
            for f, p in zip(self.layer.factors, self.layer.parts, strict=True)
        )
        inside = self.inward.on_inputs(self.inward.on_taps(first))
        return second.transpose(2, 3).flatten(1, 2), inside.flatten(2)

    @torch.no_grad()
    def load(self, a: Tensor, b: Tensor) -> None:
        """Put matrices back where `matrices` took them from."""
        (first, second), (own, last) = self.layer.factors, self.layer.parts
        kernel = a.reshape(last.groups, last.outputs // last.groups, last.taps, -1).transpose(2, 3)
        weight_of(second).copy_(from_canonical(kernel, last))
        kernel = b.reshape(own.groups, b.shape[1], -1, own.taps).to(weight_of(first))
        kernel = self.back.on_inputs(self.back.on_taps(kernel))
        weight_of(first).copy_(from_canonical(kernel, own))

    @torch.no_grad()
    def balance(self) -> Tensor:
        """Make ``A = U sqrt(s)``, ``B S = sqrt(s) V^T`` of the same product; returns ``s (G, r)``.

        By QR of both and the SVD of the product of the triangles, in float64; components stand in
        falling order.
        """
        a, b = (x.double() for x in self.matrices())
        basis_a, inner_a = torch.linalg.qr(a)
        basis_b, inner_b = torch.linalg.qr(b.mT)
        u, s, vt = torch.linalg.svd(inner_a @ inner_b.mT, full_matrices=False)
        root, count = s.sqrt(), s.shape[1]
        full_a, full_b = torch.zeros_like(a), torch.zeros_like(b)
        full_a[..., :count] = basis_a @ (u * root[:, None])
        full_b[:, :count] = (root[..., None] * vt) @ basis_b.mT
        self.load(full_a, full_b)
        return torch.nn.functional.pad(s, (0, a.shape[2] - count))

    @torch.no_grad()
    def cut(self, rank: int) -> None:
        """Drop the components from `rank` on; the bias takes up the mean of what they gave."""
        before = self.layer.kernel().double()
        self.hold(rank)
        if self.mean is not None and self.layer.bias is not None:
            lost = (before - self.layer.kernel().double()).flatten(2)
            self.layer.bias.add_((lost @ self.mean.double()[..., None]).flatten())

    @torch.no_grad()
    def hold(self, rank: int) -> None:
        """Components from `rank` on are zero."""
        (first, second), (own, last) = self.layer.factors, self.layer.parts
        kernel = to_canonical(weight_of(second), last).clone()
        kernel[:, :, rank:] = 0
        weight_of(second).copy_(from_canonical(kernel, last))
        kernel = to_canonical(weight_of(first), own).clone()
        kernel[:, rank:] = 0
        weight_of(first).copy_(from_canonical(kernel, own))


class Shrinking(Idle):
    """The penalty on split layers, and what is done in rounds; it ends when the budget is met.

    layers : the split layers by name, at full width; they are changed in place.
    dual_ascent : False leaves the multipliers as the first round finds them.
    proximal : instead of a penalty, whose scale a layer before a batch norm does not feel, each
        round takes a share ``sum_k mu_k cost_kl`` (times `PENALTY` / 2) of the greatest singular
        value off all of them: the same at every scale of the kernel.
    """

    def __init__(
        self,
        layers: Mapping[str, FactorizedSFT],
        menus: Menus,
        *,
        dual_ascent: bool = True,
        proximal: bool = False,
    ) -> None:
        known = menus.profile.statistics or {}
        self._gauges = {n: Gauge.of(layer, known.get(n)) for n, layer in layers.items()}
        self._tables = {name: menus.table(name) for name in layers}
        self._ascends, self._proximal = dual_ascent, proximal
        self._fixed = menus.cost_beside(layers)
        self._start = self._costs({name: None for name in layers})
        self.multipliers = torch.full((len(menus.limits()),), FIRST_PRICE, dtype=torch.float64)
        self._done = torch.zeros(1, dtype=torch.int64)
        self._progress = torch.zeros(1, dtype=torch.float64)
        self._norms = torch.ones(len(layers), dtype=torch.float64)
        self._ranks = torch.tensor([g.layer.rank[0] for g in self._gauges.values()])
        self._chosen: dict[str, int | None] = {name: None for name in layers}
        if layers:
            self._round(1)

    def state(self) -> dict[str, Tensor]:
        return {
            "shrinking:multipliers": self.multipliers,
            "shrinking:rounds": self._done,
            "shrinking:progress": self._progress,
            "shrinking:norms": self._norms,
            "shrinking:ranks": self._ranks,
        }

    def weights(self) -> list[float]:
        """``t_l`` of each layer."""
        found = []
        for table, norm in zip(self._tables.values(), self._norms.tolist(), strict=True):
            price = float((self.multipliers * table.component).sum())
            found.append(PENALTY * price / max(norm, 1e-12))
        return found

    def penalty(self) -> Tensor | None:
        if self._proximal:
            return None
        terms = []
        for t, gauge in zip(self.weights(), self._gauges.values(), strict=True):
            a, b = gauge.matrices()
            terms.append(0.5 * t * (a.square().sum() + b.square().sum()))
        return torch.stack(terms).sum()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for gauge, rank in zip(self._gauges.values(), self._ranks.tolist(), strict=True):
            gauge.hold(rank)
        self._progress.fill_(progress)
        if int(progress * ROUNDS) > int(self._done):
            self._done += 1
            self._round(int(self._done) + 1)

    def finished(self) -> bool:
        """Whether the costs are within the budget."""
        return bool((self._costs(self._cheapest()) <= 1).all())

    def progress(self) -> float:
        """The share of the training that was done when it ended."""
        return float(self._progress)

    def ranks(self) -> dict[str, int]:
        """How many components of each layer are left."""
        return dict(zip(self._gauges, self._ranks.tolist(), strict=True))

    @torch.no_grad()
    def _round(self, number: int) -> None:
        """Balance, find the prices at which the costs are on their path, and drop."""
        spectra = []
        for index, gauge in enumerate(self._gauges.values()):
            values = gauge.balance()
            self._norms[index] = values.max()
            spectra.append(values)
            if self._proximal:
                share = self.weights()[index] * float(self._norms[index]) / 2
                self._soften(gauge, values, share * float(values.max()))
        damages = {
            name: self._tables[name].damages(values.square().sum(0), rank)
            for name, values, rank in zip(self._gauges, spectra, self._ranks.tolist(), strict=True)
        }
        path = self._start.clamp_min(1.0) ** (1 - min(number, ROUNDS) / (ROUNDS + 1))
        if self._ascends or number == 1:
            self._ascend(damages, path)
        chosen = self._choose(damages)
        for index, (name, gauge) in enumerate(self._gauges.items()):
            rank = chosen[name]
            if rank is not None:
                self._ranks[index] = min(rank, int(self._ranks[index]))
            gauge.cut(int(self._ranks[index]))

    def _ascend(self, damages: Mapping[str, list[float]], path: Tensor) -> None:
        """Raise the multipliers until every cost is at most `path` times its limit."""
        for _ in range(ASCENTS):
            over = self._costs(self._choose(damages)) / path - 1
            if bool((over <= 0).all()):
                return
            step = ASCENT * over.clamp(0, 1) + FINEST * (over > 0)
            self.multipliers.mul_(step.exp())

    def _choose(self, damages: Mapping[str, list[float]]) -> dict[str, int | None]:
        """For each layer the rank of least damage and price; None: whole."""
        found = {}
        for name, table in self._tables.items():
            prices = (table.costs @ self.multipliers).tolist()
            totals = [d + p for d, p in zip(damages[name], prices, strict=True)]
            found[name] = table.ranks[totals.index(min(totals))]
        return found

    def _cheapest(self) -> dict[str, int | None]:
        """Each layer at the rank that it has, or whole where that is not dearer."""
        found: dict[str, int | None] = {}
        for (name, table), rank in zip(self._tables.items(), self._ranks.tolist(), strict=True):
            fits = [r for r in table.ranks if r is not None and r >= rank]
            found[name] = min(fits) if fits else None
        return found

    def _costs(self, chosen: Mapping[str, int | None]) -> Tensor:
        """All costs, as shares of their limits."""
        found = self._fixed.clone()
        for name, rank in chosen.items():
            table = self._tables[name]
            found += table.costs[table.ranks.index(rank)]
        return found

    @staticmethod
    def _soften(gauge: Gauge, values: Tensor, threshold: float) -> None:
        """The singular values less a threshold, at least 0 (the proximal step)."""
        a, b = (x.double() for x in gauge.matrices())
        share = ((values - threshold).clamp_min(0) / values.clamp_min(1e-30)).sqrt()
        gauge.load(a * share[:, None], b * share[..., None])


def _root(covariance: Tensor, like: Tensor) -> Root:
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    found = root_of(covariance.double() / mean, RIDGE)
    return Root(found.root.to(like), found.inverse.to(like))
