"""What an option costs: parameters, multiply-accumulates, stored bytes."""

import math

from sft.core.records import KEEP, Cost, Layer, Option, Target
from sft.decompositions import decompositions

FLOAT_BYTES = 4


def cost_of(layer: Layer, option: Option, target: Target) -> Cost:
    """Cost of one layer under an option, without latency and memory.

    Stored bytes: `stored_bytes`, which is exact, and for each operator in integers the target's
    `layer_bytes`: about what its node and the scales of its activations take in the file.
    """
    weights, macs = math.prod(layer.weight_shape), layer.macs
    if option.rank:
        assert layer.geometry is not None
        method = decompositions[option.scheme]
        weights = method.params(layer.geometry, option.rank)
        # All calls, and a batch axis that holds time steps, count as often as they do in the whole.
        split = method.macs(layer.geometry, option.rank, layer.input_size)
        macs = layer.macs * split // max(layer.geometry.macs(layer.input_size), 1)
    bias = layer.outputs if layer.bias or option.rank else 0
    integers = option.weight_bits is not None and option.scheme != KEEP
    around = integers * target.layer_bytes * len(_parts(layer, option))
    return Cost(weights + bias, macs, stored_bytes(layer, option, target) + around)


def stored_bytes(layer: Layer, option: Option, target: Target) -> int:
    """Bytes of a layer's weights, scales of weights and bias in the target's file."""
    bias = FLOAT_BYTES * (layer.outputs if layer.bias or option.rank else 0)
    parts = _parts(layer, option)
    if option.scheme == KEEP or option.weight_bits is None:
        return bias + sum(FLOAT_BYTES * weights for weights, _ in parts)
    bits = min((b for b in target.stored_bits if b >= option.weight_bits), default=8)
    return bias + sum(
        math.ceil(weights * bits / 8) + FLOAT_BYTES * outputs for weights, outputs in parts
    )


def _parts(layer: Layer, option: Option) -> list[tuple[int, int]]:
    """Weights and output channels of each operator that multiplies."""
    if not option.rank:
        return [(math.prod(layer.weight_shape), layer.outputs)]
    assert layer.geometry is not None
    factors = decompositions[option.scheme].factors(layer.geometry, option.rank)
    return [(part.params, part.outputs) for part in factors]
