"""The step sizes of a quantised network as parameters of its training.

The optimiser moves their logarithms: a step stays positive, and a learning rate means a relative
change, the same for a step of 0.001 and one of 10. The gradient is that of LSQ.

Source: Esser et al. 2020, "Learned step size quantization" (arXiv:1902.08153); the logarithm as in
Jain et al. 2020 (arXiv:1903.08066).
"""

import torch
from torch import Tensor, nn

from sft.quantizers.fake import ActivationFakeQuantize, Mode, WeightFakeQuantize
from sft.quantizers.linear import symmetric_scale
from sft.surgery.quantize import QuantizedModel


class LearnedSteps:
    """The steps of all weights and of all activations that are rounded, made trainable.

    logarithms : the parameters to optimise, one of the shape of each scale.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self._roundings: dict[str, WeightFakeQuantize | ActivationFakeQuantize] = {
            name: rounding for name, (_, rounding) in model.weights().items()
        }
        for name, activation in model.activations().items():
            if activation.mode is Mode.ROUND:
                self._roundings[name] = activation
        self._scales = {name: rounding.learn() for name, rounding in self._roundings.items()}
        self.logarithms = {n: nn.Parameter(s.detach().log()) for n, s in self._scales.items()}

    def state(self) -> dict[str, Tensor]:
        """The logarithms, by name; to be stored, and copied back into to resume."""
        return {f"step:{name}": value.detach() for name, value in self.logarithms.items()}

    def collect_gradients(self) -> None:
        """Hand the gradients of the steps on to their logarithms."""
        for name, scale in self._scales.items():
            gradient, scale.grad = scale.grad, None
            self.logarithms[name].grad = None if gradient is None else gradient * scale.detach()

    @torch.no_grad()
    def follow(self) -> None:
        """Set the steps to what their logarithms say."""
        for name, scale in self._scales.items():
            scale.copy_(self.logarithms[name].exp())

    def settle(self) -> None:
        """Make the steps plain buffers again."""
        for name, rounding in self._roundings.items():
            value = self._scales[name].detach().clone()
            del rounding.scale
            rounding.register_buffer("scale", value)


def freeze_steps(model: QuantizedModel) -> None:
    """Fix the steps of weights that follow the greatest magnitude, at what they are now."""
    for weight, rounding in model.weights().values():
        if not rounding.frozen:
            rounding.freeze(symmetric_scale(weight.detach(), rounding.quant_max, rounding.ch_axis))


@torch.no_grad()
def put_on_grid(model: QuantizedModel) -> None:
    """Replace every weight by what its integers stand for."""
    for weight, rounding in model.weights().values():
        weight.copy_(rounding.on_grid(weight))
