"""Integers learned block by block, each block against what it gave in float.

Sources: BRECQ (Li et al. 2021, arXiv:2102.05426) for the block as the unit, QDrop (Wei et al. 2022,
arXiv:2203.05740) for roundings of activations that are left out at random while learning, AdaRound
(Nagel et al. 2020, arXiv:2004.10568) for the choice between two integers, LSQ (Esser et al. 2020,
arXiv:1902.08153) for the steps of activations. The loss is the block's squared error alone, without
BRECQ's Fisher weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sft.calibration.pieces import Piece, Runner, cut
from sft.core.errors import InputError
from sft.core.progress import track
from sft.quantizers.adaround import HIGHEST, LOWEST, SHIFT, STRETCH, WARM_UP
from sft.quantizers.fake import ActivationFakeQuantize, WeightFakeQuantize
from sft.quantizers.learned_step import round_with_step
from sft.surgery.quantize import QuantizedModel

BATCH = 32
HELD_OUT = 5  # every fifth sample judges and is not learned from
START = 0.9  # how far from the float weight towards the present integer learning starts
PUSH = 1.0  # weight of the regulariser; the block's error before learning counts 1


@dataclasses.dataclass(frozen=True)
class BlockFit:
    """What learning did to one block.

    first, last : names of its first and last node. before, after : relative error
    ``sum (y - y_float)^2 / sum (y_float - mean)^2`` of its output on held-out samples, all rounded,
    with the integers it had and with those learned; the mean is over samples. kept : whether the
    learned ones are used: only where they are better.
    """

    first: str
    last: str
    before: float
    after: float
    kept: bool


@dataclasses.dataclass(frozen=True)
class _Recipe:
    steps: int
    learning_rate: float
    step_rate: float
    drop: float


@dataclasses.dataclass(frozen=True)
class _Samples:
    """A block's inputs, in float and rounded, and its output in float; each ``(N, ...)``."""

    plain: Tensor
    rounded: Tensor
    wanted: Tensor

    def pick(self, index: Tensor) -> "_Samples":
        return _Samples(self.plain[index], self.rounded[index], self.wanted[index])


@torch.no_grad()
def reconstruct_blocks(
    model: QuantizedModel,
    batches: list[Tensor],
    originals: Mapping[str, Tensor],
    *,
    steps: int = 400,
    learning_rate: float = 0.03,
    step_rate: float = 1e-3,
    drop: float = 0.5,
    seed: int = 0,
) -> list[BlockFit]:
    """Choose each weight's integer and each activation's step anew, block by block, in place.

    The integers that are there compete with their neighbours on the side of the float weight; the
    scales of weights stay. The weights end on their grid, and scales stay buffers.

    model : its ranges and weights are fixed, as `quantize` leaves it. batches : inputs ``(N, ...)``
        like those it was calibrated on, of at least two samples in all. originals : every parameter
        of the captured graph by name, as it was before the weights were rounded. steps : of Adam
        for each block, each on 32 samples; below 100 hardly an integer moves. learning_rate : of
        the choice of integers. step_rate : of the logarithms of activation scales. drop : how often
        a value is not rounded.
    Raises `InputError` for fewer samples, missing originals or weights without a frozen scale.
    """
    samples = torch.cat(batches) if batches else torch.empty(0)
    _check(model, samples, originals, drop)
    recipe = _Recipe(steps, learning_rate, step_rate, drop)
    generator = torch.Generator(samples.device).manual_seed(seed)
    float_runner = Runner(model.graph_module, originals, _pass)
    pieces = cut(model)
    plain = rounded = samples
    fits: list[BlockFit] = []
    for piece in track(pieces, "blocks reconstructed", len(pieces)):
        wanted = _run(float_runner, piece, plain)
        order = torch.arange(len(samples), device=samples.device)
        block = _Samples(plain, rounded, wanted)
        held, seen = block.pick(order % HELD_OUT == 0), block.pick(order % HELD_OUT != 0)
        before = _error(_runner(model), piece, held)
        learner = _Learner(model, piece, originals, generator)
        learner.learn(seen, recipe, before)
        after = _error(learner.decided(), piece, held)
        if after < before:
            learner.write()
        fits.append(BlockFit(piece.first.name, piece.last.name, before, after, after < before))
        plain, rounded = wanted, _run(_runner(model), piece, rounded)
    return fits


