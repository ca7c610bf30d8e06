"""A layer that computes some of its outputs, and the others as combinations of those."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.kernels import bias_of, from_canonical, weight_of
from sft.layers.factorized import FactorizedSFT, default_square, draw

INTERPOLATIVE = "interpolative"
SINGULAR = 1e-6  # rows whose reciprocal condition is no better are taken as dependent


class InterpolativeSFT(FactorizedSFT):
    """`first` computes r outputs of each group as the dense layer does, `second` (pointwise) the
    others from those; the two are concatenated and put in order.

    A kernel of rank r has ``r (i S + o - r)`` degrees of freedom, and this form has as many
    weights: it costs less than the dense layer at every rank below full. `order` ``(O,)`` says
    where each output stands in the concatenation. Both factors have a bias; at rank ``o`` there is
    no `second`. The default initialisation is that of `torch.nn` in both.

    geometry, rank, bias : as in `FactorizedSFT`, but a rank above ``o`` is refused.
    """

    order: Tensor
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
        super().__init__(geometry, rank, INTERPOLATIVE, bias, device=device, dtype=dtype)
        first = torch.arange(self.rank[0], device="cpu").expand(geometry.groups, -1)
        place = torch.get_default_device() if device is None else device
        self.register_buffer("order", self._places(first).to(place))

    def _layout(self) -> dict[str, Geometry]:
        parts = interpolative_parts(self.geometry, self.rank)
        return dict(zip(("first", "second"), parts, strict=False))

    def _biased(self, name: str) -> bool:
        return True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors and their biases anew."""
        for factor, part in zip(self.factors, self.parts, strict=True):
            draw(weight_of(factor), default_square(part))
            bias = bias_of(factor)
            if bias is not None:
                draw(bias, default_square(part))

    def forward(self, input: Tensor) -> Tensor:
        axis = -1 - self.geometry.axes
        outputs: Tensor = self.first(input)
        if len(self.parts) == 2:
            outputs = torch.cat([outputs, self.second(outputs)], axis)
        return outputs.index_select(axis, self.order)

    @torch.no_grad()
    def select(self, chosen: Tensor) -> None:
        """Say which outputs of each group `first` computes: ``(G, r)``, indices in the group.

        Raises `InputError` unless they are `r` different outputs of each group.
        """
        groups, outputs = self.geometry.groups, self.geometry.outputs // self.geometry.groups
        shaped = chosen.shape == (groups, self.rank[0])
        inside = bool(((chosen >= 0) & (chosen < outputs)).all())
        if not shaped or not inside or not bool(chosen.sort(1).values.diff(dim=1).all()):
            raise InputError(
                f"{type(self).__name__} ({self.extra_repr()}) computes {self.rank[0]} different "
                f"outputs of the {outputs} of each of {groups} groups, not {chosen.tolist()}."
            )
        self.order.copy_(self._places(chosen.cpu()))

    @torch.no_grad()
    def load_factors(self, kernels: Sequence[Tensor], bias: Tensor | None = None) -> None:
        """Fill the factors; `bias` ``(O,)`` is that of the whole layer, in its own order."""
        self._check_factors(kernels, bias)
        for factor, part, kernel in zip(self.factors, self.parts, kernels, strict=True):
            weight_of(factor).copy_(from_canonical(kernel, part))
        order = self.order.cpu()
        whole = order.new_zeros(len(order)) if bias is None else bias.detach().cpu()
        placed = whole.new_empty(len(order), dtype=torch.float64)
        placed[order] = whole.double()
        own, rest = placed[: self.parts[0].outputs], placed[self.parts[0].outputs :]
        if len(kernels) == 2:
            rest = rest - _mixed(kernels[1].double().cpu(), own)
        for factor, values in zip(self.factors, (own, rest), strict=False):
            held = bias_of(factor)
            if held is not None:
                held.copy_(values)

    def mixing(self) -> Tensor:
        """``(G, o, r)``: from what `first` gives (with its bias) to all outputs of a group."""
        groups, rank = self.geometry.groups, self.rank[0]
        identity = torch.eye(rank).expand(groups, -1, -1).to(weight_of(self.first)).detach()
        rows = [identity.flatten(0, 1)]
        if len(self.parts) == 2:
            rows.append(self._kernels()[1][..., 0].detach().flatten(0, 1).to(identity))
        return torch.cat(rows)[self.order].view(groups, -1, rank)

    @torch.no_grad()
    def load_mixing(self, mixing: Tensor, bias: Tensor) -> None:
        """Make the outputs ``mixing @ z + bias``, where `z` is what `first` gave so far.

        mixing : ``(G, o, r)``, whose chosen rows need no longer be the identity, but independent:
        `InputError` otherwise, and the layer is untouched then.
        """
        groups, rank = self.geometry.groups, self.rank[0]
        own = bias_of(self.first)
        assert own is not None
        moved = (mixing @ own.to(mixing).view(groups, rank, 1)).flatten() + bias
        places = self.order.to(mixing.device).view(groups, -1)
        chosen = places < groups * rank
        order = torch.where(chosen, places, places.max() + 1).argsort(1)[:, :rank]
        square = torch.gather(mixing, 1, order[..., None].expand(-1, -1, rank))
        if not bool((torch.linalg.cond(square) < 1 / SINGULAR).all()):
            raise InputError(
                f"{type(self).__name__} ({self.extra_repr()}): the outputs that its first factor "
                "computes are no longer independent; choose others."
            )
        first = self._kernels()[0].to(mixing)
        kernels = [(square @ first.flatten(2)).view_as(first)]
        if len(self.parts) == 2:
            rest = mixing[~chosen].view(groups, -1, rank)
            kernels.append(torch.linalg.solve(square.mT, rest.mT).mT[..., None])
        self.load_factors(kernels, moved)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(O,)`` of the whole layer, computed from those of the factors, or None."""
        own = bias_of(self.factors[0])
        if own is None or len(self.parts) == 1:
            return own if own is None else own[self.order]
        rest = bias_of(self.factors[1])
        assert rest is not None
        mixed = _mixed(self._kernels()[1].double(), own.double())
        return torch.cat([own, (rest + mixed).to(own)])[self.order]

    def _places(self, chosen: Tensor) -> Tensor:
        """Where each output stands in the concatenation, ``(O,)``."""
        groups, outputs = self.geometry.groups, self.geometry.outputs // self.geometry.groups
        rank = self.rank[0]
        places = torch.empty(groups, outputs, dtype=torch.long, device="cpu")
        for group, picked in enumerate(chosen):
            rest = torch.ones(outputs, dtype=torch.bool, device="cpu")
            rest[picked] = False
            places[group, picked] = group * rank + torch.arange(rank, device="cpu")
            behind = groups * rank + group * (outputs - rank)
            places[group, rest] = behind + torch.arange(outputs - rank, device="cpu")
        return places.flatten()

    def product(self, kernels: Sequence[Tensor]) -> Tensor:
        """The dense canonical kernel ``(G, o, i, S)`` of kernels of the factors, in order."""
        groups, outputs = self.geometry.groups, self.geometry.outputs // self.geometry.groups
        computed = kernels[0].flatten(2)
        rows = computed.flatten(0, 1)
        if len(kernels) == 2:
            rows = torch.cat([rows, (kernels[1][..., 0] @ computed).flatten(0, 1)])
        return rows[self.order.to(rows.device)].reshape(groups, outputs, *kernels[0].shape[2:])

    def _product(self, kernels: list[Tensor]) -> Tensor:
        return self.product(kernels)


def interpolative_parts(geometry: Geometry, rank: tuple[int, ...]) -> tuple[Geometry, ...]:
    """The kernel ``I -> G r`` and, below the rank ``o``, pointwise ``G r -> O - G r``."""
    outputs = geometry.outputs // geometry.groups
    if len(rank) != 1 or not 1 <= rank[0] <= outputs:
        raise InputError(
            f"The scheme '{INTERPOLATIVE}' takes one rank, 1 to {outputs}, for a layer of "
            f"{geometry.inputs} -> {geometry.outputs} channels in {geometry.groups} groups, not "
            f"{rank!r}."
        )
    width = geometry.groups * rank[0]
    first = geometry.factor(geometry.inputs, width, range(geometry.axes))
    rest = geometry.outputs - width
    return (first, geometry.factor(width, rest, ())) if rest else (first,)


def _mixed(kernel: Tensor, values: Tensor) -> Tensor:
    """A pointwise kernel ``(G, o, r, 1)`` on a vector ``(G r,)``."""
    return (kernel[..., 0] @ values.reshape(len(kernel), -1, 1)).flatten()
