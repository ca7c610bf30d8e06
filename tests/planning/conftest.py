"""A made-up profile: six convolutions and a classifier, costs by the textbook, damages drawn."""

import math

import numpy as np
import pytest

from sft.core.records import Candidate, Cost, Layer, LayerProfile, Option, Profile

STATISTICS = object()


def candidate(layer: Layer, option: Option, damage: float) -> Candidate:
    """Costs of a 3x3 convolution (same size in and out) or of a linear layer."""
    outputs, inputs, *kernel = layer.weight_shape
    area, pixels = math.prod(kernel), layer.macs // math.prod(layer.weight_shape)
    weights = math.prod(layer.weight_shape)
    if option.scheme == "channel_out":
        weights = option.rank[0] * (inputs * area + outputs)
    if option.scheme == "channel_in":
        weights = option.rank[0] * (inputs + outputs * area)
    size = weights * (option.weight_bits or 32) // 8 + 4 * outputs
    return Candidate(option, damage, damage, Cost(weights + outputs, weights * pixels, size))


def entry(name: str, shape: tuple[int, ...], pixels: int, seed: int) -> LayerProfile:
    rng = np.random.default_rng(seed)
    refusals = (
        {} if len(shape) == 4 else {"channel_in": "it is linear", "channel_out": "it is linear"}
    )
    macs = math.prod(shape) * pixels
    layer = Layer(name, "Conv2d", shape, True, (shape[1],), (shape[0],), macs, refusals=refusals)
    alpha = float(rng.uniform(0.1, 3.0))
    menu = [candidate(layer, Option("keep"), 0.0)]
    for bits, noise in ((8, 1e-4), (4, 2e-2)):
        menu.append(candidate(layer, Option("dense", (), bits), alpha * noise))
        for scheme in ("channel_in", "channel_out") if not refusals else ():
            full = min(shape[:2])
            for rank in range(8, full, 8):
                damage = alpha * (noise + 0.3 * (1 - rank / full) ** 2 * rng.uniform(0.5, 1.5))
                menu.append(candidate(layer, Option(scheme, (rank,), bits), damage))
    return LayerProfile(layer=layer, alphas={"dense": alpha}, candidates=tuple(menu))


@pytest.fixture(scope="session")
def profile() -> Profile:
    layers = (
        entry("stem", (16, 3, 3, 3), 784, 0),
        entry("stage1.conv1", (32, 16, 3, 3), 784, 1),
        entry("stage1.conv2", (32, 32, 3, 3), 784, 2),
        entry("stage2.conv1", (64, 32, 3, 3), 196, 3),
        entry("stage2.conv2", (64, 64, 3, 3), 196, 4),
        entry("stage3.conv", (128, 64, 3, 3), 49, 5),
        entry("fc", (10, 128), 1, 6),
    )
    kept = [e.candidates[0].cost for e in layers]
    return Profile(
        model="made up",
        target="onnxruntime",
        fingerprint="none",
        samples=1,
        params=sum(c.params for c in kept) + 321,
        macs=sum(c.macs for c in kept) + 4567,
        size=sum(c.size for c in kept) + 1284,
        overhead_macs=4567,
        layers=layers,
        seed=0,
        input_shape=(3, 28, 28),
        statistics=STATISTICS,
    )
