"""What an option costs: parameters, multiply-accumulates, stored bytes."""

import math

from sft.core.records import KEEP, Cost, Layer, Option, Target
from sft.decompositions import decompositions

FLOAT_BYTES = 4


def cost_of(layer: Layer, option: Option, target: Target) -> Cost:
    """Cost of one layer under an option.

    Stored bytes: weights in their bits, a scale (4) and a zero point (1) a channel, the bias in
    float32, and what the target's file needs around each quantised layer.
    """
    outputs = layer.outputs
    bias = outputs if layer.bias or option.rank else 0
    weights, macs, channels, parts = math.prod(layer.weight_shape), layer.macs, outputs, 1
    if option.rank:
        assert layer.geometry is not None
        method = decompositions[option.scheme]
        factors = method.factors(layer.geometry, option.rank)
        weights = method.params(layer.geometry, option.rank)
        # All calls, and a batch axis that holds time steps, count as often as they do in the whole.
        split = method.macs(layer.geometry, option.rank, layer.input_size)
        macs = layer.macs * split // max(layer.geometry.macs(layer.input_size), 1)
        channels, parts = sum(f.outputs for f in factors), len(factors)
    if option.scheme == KEEP or option.weight_bits is None:
        size = FLOAT_BYTES * (weights + bias)
    else:
        size = math.ceil(weights * option.weight_bits / 8)
        size += 5 * channels + FLOAT_BYTES * bias + parts * target.layer_bytes
    return Cost(weights + bias, macs, size)
