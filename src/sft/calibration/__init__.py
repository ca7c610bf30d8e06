"""Post-training quantisation: from a float network and unlabelled data to integers."""

from sft.calibration.quantize import quantize

__all__ = ["quantize"]
