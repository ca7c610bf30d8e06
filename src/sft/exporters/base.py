"""What every exporter does, the table of them, and the verb `export`."""

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.copies import copy_module
from sft.core.data import Loader
from sft.core.errors import InputError
from sft.core.files import sha256
from sft.core.records import STORED, Artifact, Plan, Target
from sft.core.registry import Registry
from sft.exporters.storage import Storage
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel


class Exporter(Protocol):
    """Writes a network, float or with explicit quantise/dequantise steps, as a runtime's file."""

    runtime: str

    def write(self, network: nn.Module, example: torch.Tensor, path: Path) -> None:
        """Write the whole file or nothing. example : ``(1, ...)``, the shape of every run."""

    def storage(self, path: Path) -> dict[str, Storage]:
        """Every weight of a file that `write` wrote, with the bits it is stored in."""
        ...


exporters: Registry[Exporter] = Registry("exporter")


def export(
    model: nn.Module,
    plan: Plan | None,
    path: str | Path,
    target: str | None = None,
    *,
    calibration: Loader | None = None,
    example: torch.Tensor | None = None,
) -> Artifact:
    """Write the file that will be deployed.

    model : a `QuantizedModel` (the integers it holds go into the file), or a float module that
        `plan` asks to be quantised, for which `calibration` gives the activation ranges, or, with
        `plan=None`, a float module that stays float (`example` then gives the input's shape).
    target : the plan's target unless given; the runtime of the machine at hand without a plan.
    Returns where the file is and how to feed it. Raises `InputError` before writing anything.
    """
    planned = plan.target if plan is not None else "onnxruntime"
    found = find_target(target or planned)
    if plan is not None and found.name != find_target(planned).name:
        raise InputError(
            f"The plan was made for '{plan.target}' and cannot be exported for '{found.name}': the "
            f"integer layouts differ. Profile and plan for that target."
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"Cannot write '{path}': the folder '{path.parent}' does not exist.")
    network, sample, integers = _final_network(model, plan, found, calibration, example)
    exporters[found.runtime].write(network, sample, path)
    return Artifact(
        path=str(path),
        target=found.name,
        file_bytes=path.stat().st_size,
        sha256=sha256(path),
        input_shape=tuple(sample.shape[1:]),
        integers=integers,
    )


def storage_of(artifact: Artifact) -> dict[str, Storage]:
    """How an exported file stores each weight, by name: shape, bits a number, bytes.

    The bits in the file are what storage costs; the runtime may multiply wider integers (`place`
    tells which). Raises `InputError` if the file is missing or damaged.
    """
    runtime = find_target(artifact.target).runtime
    return exporters[runtime].storage(Path(artifact.path))


def _final_network(
    model: nn.Module,
    plan: Plan | None,
    target: Target,
    calibration: Loader | None,
    example: torch.Tensor | None,
) -> tuple[nn.Module, torch.Tensor, bool]:
    if isinstance(model, QuantizedModel):
        if model.target.name != target.name:
            raise InputError(
                f"The model was quantised for '{model.target.name}' and cannot be exported for "
                f"'{target.name}': the integer layouts differ. Quantise it for that target."
            )
        return model.convert(), model.example.cpu(), _multiplies_integers(model)
    if plan is None:
        if example is None:
            raise InputError("export of a float model needs example=, one input with batch axis 1.")
        return copy_module(model).cpu(), example[:1].cpu(), False
    if all(row.option.weight_bits is None for row in plan.rows):
        return copy_module(model).cpu(), torch.zeros(1, *plan.input_shape), False
    if calibration is None:
        raise InputError(
            "The plan asks for integers: give export calibration= for the activation ranges, or "
            "a model from `quantize`."
        )
    prepared = quantize(model, plan, target, calibration)
    return prepared.convert(), prepared.example.cpu(), _multiplies_integers(prepared)


def _multiplies_integers(model: QuantizedModel) -> bool:
    """Whether any layer is planned to be multiplied in integers, not only to be stored in them."""
    return any(r.option.weight_bits and r.option.scheme != STORED for r in model.plan.rows)
