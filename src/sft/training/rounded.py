"""What fine-tuning does besides when weights and activations are rounded: the integers count."""

from typing import Any

from torch import Tensor, nn

from sft.surgery.quantize import QuantizedModel
from sft.training.loop import Idle
from sft.training.oscillation import Oscillations
from sft.training.steps import LearnedSteps, freeze_steps, put_on_grid

STEP_RATE = 0.1  # of step sizes, relative to that of weights; 1 was worse on a 3-bit network


class RoundedTraining(Idle):
    """Learned steps and frozen oscillations of a `QuantizedModel`; of any other module, nothing.

    The model is changed in place: its steps are parameters until `settle`.
    """

    def __init__(self, model: nn.Module, learn_steps: bool, freeze_oscillations: bool) -> None:
        self._model = model if isinstance(model, QuantizedModel) else None
        self._steps: LearnedSteps | None = None
        self._oscillations: Oscillations | None = None
        if self._model is None:
            return
        freeze_steps(self._model)
        if learn_steps:
            self._steps = LearnedSteps(self._model)
        if freeze_oscillations:
            self._oscillations = Oscillations(self._model.weights())

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The logarithms of the steps, at a rate of their own."""
        if self._steps is None:
            return []
        own = list(self._steps.logarithms.values())
        return [{"params": own, "peak": STEP_RATE * learning_rate}]

    def state(self) -> dict[str, Tensor]:
        steps = {} if self._steps is None else self._steps.state()
        swings = {} if self._oscillations is None else self._oscillations.state()
        return {**steps, **swings}

    def after_backward(self) -> None:
        if self._steps is not None:
            self._steps.collect_gradients()

    def after_step(self, progress: float) -> None:
        if self._steps is not None:
            self._steps.follow()
        if self._oscillations is not None:
            self._oscillations.follow(progress)

    def settle(self) -> None:
        """Put the weights on their grid and make the steps plain buffers again."""
        if self._model is None:
            return
        put_on_grid(self._model)
        if self._steps is not None:
            self._steps.settle()
