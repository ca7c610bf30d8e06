"""From float weights to few-bit integers and back."""

from sft.quantizers.codebook import codebooks, decode
from sft.quantizers.equalize import equalizing_scale
from sft.quantizers.factors import (
    QuantizedFactors,
    balanced_nearest,
    equalize_inner,
    excess,
    quantize_factors,
)
from sft.quantizers.grid import Grid, dequantize, mend_pairs, offending_pairs, round_nearest
from sft.quantizers.histogram import Histogram
from sft.quantizers.linear import dequantize_weight, quantize_weight
from sft.quantizers.plus_low_rank import quantized_plus_low_rank
from sft.quantizers.ranges import ranges, weight_scale
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale

__all__ = [
    "Grid",
    "Histogram",
    "QuantizedFactors",
    "balanced_nearest",
    "best_scale",
    "codebooks",
    "decode",
    "dequantize",
    "dequantize_weight",
    "equalize_inner",
    "equalizing_scale",
    "excess",
    "mend_pairs",
    "offending_pairs",
    "quantize_factors",
    "quantize_weight",
    "quantized_plus_low_rank",
    "ranges",
    "round_nearest",
    "roundings",
    "weight_scale",
]
