"""From float weights to few-bit integers and back."""

from sft.quantizers.linear import dequantize_weight, quantize_weight

__all__ = ["dequantize_weight", "quantize_weight"]
