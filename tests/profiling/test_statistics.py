"""Streaming statistics against patches that torch's own convolution picks, kernel by kernel."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sft.core.kernels import geometry_of, to_canonical
from sft.core.statistics import Statistics
from sft.profiling.statistics import gather_statistics

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, tokens": (lambda: nn.Linear(4, 6, bias=False), (5, 4)),
    "linear, two leading axes": (lambda: nn.Linear(4, 4), (3, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2), (4, 17)),
    "conv1d, circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 9)),
    "conv1d, even same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 3), padding_mode="reflect"),
        (4, 8, 9),
    ),
    "conv2d, replicate": (
        lambda: nn.Conv2d(4, 6, (4, 2), (1, 3), (4, 1), (2, 1), 2, padding_mode="replicate"),
        (4, 8, 9),
    ),
    "conv2d, same reflect": (
        lambda: nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="reflect"),
        (4, 8, 9),
    ),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", dilation=(1, 2)), (4, 8, 9)),
    "conv2d, narrow patches": (lambda: nn.Conv2d(1, 12, 3, padding=1), (1, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 7, 7)),
    "conv2d, pointwise": (lambda: nn.Conv2d(8, 4, 1), (8, 6, 5)),
    "conv2d, pointwise, strided": (lambda: nn.Conv2d(4, 8, 1, stride=(2, 3)), (4, 7, 8)),
    "conv2d, pointwise, padded, groups": (
        lambda: nn.Conv2d(4, 8, 1, stride=2, padding=(1, 2), groups=2),
        (4, 7, 8),
    ),
    "conv2d, one position": (lambda: nn.Conv2d(4, 6, 3), (4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), (1, 1, 0)), (2, 4, 6, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 7)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 4), (2, 3), (2, 1), (1, 2), 2, dilation=(2, 1)),
        (4, 5, 6),
    ),
    "transposed2d, pointwise": (lambda: nn.ConvTranspose2d(4, 6, 1, stride=2), (4, 5, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2), (2, 3, 2, 4)),
}


def patches_of(layer: nn.Module, x: Tensor) -> Tensor:
    """All patches ``(G, D, positions)``: the outputs of a layer whose kernel is the identity."""
    geometry = geometry_of(layer)
    if not geometry.axes:
        return x.reshape(-1, geometry.inputs).T[None]
    inputs = geometry.inputs // geometry.groups
    depth = inputs * geometry.taps
    eye = torch.eye(depth, dtype=x.dtype).view(depth, inputs, *geometry.kernel)
    picker = copy.deepcopy(layer)
    picker.in_channels, picker.out_channels, picker.groups, picker.bias = inputs, depth, 1, None
    picker.weight = nn.Parameter(eye.transpose(0, 1) if geometry.transposed else eye)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even kernels with padding "same" make a copy
        found = [picker(part) for part in x.chunk(geometry.groups, dim=1)]
    return torch.stack([part.transpose(0, 1).flatten(1) for part in found])


def expected(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every moment of a layer in float64, from all its patches at once."""
    geometry = geometry_of(layer)
    patches = patches_of(layer.double(), x.double())
    kernel = to_canonical(layer.weight.detach(), geometry).flatten(2)
    pixels = patches
    if not geometry.pointwise:
        pixels = x.double().transpose(0, 1).reshape(geometry.groups, -1, x[:, 0].numel())
    taps = patches.reshape(-1, geometry.taps, patches.shape[2])
    variance = torch.stack([torch.cov(t, correction=0).view(geometry.taps, -1) for t in taps])
    variance = variance.mean(0)
    return {
        "output_mean": (kernel @ patches).mean(2),
        "output_covariance": covariances(kernel @ patches),
        "patch_mean": patches.mean(2),
        "patch_covariance": covariances(patches),
        "input_mean": pixels.mean(2),
        "input_covariance": covariances(pixels),
        "tap_covariance": variance / variance.diagonal().mean(),
    }


