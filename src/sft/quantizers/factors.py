"""Two factors at few bits: ``W ~ A B``, rounded so that each makes up for the other.

W ``(O, D)``, A ``(O, r)``, B ``(r, D)``; the error is that of the layer's output,
``tr (W - P) C (W - P)^T`` with C the second moment ``(D, D)`` of what the layer reads, or the
identity where it is None. Nothing non-linear stands between the factors, so ``(A R)(R^-1 B)`` is
the same layer for every invertible R. That freedom is spent on the rounding:

    start   A with orthonormal columns: the rows of B decouple, each with the moment C
    B_q     GPTQ of B
    A       W C B_q^T (B_q C B_q^T)^-1, the best for these integers
    A_q     GPTQ of A with the moment B_q C B_q^T
    again   B = (A_q^T A_q)^-1 A_q^T W, rounded, and so on; the best of all is kept
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.gptq import gptq_symmetric
from sft.quantizers.grid import Grid, round_nearest, top_of
from sft.quantizers.linear import symmetric_scale
from sft.quantizers.metric import bend, check_moment, energy

SWEEPS = 3
BALANCES = (0.0, 0.25, 0.5)  # powers of the inner channels' sizes moved from B into A
RIDGE = 1e-9
UNSEEN = 0.1  # chosen on photos that were neither seen nor used for the figures


@dataclasses.dataclass(frozen=True)
class QuantizedFactors:
    """Integers and scales of two factors: ``A ~ a_scale[o] * a_q``, ``B ~ b_scale[k] * b_q``.

    a_q : ``(O, r)`` int8. a_scale : ``(O,)``. b_q : ``(r, D)`` int8. b_scale : ``(r,)``.
    """

    a_q: Tensor
    a_scale: Tensor
    b_q: Tensor
    b_scale: Tensor

    def first(self) -> Tensor:
        """A, ``(O, r)``, in the scale's dtype."""
        return self.a_q.to(self.a_scale.dtype) * self.a_scale[:, None]

    def second(self) -> Tensor:
        """B, ``(r, D)``, in the scale's dtype."""
        return self.b_q.to(self.b_scale.dtype) * self.b_scale[:, None]

    def to(self, dtype: torch.dtype) -> "QuantizedFactors":
        """The same integers with scales of this dtype, none of them zero."""
        tiny = torch.finfo(dtype).tiny
        a_scale, b_scale = (
            scale.clamp_min(tiny).to(dtype) for scale in (self.a_scale, self.b_scale)
        )
        return QuantizedFactors(self.a_q, a_scale, self.b_q, b_scale)

    def product(self) -> Tensor:
        """The kernel ``(O, D)`` that the integers stand for."""
        return self.first() @ self.second()


def quantize_factors(
    a: Tensor,
    b: Tensor,
    moment: Tensor | None,
    a_bits: int,
    b_bits: int,
    *,
    pair_sum: int | None = None,
    rotate: bool = False,
    seed: int = 0,
    weight: Tensor | None = None,
    ridge: float = UNSEEN,
) -> QuantizedFactors:
    """Round two factors to symmetric integers of 2 to 8 bits; never worse than `balanced_nearest`.

    a : ``(O, r)``. b : ``(r, D)``, ``r <= min(O, D)``. moment : ``(D, D)`` or None.
    pair_sum : see `Grid`. rotate : also try a random orthogonal gauge, of this seed.
    weight : the kernel ``(O, D)`` to come near to; default ``a b``.
    ridge : this share of the moment's mean diagonal is added to its diagonal; the moment of a
        sample underrates the directions that the sample shows little of. 0 trusts it.

    The rounding is that of the file's head; of its candidates the one of least error is returned.
    Scales are float64 where `a` is, else float32. Raises `InputError`.
    """
    _check(a, b, moment, weight)
    a, b = a.detach(), b.detach()
    dense = a.double() @ b.double() if weight is None else weight.detach().double()
    search = _Search(dense, _with_ridge(moment, ridge), a_bits, b_bits, pair_sum)
    best = balanced_nearest(a, b, a_bits, b_bits, pair_sum=pair_sum)
    least = search.error(best)
    first, second = _orthonormal(a.double(), b.double(), search.moment)
    candidates = list(search.alternate(first, second))
    if rotate:
        rotation = _random_rotation(first, seed)
        candidates += search.alternate(first @ rotation, rotation.mT @ second)
    for found in candidates:
        usable = found.to(best.a_scale.dtype)
        if (error := search.error(usable)) < least:
            best, least = usable, error
    return best


def _with_ridge(moment: Tensor | None, ridge: float) -> Tensor | None:
    if moment is None:
        return None
    level = ridge * moment.double().diagonal().mean()
    return moment.double() + level * torch.eye(len(moment), dtype=torch.float64).to(moment.device)


def balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product as ``U sqrt(S)`` ``(O, r)`` and ``sqrt(S) V^T`` ``(r, D)``."""
    left, upper = torch.linalg.qr(a)
    right, lower = torch.linalg.qr(b.mT)
    u, sizes, vh = torch.linalg.svd(upper @ lower.mT)
    root = sizes.sqrt()
    return left @ (u * root), root[:, None] * (vh @ right.mT)


def balanced_nearest(
    a: Tensor, b: Tensor, a_bits: int, b_bits: int, *, pair_sum: int | None = None
) -> QuantizedFactors:
    """The baseline: the balanced split, scales by the greatest magnitude, rounded to nearest."""
    _check(a, b, None, None)
    dtype = torch.promote_types(a.dtype, torch.float32)
    first, second = balance(a.detach().double(), b.detach().double())
    a_scale = symmetric_scale(first.to(dtype), top_of(a_bits), 0)
    b_scale = symmetric_scale(second.to(dtype), top_of(b_bits), 0)
    a_q = round_nearest(first, Grid(a_scale, -top_of(a_bits), top_of(a_bits), pair_sum))
    b_q = round_nearest(second, Grid(b_scale, -top_of(b_bits), top_of(b_bits), pair_sum))
    return QuantizedFactors(a_q, a_scale, b_q, b_scale)


def excess(weight: Tensor, product: Tensor, best: Tensor, moment: Tensor | None) -> float:
    """What rounding costs: error of `product` minus that of `best`, over the weight's energy.

    All ``(O, D)``; `best` is the product that was not rounded. moment : ``(D, D)`` or None.
    """
    lost = energy(weight - product, moment) - energy(weight - best, moment)
    return lost / max(energy(weight, moment), 1e-300)


def equalize_inner(a: Tensor, b: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with inner channels of one range, so that one activation scale fits all.

    a : ``(O, r)``. b : ``(r, D)``. ranges : ``(r,)``, those of the channels that b computes, not
    negative; afterwards each is their mean. A channel that is always zero is left as it is.
    Raises `InputError`.
    """
    if tuple(ranges.shape) != (len(b),) or not bool((torch.isfinite(ranges) & (ranges >= 0)).all()):
        raise InputError(
            f"The ranges have shape {tuple(ranges.shape)}; give {len(b)} that are finite and not "
            "negative, one for each inner channel."
        )
    ranges = ranges.to(a)
    factor = torch.where(ranges > 0, ranges / ranges.mean(), torch.ones_like(ranges))
    return a * factor, b / factor[:, None]


@dataclasses.dataclass(frozen=True)
class _Search:
    """The kernel ``(O, D)`` to come near to, its moment, and the integers that are allowed."""

    weight: Tensor
    moment: Tensor | None
    a_bits: int
    b_bits: int
    pair_sum: int | None

    def error(self, factors: QuantizedFactors) -> float:
        return energy(self.weight - factors.product(), self.moment)

    def alternate(self, a: Tensor, b: Tensor) -> Iterator[QuantizedFactors]:
        """Candidates from a start with orthonormal columns a; see the file's head."""
        for _ in range(SWEEPS):
            b_q, b_scale = gptq_symmetric(b, self.b_bits, self.moment, self.pair_sum)
            best = self._first_factor(b_q, b_scale)
            yield best
            a = best.first()
            b = torch.linalg.solve(_ridged(a.mT @ a), a.mT @ self.weight)

    def _first_factor(self, b_q: Tensor, b_scale: Tensor) -> QuantizedFactors:
        """The best rounded first factor for a second one, over diagonal gauges between them.

        With H the moment of the inner channels, `first` is the best before rounding, so what a
        rounded A adds to the error is ``tr (first - A) H (first - A)^T``.
        """
        second = b_q.double() * b_scale[:, None]
        bent = bend(second, self.moment)
        inner = bent @ second.mT
        first = torch.linalg.solve(_ridged(inner), bent @ self.weight.mT).mT
        size = inner.diagonal().clamp_min(0).sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        found: list[tuple[float, QuantizedFactors]] = []
        for gauge in (size**power for power in BALANCES):
            moment = inner / gauge / gauge[:, None]
            a_q, a_scale = gptq_symmetric(first * gauge, self.a_bits, moment, self.pair_sum)
            lost = first * gauge - a_q.double() * a_scale[:, None]
            factors = QuantizedFactors(a_q, a_scale, b_q, b_scale / gauge)
            found.append((energy(lost, moment), factors))
        return min(found, key=lambda pair: pair[0])[1]


def _orthonormal(a: Tensor, b: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same product: orthonormal columns, and rows that are uncorrelated in the moment."""
    basis, rest = torch.linalg.qr(a)
    b = rest @ b
    turn = torch.linalg.eigh(bend(b, moment) @ b.mT)[1].flip(-1)
    return basis @ turn, turn.mT @ b


def _random_rotation(like: Tensor, seed: int) -> Tensor:
    """A random orthogonal matrix ``(r, r)`` on the device of `like` ``(O, r)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.shape[1], like.shape[1], generator=generator, dtype=like.dtype)
    rotation: Tensor = torch.linalg.qr(noise)[0]
    return rotation.to(like.device)


def _ridged(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    ridged: Tensor = matrix + (RIDGE * mean + 1e-30) * identity
    return ridged


def _check(a: Tensor, b: Tensor, moment: Tensor | None, weight: Tensor | None) -> None:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(f"Factors of shapes {shapes} have no product; give (O, r) and (r, D).")
    rank, full = len(b), min(a.shape[0], b.shape[1])
    if not 1 <= rank <= full:
        raise InputError(f"Factors of shapes {shapes} have rank {rank}; 1 to {full} is needed.")
    if weight is not None and tuple(weight.shape) != (a.shape[0], b.shape[1]):
        raise InputError(
            f"The weight has shape {tuple(weight.shape)}; factors of shapes {shapes} "
            f"need {(a.shape[0], b.shape[1])}."
        )
    for name, tensor in (("first factor", a), ("second factor", b), ("weight", weight)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"The {name}, of shape {tuple(tensor.shape)}, holds NaN or infinity; mend it."
            )
    check_moment(moment, b.shape[1])
