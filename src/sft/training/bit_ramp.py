"""Weights that start training at 8 bits and end it at fewer: the grid coarsens on the way.

At each narrowing the integers' limits change in place, and every row gets the step that serves its
weights best on the new grid; training goes on from there (`LearnedSteps`). Weights of a row are
watched for oscillations only once they have their last width.
"""

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from sft.core.records import Plan
from sft.quantizers.fake import WeightFakeQuantize
from sft.quantizers.operators import nearest_owner
from sft.quantizers.scale import best_scale
from sft.surgery.quantize import QuantizedModel
from sft.training.oscillation import Trace
from sft.training.rounded import RoundedTraining

FIRST_BITS = 8
RAMP = 0.3  # of the training, after which all weights have their last width


class BitRamp(RoundedTraining):
    """`RoundedTraining` whose weights narrow from 8 bits to those of a plan.

    plan : says the last width of each layer. The model was quantised by `at_first_bits` of it.
    """

    def __init__(self, model: QuantizedModel, plan: Plan) -> None:
        self._rounded = model.weights()
        self._last = _last_widths(self._rounded, plan)
        self._most = model.target.layout.weight_max
        self._pair_sums = {name: r.pair_sum for name, (_, r) in self._rounded.items()}
        self._set_widths({name: self._last[name] for name in self._rounded})
        super().__init__(model, learn_steps=True, freeze_oscillations=True)
        self._set_widths(dict.fromkeys(self._rounded, FIRST_BITS))
        self._width = torch.full((1,), FIRST_BITS, dtype=torch.int64)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"ramp:width": self._width}

    def resumed(self) -> None:
        """The grids get the width that the state says."""
        self._set_widths({n: max(b, int(self._width)) for n, b in self._last.items()})

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        assert self._steps is not None
        self._steps.follow()
        wanted = self._at(progress)
        if wanted < int(self._width):
            self._narrow(wanted)
        if self._oscillations is not None and wanted <= min(self._last.values()):
            self._oscillations.follow(progress)

    def _at(self, progress: float) -> int:
        """The width at this share of the training: one bit after another, evenly."""
        last = min(self._last.values(), default=FIRST_BITS)
        passed = min(progress / RAMP, 1.0) * (FIRST_BITS - last)
        return FIRST_BITS - int(passed + 1e-9)

    def _narrow(self, width: int) -> None:
        """Coarser grids, each with the best steps for the weights as they are."""
        assert self._steps is not None
        self._width.fill_(width)
        for name, (weight, rounding) in self._rounded.items():
            before = rounding.quant_max
            self._set_width(name, max(self._last[name], width))
            if rounding.quant_max == before:
                continue
            rows = weight.detach().movedim(rounding.ch_axis, 0).flatten(1)
            scale = best_scale(rows, rounding.quant_max, None, None).to(rounding.scale)
            rounding.scale.data.copy_(scale)
            self._steps.logarithms[name].data.copy_(scale.log())
        if self._oscillations is not None:
            for name, trace in self._oscillations.traces.items():
                weight, rounding = self._rounded[name]
                _restart(trace, rounding.integers(weight))

    def _set_widths(self, widths: dict[str, int]) -> None:
        for name in self._rounded:
            self._set_width(name, widths[name])

    def _set_width(self, name: str, bits: int) -> None:
        rounding: WeightFakeQuantize = self._rounded[name][1]
        top = min(2 ** (bits - 1) - 1, self._most)
        rounding.quant_min, rounding.quant_max = -top, top
        limit = self._pair_sums[name]
        rounding.pair_sum = limit if limit is not None and 2 * top > limit else None


def at_first_bits(plan: Plan) -> Plan:
    """The plan with every weight that is to be rounded at 8 bits."""
    rows = tuple(
        dataclasses.replace(r, option=dataclasses.replace(r.option, weight_bits=FIRST_BITS))
        if r.option.weight_bits
        else r
        for r in plan.rows
    )
    return dataclasses.replace(plan, rows=rows)


def _last_widths(names: Collection[str], plan: Plan) -> dict[str, int]:
    """The last width of each weight, by parameter name."""
    wanted = {row.name: row.option.weight_bits or FIRST_BITS for row in plan.rows}
    owners = {name: nearest_owner(name.rpartition(".")[0], wanted) for name in names}
    return {n: FIRST_BITS if own is None else wanted[own] for n, own in owners.items()}


def _restart(trace: Trace, integers: Tensor) -> None:
    """The trace as it is before any step."""
    fresh = Trace.of(integers)
    for name in ("frequency", "mean", "last", "direction", "frozen"):
        getattr(trace, name).copy_(getattr(fresh, name))
