"""Streaming statistics of what every convolution sees: sums only, never activations.

Memory depends on the layers' widths, not on the number of samples. Sums are kept in float64.
"""

import torch
from torch import nn
from torch.nn import functional

from sft.core.data import Loader, check_finite, inputs_of, length_of
from sft.core.errors import InputError
from sft.core.progress import track
from sft.core.statistics import Statistics


class _Sums:
    """Running sums of one convolution's inputs and outputs."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.pixels = self.inputs = 0
        shape = conv.weight.shape
        device = conv.weight.device

        def zeros(*sides: int) -> torch.Tensor:
            return torch.zeros(*sides, dtype=torch.float64, device=device)

        self.output, self.output_outer = zeros(shape[0]), zeros(shape[0], shape[0])
        self.input, self.input_outer = zeros(shape[1]), zeros(shape[1], shape[1])
        self.patch = zeros(shape[1:].numel())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.conv.bias is not None:
            y = y - self.conv.bias[:, None, None]
        outputs = y.transpose(0, 1).flatten(1).double()
        inputs = x.transpose(0, 1).flatten(1).double()
        self.pixels += outputs.shape[1]
        self.inputs += inputs.shape[1]
        self.output += outputs.sum(1)
        self.output_outer += outputs @ outputs.T
        self.input += inputs.sum(1)
        self.input_outer += inputs @ inputs.T
        self.patch += self._patches(x.double().sum(0, keepdim=True))

    def _patches(self, image: torch.Tensor) -> torch.Tensor:
        """Sum of the im2col patches of an image ``(1, I, H, W)`` -> ``(I*kh*kw,)``."""
        conv = self.conv
        pads = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        if any(pads):
            image = functional.pad(image, pads, mode=mode)
        columns = functional.unfold(image, conv.kernel_size, conv.dilation, 0, conv.stride)
        return columns.sum((0, 2))

    def finish(self) -> Statistics:
        output_mean, input_mean = self.output / self.pixels, self.input / self.inputs
        return Statistics(
            output_mean=output_mean.cpu(),
            output_covariance=_centre(self.output_outer / self.pixels, output_mean).cpu(),
            patch_mean=(self.patch / self.pixels).cpu(),
            input_covariance=_centre(self.input_outer / self.inputs, input_mean).cpu(),
            count=self.pixels,
        )


@torch.no_grad()
def gather_statistics(
    model: nn.Module, names: list[str], loader: Loader
) -> tuple[dict[str, Statistics], int]:
    """Run the calibration data once and sum up what the named convolutions see.

    model : in eval mode, batch norm folded; hooks are removed again. Returns the statistics by
    layer name and the number of samples. Raises `InputError` for empty or non-finite data.
    """
    device = next(model.parameters()).device
    sums: dict[str, _Sums] = {}
    hooks = []
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        sums[name] = gathered = _Sums(conv)
        hooks.append(conv.register_forward_hook(_adder(gathered)))
    samples = 0
    try:
        for batch in track(loader, "calibration batches", length_of(loader)):
            x = inputs_of(batch)
            check_finite(x, "calibration")
            model(x.to(device))
            samples += len(x)
    finally:
        for hook in hooks:
            hook.remove()
    if samples == 0:
        raise InputError("The calibration data is empty: at least one batch is needed.")
    return {name: s.finish() for name, s in sums.items()}, samples


def _adder(sums: _Sums):  # type: ignore[no-untyped-def]
    def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sums.add(inputs[0], output)

    return add


def _centre(outer: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    centred = outer - mean[:, None] * mean[None, :]
    return (centred + centred.T) / 2
