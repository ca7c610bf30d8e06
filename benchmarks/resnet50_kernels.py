"""The convolution shapes of ResNet-50, kernels drawn with a trained spectrum, and FLOP counts.

No trained ResNet-50 is at hand. A kernel has random orthogonal bases of outputs, inputs and taps
around a Gaussian core whose scales fall as ``n^-0.5`` along the channels and ``n^-0.75`` along the
taps, and white noise of 2 % of its energy. These are about the spectra of the trained 3x3 kernels
of this project's `fashion-resnet`.
"""

import torch
from torch import Tensor

from sft.core.geometry import Geometry

Shape = tuple[int, int, int, int]  # outputs, inputs, kernel, stride

POWERS = (0.5, 0.5, 0.75)
NOISE = 0.02


def resnet50_shapes() -> list[Shape]:
    """The distinct convolutions of ResNet-50, with the stride of a block in its 3x3."""
    shapes, inputs = [(64, 3, 7, 2)], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        wide = 4 * width
        shapes += [(width, inputs, 1, 1), (width, width, 3, stride), (wide, width, 1, 1)]
        shapes += [(wide, inputs, 1, stride), (width, wide, 1, 1), (width, width, 3, 1)]
        inputs = wide
    return list(dict.fromkeys(shapes))


def geometry_of_shape(shape: Shape) -> Geometry:
    """The layer of a shape."""
    outputs, inputs, extent, stride = shape
    pad = extent // 2
    return Geometry(inputs, outputs, (extent, extent), (stride, stride), (pad, pad), (1, 1))


def drawn_kernel(shape: Shape, seed: int) -> Tensor:
    """A canonical kernel ``(1, O, I, S)``, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    sizes = (shape[0], shape[1], shape[2] ** 2)
    kernel, noise = normal(*sizes), normal(*sizes)
    for size, power in zip(sizes, POWERS, strict=True):  # each turn moves the first mode to the end
        scale = torch.arange(1, size + 1, dtype=torch.float64) ** -power
        basis = torch.linalg.qr(normal(size, size)).Q * scale
        kernel = torch.tensordot(kernel, basis, ([0], [1]))
    drawn = kernel / kernel.norm() + NOISE**0.5 * noise / noise.norm()
    return drawn[None].contiguous()


def unfoldings(kernel: Tensor, shape: Shape) -> dict[str, Tensor]:
    """The matrix whose SVD gives the factors, for each scheme that is one, as a copy."""
    rows, extent = kernel[0], shape[2]
    found = {"channel_out": rows.flatten(1), "channel_in": rows.transpose(0, 1).flatten(1)}
    if extent > 1:
        opened = rows.unflatten(2, (extent, extent))
        found["spatial"] = opened.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return found


def closed_form_flops(shape: Shape) -> dict[str, float]:
    """FLOPs of `analyse` by scheme: Gram matrices, products, eigenproblems.

    ``2 m^2 n`` for the smaller Gram matrix of an ``m x n`` matrix, ``2 m k n`` for a product,
    ``4/3 n^3`` for eigenvalues alone and ``9 n^3`` with their vectors.
    """
    outputs, inputs, extent, _ = shape
    taps = extent**2

    def values(rows: int, columns: int) -> float:
        small, large = sorted((rows, columns))
        return 2 * small**2 * large + 4 / 3 * small**3

    weights = outputs * inputs * taps
    found = {
        "channel_in": values(inputs, outputs * taps),
        "channel_out": values(outputs, inputs * taps),
    }
    if taps == 1:
        return found
    parts = taps * values(outputs, inputs)
    channels = outputs + inputs
    return found | {
        "separable": 4 * weights * taps + 9 * taps**3 + parts,
        "spatial": values(inputs * extent, outputs * extent),
        "tucker2": 4 * weights * channels + 9 * (outputs**3 + inputs**3),
    }
