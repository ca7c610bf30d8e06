"""What calibration leaves of the data a layer sees: centred moments, merged and stored.

Everything is canonical: per group, with a kernel's taps flattened in row-major order. `G` counts
the groups, `i` and `o` the input and output channels of one group, `S` the taps; the entry of a
patch at channel `i` and tap `s` has index `i*S + s`, and `D = i*S`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sft.core.errors import InputError
from sft.core.files import NOTE, check_manifest, write_bytes

REQUIRED = ("output_mean", "patch_mean", "tap_covariance")
OPTIONAL = (
    "output_covariance",
    "input_mean",
    "input_covariance",
    "patch_covariance",
    "gradient_covariance",
)
NUMBERS = ("count", "input_count", "tap_variance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Second-order statistics of one layer, in float64 on the CPU.

    A moment that was not gathered is None. Of a pointwise layer only the moments of its narrower
    side are gathered: there the optimal split needs either one, and the outputs' follow from the
    inputs'. Of a layer with `D <= o` the patches' covariance stands for the outputs'.

    output_mean : ``(G, o)`` mean of an output position, without the bias.
    output_covariance : ``(G, o, o)`` centred covariance of an output position.
    patch_mean : ``(G, D)`` mean of an im2col patch, padding included.
    input_mean : ``(G, i)`` mean of an input pixel.
    input_covariance : ``(G, i, i)`` centred covariance of an input pixel. Of a pointwise layer both
        are of what its kernel reads (strided, padding included), and equal those of its patches.
    tap_covariance : ``(S, S)`` covariance of the taps of a patch, averaged over channels and
        groups and divided by its mean diagonal.
    tap_variance : that mean diagonal.
    patch_covariance : ``(G, D, D)`` centred covariance of an im2col patch.
    gradient_covariance : ``(G, o, o)`` second moment (not centred) of the gradient of a sample's
        loss at an output position.
    count, input_count : output positions and input pixels seen.
    """

    output_mean: torch.Tensor
    output_covariance: torch.Tensor | None = None
    patch_mean: torch.Tensor
    input_mean: torch.Tensor | None = None
    input_covariance: torch.Tensor | None = None
    tap_covariance: torch.Tensor
    patch_covariance: torch.Tensor | None = None
    gradient_covariance: torch.Tensor | None = None
    count: int
    input_count: int
    tap_variance: float = 1.0

    def full_covariance(self) -> torch.Tensor | None:
        """``(G, D, D)`` covariance of a patch, where it is known."""
        if self.patch_covariance is not None:
            return self.patch_covariance
        return self.input_covariance if len(self.tap_covariance) == 1 else None

    def covariance_of_outputs(self, kernel: torch.Tensor) -> torch.Tensor:
        """``(G, o, o)`` centred covariance of an output position.

        kernel : the layer's canonical kernel ``(G, o, i, S)``, which turns the covariance of
        patches into that of outputs where only the former was gathered. Raises `InputError` if
        neither was.
        """
        if self.output_covariance is not None:
            return self.output_covariance
        patches = self.full_covariance()
        if patches is None:
            raise InputError(
                f"The statistics of a layer with kernel {tuple(kernel.shape)} hold neither the "
                "covariance of its outputs nor that of its patches: gather them again."
            )
        rows = kernel.detach().to(patches).flatten(2)
        return _symmetric(rows @ patches @ rows.mT)

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both samples together: pooled centred moments (Chan et al., 1983).

        Exact up to rounding where all positions were used. A moment that only one side holds is
        left out. Raises `InputError` if the two are not of one layer.
        """
        if self.patch_mean.shape != other.patch_mean.shape or (
            self.output_mean.shape != other.output_mean.shape
        ):
            raise InputError(
                "Only statistics of the same layer can be merged; these have patches of shape "
                f"{tuple(self.patch_mean.shape)} and {tuple(other.patch_mean.shape)}, and outputs "
                f"of shape {tuple(self.output_mean.shape)} and {tuple(other.output_mean.shape)}."
            )
        count, inputs = self.count + other.count, self.input_count + other.input_count
        share = other.count / count if count else 0.0
        share_in = other.input_count / inputs if inputs else 0.0
        output_step = other.output_mean - self.output_mean
        patch_step = other.patch_mean - self.patch_mean
        input_step, input_mean = None, None
        if self.input_mean is not None and other.input_mean is not None:
            input_step = other.input_mean - self.input_mean
            input_mean = self.input_mean + share_in * input_step

        def pool(field: str, share: float, step: torch.Tensor | None) -> torch.Tensor | None:
            return _pool(getattr(self, field), getattr(other, field), share, step)

        taps, variance = self._merged_taps(other, share, patch_step)
        return Statistics(
            output_mean=self.output_mean + share * output_step,
            output_covariance=pool("output_covariance", share, output_step),
            patch_mean=self.patch_mean + share * patch_step,
            input_mean=input_mean,
            input_covariance=None
            if input_step is None
            else pool("input_covariance", share_in, input_step),
            tap_covariance=taps,
            patch_covariance=pool("patch_covariance", share, patch_step),
            gradient_covariance=pool("gradient_covariance", share, None),
            count=count,
            input_count=inputs,
            tap_variance=variance,
        )

    def _merged_taps(
        self, other: "Statistics", share: float, step: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Tap covariance and variance of both samples, whose patch means differ by `step`."""
        if len(self.tap_covariance) == 1:
            return self.tap_covariance, self.tap_variance
        ours, theirs = (s.tap_covariance * s.tap_variance for s in (self, other))
        rows = step.reshape(-1, len(ours))
        pooled = _pool(ours[None], theirs[None], share, None)
        assert pooled is not None
        return normalize_taps(pooled[0] + share * (1 - share) * (rows.T @ rows) / len(rows))


