"""A network by reference: embedded, from a package, from a function, or from a `.pt2` file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.files import check_manifest
from sft.models.graph import module_tree, read_program
from sft.models.imports import call_factory, optional_package
from sft.models.quote import close_names, one_line
from sft.models.zoo.resnet import FashionResNet

EMBEDDED = "fashion-resnet"
EMBEDDED_WEIGHTS = Path(__file__).parent / "zoo" / "data" / "fashion-resnet.safetensors"
FORMS = (
    f"'{EMBEDDED}' (embedded), 'timm:NAME', 'torchvision:NAME', 'package.module:factory' or "
    "'model.pt2'"
)
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SHOWN = 3


def load_model(reference: str, weights: str | None = None) -> nn.Module:
    """Make the network that `reference` names, in eval mode.

    reference : 'fashion-resnet', 'timm:NAME', 'torchvision:NAME', 'package.module:factory' or
        the path of a `.pt2` file of `torch.export.save`.
    weights : a `.safetensors` file, or a `.pt`/`.pth` file of plain tensors, for every parameter
        and buffer of the network; in place of those it comes with.

    Nothing is unpickled. Raises `InputError` for an unknown reference, a missing package or file,
    and weights that do not fit.
    """
    model = _make(reference, trained=weights is None)
    if weights is not None:
        load_weights(model, weights)
    elif reference == EMBEDDED:
        load_weights(model, EMBEDDED_WEIGHTS)
    try:
        return model.eval()
    except Exception as error:
        raise InputError(f"'{reference}' cannot be set to eval mode: {one_line(error)}") from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill every parameter and buffer of `model` from `path`, converted to the dtype it has.

    Raises `InputError`, with the model as it was, if a name is missing, unexpected or of another
    shape.
    """
    stored = read_weights(Path(path))
    wanted = model.state_dict()
    problems = [
        _some("has no", [k for k in wanted if k not in stored]),
        _some("has an unexpected", [k for k in stored if k not in wanted]),
        _some(
            "has another shape for",
            [
                f"{k} {tuple(stored[k].shape)} (wanted {tuple(v.shape)})"
                for k, v in wanted.items()
                if k in stored and stored[k].shape != v.shape
            ],
        ),
    ]
    found = [p for p in problems if p]
    if found:
        raise InputError(f"'{path}' does not fit the model: it {'; it '.join(found)}.")
    model.load_state_dict(stored, strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a pickled file that holds nothing but tensors.

    A checkpoint that has its state dict under 'state_dict' or 'model' is accepted.
    """
    if not path.is_file():
        raise InputError(f"There is no weights file '{path}'.")
    check_manifest(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"'{path}' is not a safetensors file: {one_line(error)}") from error
    if path.suffix not in PICKLED:
        raise InputError(f"'{path}': weights are read from .safetensors, .pt or .pth files.")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"'{path}' holds more than plain tensors, or is damaged, and SFT unpickles nothing. "
            "Save model.state_dict() with safetensors.torch.save_file instead."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise InputError(f"'{path}' is not a state dict of tensors. Save model.state_dict().")
    return {str(k): v for k, v in stored.items()}


def _make(reference: str, trained: bool) -> nn.Module:
    if reference == EMBEDDED:
        return FashionResNet()
    source, _, name = reference.partition(":")
    if source == "timm":
        return _from_timm(name, trained)
    if source == "torchvision":
        return _from_torchvision(name, trained)
    if reference.endswith(".pt2"):
        with only_tensors():
            return module_tree(read_program(Path(reference)), reference)
    if ":" in reference:
        return _from_factory(reference)
    hint = (
        " A file of weights alone is no network: name its factory, and the file with --weights."
        if reference.endswith((".safetensors", *PICKLED))
        else close_names(reference, [EMBEDDED])
    )
    raise InputError(f"There is no model '{reference}'. Known forms: {FORMS}.{hint}")


def _from_factory(reference: str) -> nn.Module:
    made = call_factory(reference, "an nn.Module")
    if isinstance(made, nn.Module):
        return made
    raise InputError(
        f"'{reference}' returned {type(made).__name__}; an nn.Module is wanted"
        f"{', made: return Model(), not Model' if isinstance(made, type) else ''}."
    )


def _from_timm(name: str, trained: bool) -> nn.Module:
    timm = optional_package("timm", "timm", f"timm:{name}")
    try:
        with only_tensors():
            model: nn.Module = timm.create_model(name, pretrained=trained)
    except Exception as error:
        near = close_names(name, timm.list_models())
        raise InputError(f"timm cannot make '{name}': {one_line(error)}.{near}") from error
    return model


def _from_torchvision(name: str, trained: bool) -> nn.Module:
    models = optional_package("torchvision.models", "torchvision", f"torchvision:{name}")
    try:
        with only_tensors():
            model: nn.Module = models.get_model(name, weights="DEFAULT" if trained else None)
    except Exception as error:
        near = close_names(name, models.list_models())
        raise InputError(f"torchvision cannot make '{name}': {one_line(error)}.{near}") from error
    return model


@contextlib.contextmanager
def only_tensors() -> Iterator[None]:
    """Inside, every `torch.load`, of whatever package, reads plain tensors or fails."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _some(verb: str, names: list[str]) -> str:
    """'has no a, b, c and 4 more', or nothing."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{verb} {', '.join(names[:SHOWN])}{more}"