class _Learner:
    """The undecided integers and the moving steps of one block; the model is left until `write`."""

    def __init__(
        self,
        model: QuantizedModel,
        piece: Piece,
        originals: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        self._model, self._piece, self._generator = model, piece, generator
        self._present = _on_grid(model)
        rounded = model.weights()
        self._choices = {name: _Choice(originals[name], *rounded[name]) for name in piece.weights}
        self._steps = {
            module: torch.zeros_like(module.scale).requires_grad_()
            for module in map(model.activations().__getitem__, piece.activations)
        }

    def learn(self, samples: _Samples, recipe: _Recipe, scale: float) -> None:
        """Adam on mini-batches; an error of `scale` counts as 1."""
        if scale <= 0:
            return
        groups: list[dict[str, Any]] = [{"params": [c.inner for c in self._choices.values()]}]
        if self._steps:
            groups.append({"params": list(self._steps.values()), "lr": recipe.step_rate})
        optimizer = torch.optim.Adam(groups, recipe.learning_rate)
        worth = _spread(samples.wanted) / len(samples.wanted) * scale
        for step in range(recipe.steps):
            part = samples.pick(self._draw(len(samples.wanted)))
            with torch.enable_grad():
                given = self._run(part, recipe.drop)
                loss = (given - part.wanted).square().sum() / len(given) / worth
                loss = loss + PUSH * self._undecided(step / recipe.steps)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()

    def decided(self) -> Runner:
        """Runs the block with what was learned, everything rounded."""
        scales = self._scales()
        return Runner(
            self._model.graph_module,
            self._present | self._weights(),
            lambda module, x: _round(module, x, scales.get(module)),
        )

    def write(self) -> None:
        """Put what was learned into the model."""
        for name, value in self._weights().items():
            self._model.graph_module.get_parameter(name).copy_(value)
        for module, scale in self._scales().items():
            module.scale.data = scale

    def _weights(self) -> dict[str, Tensor]:
        return {name: choice.decided() for name, choice in self._choices.items()}

    def _scales(self) -> dict[ActivationFakeQuantize, Tensor]:
        return {m: m.scale.detach() * log.exp() for m, log in self._steps.items()}

    def _run(self, part: _Samples, drop: float) -> Tensor:
        """The block's output with soft weights, roundings left out at random (QDrop)."""
        scales = self._scales()

        def rounded(module: ActivationFakeQuantize, x: Tensor) -> Tensor:
            return torch.where(self._chance(x) < drop, x, _round(module, x, scales.get(module)))

        soft = {name: choice.soft() for name, choice in self._choices.items()}
        runner = Runner(self._model.graph_module, self._present | soft, rounded)
        mixed = torch.where(self._chance(part.plain) < drop, part.plain, part.rounded)
        return runner.run_piece(self._piece, mixed)

    def _undecided(self, progress: float) -> Tensor:
        """``mean(1 - |2 h - 1|^b)`` over all weights; 0 while warming up."""
        if progress < WARM_UP:
            return next(iter(self._choices.values())).inner.new_zeros(())
        annealed = (progress - WARM_UP) / (1 - WARM_UP)
        exponent = LOWEST + (HIGHEST - LOWEST) * 0.5 * (1 + math.cos(math.pi * annealed))
        heights = torch.cat([choice.height().flatten() for choice in self._choices.values()])
        return (1 - (2 * heights - 1).abs().pow(exponent)).mean()

    def _draw(self, count: int) -> Tensor:
        generator = self._generator
        return torch.randperm(count, generator=generator, device=generator.device)[:BATCH]

    def _chance(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=self._generator, device=x.device)


class _Choice:
    """A weight whose integers are each undecided between the present one and its neighbour.

    The neighbour is the next one towards the float weight. An integer is ``floor + height``, with
    the height between 0 and 1, at first close to the present one (`START`).
    """

    def __init__(self, original: Tensor, present: Tensor, rounding: WeightFakeQuantize) -> None:
        self._rounding = rounding
        shape = [1] * original.ndim
        shape[rounding.ch_axis] = -1
        self._scale = rounding.scale.detach().reshape(shape)
        levels = original / self._scale
        integers = rounding.integers(present).to(levels)
        self._floor = integers - (levels < integers).to(levels)
        low = max(rounding.quant_min, -rounding.quant_max)
        self._floor.clamp_(low, rounding.quant_max - 1)
        height = torch.lerp((levels - self._floor).clamp(0, 1), integers - self._floor, START)
        height = height.clamp(0.01, 0.99)
        self.inner = ((height - SHIFT) / STRETCH).logit().requires_grad_()

    def height(self) -> Tensor:
        """The rectified sigmoid, of the weight's shape."""
        return (torch.sigmoid(self.inner) * STRETCH + SHIFT).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight while undecided, with gradients."""
        return (self._floor + self.height()) * self._scale

    def decided(self) -> Tensor:
        """The weight on its grid, its pairs mended."""
        integers = self._floor + (self.inner.detach() >= 0).to(self._floor)
        return self._rounding.on_grid(integers * self._scale)


def _on_grid(model: QuantizedModel) -> dict[str, Tensor]:
    """All rounded weights as they are in integers, by name."""
    return {name: rounding.on_grid(weight) for name, (weight, rounding) in model.weights().items()}


def _runner(model: QuantizedModel) -> Runner:
    """Runs pieces with everything rounded as the model has it."""
    return Runner(model.graph_module, _on_grid(model), _round)


def _round(module: ActivationFakeQuantize, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """As the module rounds, with another scale if one is given."""
    scale, zero = module.scale if scale is None else scale, int(module.zero_point)
    return round_with_step(x, scale, module.quant_min - zero, module.quant_max - zero)


def _pass(module: ActivationFakeQuantize, x: Tensor) -> Tensor:
    return x


def _run(runner: Runner, piece: Piece, x: Tensor) -> Tensor:
    return torch.cat([runner.run_piece(piece, part) for part in torch.split(x, BATCH)])


def _error(runner: Runner, piece: Piece, samples: _Samples) -> float:
    """Relative error of the block's output on its rounded input."""
    given = _run(runner, piece, samples.rounded)
    return float((given - samples.wanted).double().square().sum()) / _spread(samples.wanted)


def _spread(wanted: Tensor) -> float:
    """``sum (y - mean)^2``, the mean over samples; positive."""
    return max(float((wanted - wanted.mean(0)).double().square().sum()), 1e-30)


def _check(
    model: QuantizedModel, samples: Tensor, originals: Mapping[str, Tensor], drop: float
) -> None:
    if samples.ndim == 0 or len(samples) < 2:
        raise InputError(
            f"Blocks are learned on samples and judged on others, but the batches have shape "
            f"{tuple(samples.shape)} together; give two samples or more."
        )
    if not 0 <= drop <= 1:
        raise InputError(f"drop={drop} is no probability; give a number from 0 to 1.")
    for name, parameter in model.graph_module.named_parameters():
        found = originals.get(name)
        if found is None or found.shape != parameter.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise InputError(
                f"The original of parameter '{name}' {tuple(parameter.shape)} is {shape}; give all "
                "parameters of the captured graph as they were before rounding."
            )
    for name, (weight, rounding) in model.weights().items():
        if not rounding.frozen:
            raise InputError(
                f"Weight '{name}' {tuple(weight.shape)} has no fixed scale yet; call "
                "`sft.quantize` first."
            )