def normalize_taps(covariance: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A tap covariance ``(S, S)`` with mean diagonal 1, and the diagonal's mean before.

    Taps that never vary count as independent: the identity.
    """
    variance = float(covariance.diagonal().mean())
    if not variance > 0:
        return torch.eye(len(covariance), dtype=covariance.dtype), 0.0
    return covariance / variance, variance


def _pool(
    ours: torch.Tensor | None,
    theirs: torch.Tensor | None,
    share: float,
    step: torch.Tensor | None,
) -> torch.Tensor | None:
    """Second moments ``(G, n, n)`` of two samples together; None if one is unknown.

    share : the second sample's share. step : ``(G, n)`` what its mean differs by; None for moments
    that are not centred.
    """
    if ours is None or theirs is None:
        return None
    pooled = ours + share * (theirs - ours)
    if step is not None:
        pooled = pooled + share * (1 - share) * (step[:, :, None] * step[:, None, :])
    return pooled


def save_statistics(
    statistics: Mapping[str, Statistics], path: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Store the statistics of many layers in one safetensors file; moments that are None are not.

    notes : words by name, kept in the file. Equal statistics give equal bytes.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, s in statistics.items():
        for field in REQUIRED + OPTIONAL:
            value = getattr(s, field)
            if value is not None:
                memory = value.untyped_storage().data_ptr()  # safetensors refuses shared memory
                value = value.clone() if memory in seen else value
                tensors[f"{name}:{field}"] = value.contiguous()
                seen.add(memory)
    numbers = {name: {n: getattr(s, n) for n in NUMBERS} for name, s in statistics.items()}
    write_bytes(
        path, save(tensors, metadata={NOTE: json.dumps({"numbers": numbers, **(notes or {})})})
    )


def load_statistics(path: Path) -> dict[str, Statistics]:
    """Read what `save_statistics` wrote; raises `InputError` on anything else."""
    check_manifest(path)
    try:
        with safe_open(path, "pt") as stored:
            numbers = json.loads(stored.metadata()[NOTE])["numbers"]
            held = set(stored.keys())
            found = {}
            for name, own in numbers.items():
                fields = [f for f in REQUIRED + OPTIONAL if f"{name}:{f}" in held or f in REQUIRED]
                tensors = {field: stored.get_tensor(f"{name}:{field}") for field in fields}
                found[name] = Statistics(**tensors, **own)
            return found
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' does not hold layer statistics: {error}.") from None


def _symmetric(matrices: torch.Tensor) -> torch.Tensor:
    return (matrices + matrices.mT) / 2
