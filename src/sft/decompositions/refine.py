"""Alternating least squares: factors of a chosen rank, fitted further in the data norm.

Minimises ``tr(L^T (K - M) C (K - M)^T L)`` over the factors of ``M``, with `C` the covariance of
patches and ``L L^T`` the second moment of the gradient (identities where there is none). `M` is
linear in each factor:

* the last factor has a closed form, with the small normal matrix ``Z C Z^T`` of what goes into it;
* a pointwise last factor is solved together with the one before it: reduced-rank regression;
* the others go by conjugate gradients from their present value. A Hessian-vector product is
  ``A^*(A(d) C)``, `A` being `compose` and `A^*` its adjoint: no normal matrix is formed.

Before, inputs and outputs are whitened by the channels' mean covariance and by `L`, and the other
factors are made orthonormal where the gauge between two factors is free. Both only change the
variables, so that few steps are enough. The error never rises from sweep to sweep.

Terms of `separable` may grow and cancel one another on the way to a better fit, which rounding
would undo; so the fit stops before their energies sum to more than `GROWTH` times the kernel's
(Phan et al. 2020 bound the same sensitivity). They sum to at most its own at the start.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.kernels import compose
from sft.core.statistics import Statistics
from sft.decompositions.bases import balanced, principal_basis_of_gram
from sft.decompositions.metric import Metric, mean_over_taps, root_of
from sft.decompositions.solvers import RIDGE, conjugate_gradients, orthonormal_but, solve_spd

GROWTH = 4.0

Parts = tuple[Geometry, ...]


def refine(
    kernel: Tensor,
    kernels: Sequence[Tensor],
    factors: Parts,
    geometry: Geometry,
    statistics: Statistics | None,
    sweeps: int = 10,
    tolerance: float = 1e-4,
) -> tuple[list[Tensor], list[float]]:
    """Fit the factors of a chain to the data further.

    kernel : canonical kernel of the dense layer, float64. kernels : those of `factors`, to start
        from. statistics : with the covariance of patches, or None for the plain norm.
    sweeps, tolerance : stop after so many sweeps over the factors, or when one lowers the error by
        less than this share of it.

    Returns the new kernels, and the relative squared error before and after each sweep, which does
    not rise. Raises `InputError` if the statistics lack the covariance of patches.
    """
    problem = _Problem.of(kernel, factors, geometry, statistics)
    current = problem.enter(kernels)
    best, slope = current, problem.slope(current)
    errors = [problem.error(current, slope)]
    for _ in range(sweeps):
        if errors[-1] <= 1e-15:
            break
        current = problem.sweep(current, slope)
        slope = problem.slope(current)
        error = problem.error(current, slope)
        if not error < errors[-1] or problem.growth(current) > GROWTH:
            break
        best = current
        errors.append(error)
        if errors[-2] - error < tolerance * errors[-2]:
            break
    return problem.leave(best), errors


def data_error(
    kernel: Tensor,
    kernels: Sequence[Tensor],
    factors: Parts,
    geometry: Geometry,
    statistics: Statistics | None,
) -> float:
    """Relative squared error of the output of factors, exactly, in the norm that `refine` uses."""
    covariance = full_covariance(kernel, statistics)
    lost = kernel - compose(kernels, factors, geometry)
    gradient = None if statistics is None else statistics.gradient_covariance

    def energy(rows: Tensor) -> Tensor:
        rows = rows.flatten(2)
        right = rows if covariance is None else rows @ covariance
        return (rows * right if gradient is None else rows * (gradient.to(rows) @ right)).sum()

    return float(energy(lost) / energy(kernel).clamp_min(1e-300))


def full_covariance(kernel: Tensor, statistics: Statistics | None) -> Tensor | None:
    """``(G, D, D)`` of the patches of a layer; None without statistics; else `InputError`."""
    if statistics is None:
        return None
    covariance = statistics.full_covariance()
    if covariance is None:
        raise InputError(
            f"Refining a layer with canonical kernel {tuple(kernel.shape)} needs the covariance of "
            "its patches, and the statistics do not hold it. Gather them with the covariance of "
            "patches for this layer, or leave refine out."
        )
    return covariance.to(kernel)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The whitened problem: kernel ``(G, o, i, S)``, covariance ``(G, D, D)`` or None (white)."""

    kernel: Tensor
    covariance: Tensor | None
    metric: Metric
    factors: Parts
    whole: Geometry
    energy: float

    @classmethod
    def of(
        cls, kernel: Tensor, factors: Parts, whole: Geometry, statistics: Statistics | None
    ) -> "_Problem":
        covariance = full_covariance(kernel, statistics)
        metric = Metric()
        if statistics is not None and covariance is not None:
            gradient = statistics.gradient_covariance
            metric = Metric(
                None if gradient is None else root_of(gradient.to(kernel), RIDGE),
                root_of(mean_over_taps(covariance, whole.taps)),
            )
            covariance = _whitened_covariance(covariance, metric, kernel.shape[2])
        white = metric.on_outputs(metric.on_inputs(kernel))
        rows = white.flatten(2)
        energy = (rows * (rows if covariance is None else rows @ covariance)).sum()
        return cls(white, covariance, metric, factors, whole, float(energy.clamp_min(1e-300)))

    def enter(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """Factors in the whitened variables."""
        first, *middle, last = kernels
        return [self.metric.on_inputs(first), *middle, self.metric.on_outputs(last)]

    def leave(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """Factors in the layer's own variables again."""
        first, *middle, last = kernels
        columns = self.metric.off_inputs(first.mT.flatten(1, 2)).reshape(first.mT.shape)
        rows = self.metric.off_outputs(last.flatten(2)).reshape(last.shape)
        return balanced([columns.mT, *middle, rows])

    def times_covariance(self, rows: Tensor) -> Tensor:
        """``rows @ C`` for rows ``(G, n, i, S)``."""
        if self.covariance is None:
            return rows
        return (rows.flatten(2) @ self.covariance).view(rows.shape)

    def slope(self, kernels: Sequence[Tensor]) -> Tensor:
        """``(K - M) C`` as ``(G, o, i, S)``."""
        return self.times_covariance(self.kernel - compose(kernels, self.factors, self.whole))

    def error(self, kernels: Sequence[Tensor], slope: Tensor) -> float:
        """Relative squared error; `slope` is that of the kernels."""
        lost = self.kernel - compose(kernels, self.factors, self.whole)
        return max(0.0, float((lost * slope).sum())) / self.energy

    def growth(self, kernels: Sequence[Tensor]) -> float:
        """Energies of the terms of a separable chain, relative to the kernel's; else 0."""
        if len(kernels) < 3 or not self.factors[1].groups == self.factors[1].outputs > 1:
            return 0.0
        first, taps, last = kernels
        energies = first.square().sum((2, 3)).flatten() * taps.square().sum((1, 2, 3))
        energies = energies * last.square().sum((1, 3)).flatten()
        return float(energies.sum() / self.kernel.square().sum().clamp_min(1e-300))

    def sweep(self, kernels: list[Tensor], slope: Tensor) -> list[Tensor]:
        """Every factor solved once; `slope` is that of the kernels."""
        block = self.factors[-1].pointwise and not self.factors[-2].depthwise
        solved = len(kernels) - (2 if block else 1)
        for place in range(solved):
            kernels = orthonormal_but(kernels, self.factors, place)
            kernels = self._by_gradients(kernels, place, self.slope(kernels) if place else slope)
        return self._last_two(kernels) if block else self._last(kernels)

    def _by_gradients(self, kernels: list[Tensor], place: int, slope: Tensor) -> list[Tensor]:
        """The factor at `place` by conjugate gradients from its present value."""
        kernels = list(kernels)

        def product(factor: Tensor) -> Tensor:
            trial = [*kernels[:place], factor, *kernels[place + 1 :]]
            return compose(trial, self.factors, self.whole)

        adjoint = torch.func.vjp(product, kernels[place])[1]

        def hessian(direction: Tensor) -> Tensor:
            bent: Tensor = adjoint(self.times_covariance(product(direction)))[0]
            return bent

        start: Tensor = adjoint(slope)[0]
        kernels[place] = kernels[place] + conjugate_gradients(hessian, start)
        return kernels

    def _last(self, kernels: list[Tensor]) -> list[Tensor]:
        """The last factor in closed form."""
        inputs = self._inputs_of(kernels[:-1], self.factors[:-1], self.factors[-1])
        step = self._regression(inputs, self.slope(kernels))
        return [*kernels[:-1], kernels[-1] + step.view_as(kernels[-1])]

    def _last_two(self, kernels: list[Tensor]) -> list[Tensor]:
        """The last two factors, the last being pointwise, by reduced-rank regression."""
        before, width = kernels[:-2], kernels[-1].shape[2]
        if not before:
            rows, gram = self.kernel.flatten(2), self._gram(self.kernel)
        else:
            core = dataclasses.replace(self.factors[-2], outputs=self.whole.outputs)
            pair = compose(kernels[-2:], self.factors[-2:], core)
            inputs = self._inputs_of(before, self.factors[:-2], core)
            step = self._regression(inputs, self.slope(kernels))
            rows = pair.flatten(2) + step
            gram = self._gram((rows @ inputs.flatten(2)).view(self.kernel.shape))
        basis = principal_basis_of_gram(gram, rows)[1][..., :width]
        core_kernel = (basis.mT @ rows).view_as(kernels[-2])
        return [*before, core_kernel, basis[..., None]]

    def _gram(self, rows: Tensor) -> Tensor:
        """``rows C rows^T`` for rows ``(G, n, i, S)``."""
        return self.times_covariance(rows).flatten(2) @ rows.flatten(2).mT

    def _inputs_of(self, kernels: list[Tensor], factors: Parts, last: Geometry) -> Tensor:
        """What each input of the last factor reads of a patch: ``(G, n, i, S)``, ``n = r * taps``.

        It is the chain whose last factor hands on each of its inputs at each of its taps.
        """
        groups, taps = self.whole.groups, last.taps
        count = last.inputs // groups * taps
        picks = torch.eye(count, dtype=self.kernel.dtype, device=self.kernel.device)
        picks = picks.view(1, count, count // taps, taps).expand(groups, -1, -1, -1)
        picker = dataclasses.replace(last, outputs=groups * count)
        whole = dataclasses.replace(self.whole, outputs=groups * count)
        return compose([*kernels, picks], (*factors, picker), whole)

    def _regression(self, inputs: Tensor, slope: Tensor) -> Tensor:
        """What to add to the rows ``(G, o, n)`` that act on the inputs: the least squares step."""
        seen = self.times_covariance(inputs).flatten(2)
        return solve_spd(seen @ inputs.flatten(2).mT, inputs.flatten(2) @ slope.flatten(2).mT).mT


def _whitened_covariance(covariance: Tensor, metric: Metric, inputs: int) -> Tensor:
    """Covariance ``(G, D, D)`` of patches whose channels were whitened."""
    assert metric.inputs is not None
    inverse = metric.inputs.inverse
    for _ in range(2):
        rows = inverse @ covariance.reshape(len(covariance), inputs, -1)
        covariance = rows.view_as(covariance).mT
    return covariance.contiguous()
