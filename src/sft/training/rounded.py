"""What fine-tuning does besides when weights and activations are rounded: the integers count."""

from torch import Tensor, nn

from sft.surgery.quantize import QuantizedModel
from sft.training.oscillation import Oscillations
from sft.training.steps import LearnedSteps, freeze_steps, put_on_grid


class RoundedTraining:
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

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves besides the network's own parameters."""
        return [] if self._steps is None else list(self._steps.logarithms.values())

    def state(self) -> dict[str, Tensor]:
        """The tensors to be stored, and copied back into to resume."""
        steps = {} if self._steps is None else self._steps.state()
        swings = {} if self._oscillations is None else self._oscillations.state()
        return {**steps, **swings}

    def collect_gradients(self) -> None:
        """Call after each backward pass."""
        if self._steps is not None:
            self._steps.collect_gradients()

    def follow(self, progress: float) -> None:
        """Call after each step of the optimiser; `progress` is the share of training done."""
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