def covariances(rows: Tensor) -> Tensor:
    return torch.stack([torch.cov(r, correction=0).view(len(r), len(r)) for r in rows])


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_all_patches_at_once(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    layer = make().to(dtype)
    level = torch.linspace(-3, 8, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(6, *shape) * 0.5 + level).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even kernels with padding "same" make a copy
        found = gather(layer, [x[:4], x[4:]], patch_covariances=["0"])
        plain = gather(layer, [x])
    geometry, wanted = geometry_of(layer), expected(layer, x)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    narrow = geometry.inputs * geometry.taps <= geometry.outputs
    missing = {"output_covariance"} if narrow else set()
    missing |= {"patch_covariance"} if geometry.pointwise else set()
    assert {name for name in wanted if getattr(found, name) is None} == missing
    for name in wanted.keys() - missing:
        assert_near(getattr(found, name), wanted[name], tolerance)
    assert found.count == patches_of(layer, x.double()).shape[2]
    kernel = to_canonical(layer.weight.detach(), geometry)
    full = found.full_covariance()
    assert full is not None
    assert_near(full, wanted["patch_covariance"], tolerance)
    assert_near(found.covariance_of_outputs(kernel), wanted["output_covariance"], tolerance)
    assert_near(plain.covariance_of_outputs(kernel), wanted["output_covariance"], tolerance)


def gather(layer: nn.Module, batches: list[Tensor], **options: object) -> Statistics:
    return gather_statistics(nn.Sequential(layer), ["0"], batches, **options)[0]["0"]


def test_only_the_narrower_side_of_a_pointwise_layer() -> None:
    x = torch.randn(3, 8, 4, 4)
    shrinking, growing = gather(nn.Conv2d(8, 4, 1), [x]), gather(nn.Conv2d(8, 9, 1), [x])
    assert shrinking.input_covariance is None
    assert shrinking.output_covariance is not None
    assert growing.input_covariance is not None
    assert growing.output_covariance is None
    assert gather(nn.Conv2d(8, 4, 3), [x]).patch_covariance is None


@pytest.mark.parametrize("sorted_by_level", [False, True])
def test_a_large_mean_costs_no_accuracy(sorted_by_level: bool) -> None:
    torch.manual_seed(0)
    levels = torch.full((8,), 1000.0)
    if sorted_by_level:
        levels = torch.tensor([0.0, 0.0, 0.0, 0.0, 900.0, 900.0, -3000.0, 1000.0])
    batches = list(torch.randn(8, 2, 4, 9, 9) + levels.view(-1, 1, 1, 1, 1))
    batches[0][:, 1] = 5.0  # constant in the first batch
    found = gather(nn.Conv2d(4, 40, 3), batches)
    wanted = expected(nn.Conv2d(4, 40, 3), torch.cat(batches))
    for name in ("patch_mean", "input_covariance", "patch_covariance", "tap_covariance"):
        assert_near(getattr(found, name), wanted[name], 1e-6)
    last = gather(nn.Conv2d(4, 40, 3), batches[-1:]).input_covariance
    assert last is not None
    assert_near(last, expected(nn.Conv2d(4, 40, 3), batches[-1])["input_covariance"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.Linear(8, 6)])
def test_half_precision_networks(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = make().to(dtype)
    x = (torch.randn(30, 4, 8, 8) + 2).to(dtype)
    found = gather(layer, [x], gradients=True, patch_covariances=["0"])
    wanted = expected(copy.deepcopy(layer), x)
    full = found.full_covariance()
    assert full is not None
    assert_near(found.patch_mean, wanted["patch_mean"], 1e-6)
    assert_near(full, wanted["patch_covariance"], 1e-5)
    assert_near(found.covariance_of_outputs(torch.empty(0)), wanted["output_covariance"], 2e-2)
    exact = gather(layer.float(), [x.float()], gradients=True).gradient_covariance
    assert found.gradient_covariance is not None
    assert exact is not None
    assert_near(found.gradient_covariance, exact, 2e-2)


def test_memory_order_does_not_matter() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 5, 1), torch.randn(4, 6, 7, 5)
    for positions in (None, 20):
        plain = gather(layer, [x], positions=positions).output_covariance
        last = gather(layer, [x.to(memory_format=torch.channels_last)], positions=positions)
        assert plain is not None
        assert last.output_covariance is not None
        if positions is None:
            assert_near(last.output_covariance, plain, 1e-6)
        assert last.output_covariance.diagonal(dim1=1, dim2=2).min() > 0


class Caller(nn.Module):
    """Calls one layer on several inputs in one forward pass."""

    def __init__(self, layer: nn.Module, split: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.layer, self.split = layer, split

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(input=part).sum() for part in self.split(x)])


def test_calls_and_batches_are_summed() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv1d(3, 5, 3, padding=1).double(), torch.randn(8, 3, 9, dtype=torch.float64)
    whole = gather(layer, [x])
    for split in (lambda x: list(x.split(3)), lambda x: list(x)):  # the latter without batch axis
        parts = gather_statistics(Caller(layer, split), ["layer"], [x[:6], x[6:]])[0]["layer"]
        assert parts.count == whole.count
        assert_near(parts.output_covariance, whole.output_covariance, 1e-12)
        assert_near(parts.tap_covariance, whole.tap_covariance, 1e-12)


def test_samples_of_different_sizes() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    small, large = (torch.randn(2, 2, n, n + 1, dtype=torch.float64) for n in (4, 9))
    both, apart = gather(layer, [small, large, small]), gather(layer, [small, small])
    assert_near(both.input_covariance, apart.merge(gather(layer, [large])).input_covariance, 1e-12)


def test_autocast_does_not_reach_the_products() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 40) + 3
    wanted = expected(nn.Conv1d(6, 8, 1), x)["input_covariance"]
    with torch.autocast("cpu", torch.bfloat16):
        found = gather(nn.Conv1d(6, 8, 1), [x])
    assert_near(found.input_covariance, wanted, 3e-6)
