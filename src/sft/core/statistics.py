"""What calibration leaves of the data a layer sees: centred moments, and how they are stored."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sft.core.errors import InputError
from sft.core.files import check_manifest, write_bytes

FIELDS = ("output_mean", "output_covariance", "patch_mean", "input_covariance")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Second-order statistics of one convolution, in float64 on the CPU.

    output_mean : ``(O,)`` mean of an output pixel, without the bias.
    output_covariance : ``(O, O)`` centred covariance of an output pixel.
    patch_mean : ``(I*kh*kw,)`` mean of an im2col patch, padding included.
    input_covariance : ``(I, I)`` centred covariance of an input pixel.
    count : how many output pixels were seen.
    """

    output_mean: torch.Tensor
    output_covariance: torch.Tensor
    patch_mean: torch.Tensor
    input_covariance: torch.Tensor
    count: int


def save_statistics(statistics: Mapping[str, Statistics], path: Path) -> None:
    """Store the statistics of many layers in one safetensors file."""
    tensors = {
        f"{name}:{field}": getattr(s, field).contiguous()
        for name, s in statistics.items()
        for field in FIELDS
    }
    counts = {name: s.count for name, s in statistics.items()}
    write_bytes(path, save(tensors, metadata={"counts": json.dumps(counts)}))


def load_statistics(path: Path) -> dict[str, Statistics]:
    """Read what `save_statistics` wrote; raises `InputError` on anything else."""
    check_manifest(path)
    try:
        with safe_open(path, "pt") as stored:
            counts = json.loads(stored.metadata()["counts"])
            return {
                name: Statistics(
                    **{field: stored.get_tensor(f"{name}:{field}") for field in FIELDS},
                    count=count,
                )
                for name, count in counts.items()
            }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' does not hold layer statistics: {error}.") from None
