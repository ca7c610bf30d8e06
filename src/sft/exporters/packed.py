"""`model.safetensors`: the integers packed bit by bit, and the way back to a module.

The file holds, for each rounded weight, its integers in as few bits as their range needs and one
scale a channel; every other tensor in float32; scale and zero point of each activation; and, as
metadata, the plan.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sft.core.errors import InputError
from sft.core.files import check_manifest, write_bytes
from sft.core.records import FORMAT, Plan
from sft.models.load import load_model
from sft.quantizers.fake import ActivationFakeQuantize, Mode, WeightFakeQuantize
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel, prepare


def pack_bits(values: npt.NDArray[np.integer], bits: int) -> npt.NDArray[np.uint8]:
    """Signed integers of any shape to a dense stream of `bits`-bit two's complement numbers."""
    unsigned = values.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    expanded = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(expanded.astype(np.uint8).reshape(-1))


def unpack_bits(stream: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int8]:
    """The first `count` numbers of what `pack_bits` wrote."""
    expanded = np.unpackbits(stream, count=count * bits).reshape(count, bits).astype(np.int64)
    unsigned = (expanded << np.arange(bits)).sum(1)
    signed = np.where(unsigned >> (bits - 1), unsigned - (1 << bits), unsigned)
    narrow: npt.NDArray[np.int8] = signed.astype(np.int8)
    return narrow


def save_packed(model: QuantizedModel, path: Path) -> int:
    """Write the packed file; returns its size in bytes."""
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, dict[str, object]] = {}
    rounded = model.weights()
    for name, (weight, rounding) in rounded.items():
        bits = rounding.bits
        integers = rounding.integers(weight.detach()).cpu().numpy()
        tensors[f"packed:{name}"] = torch.from_numpy(pack_bits(integers, bits))
        tensors[f"scale:{name}"] = rounding.scale.detach().cpu().contiguous()
        layout[name] = {"bits": bits, "shape": list(weight.shape)}
    roundings = _rounding_names(model)
    for name, value in model.graph_module.state_dict().items():
        if name not in rounded and name.rpartition(".")[0] not in roundings:
            tensors[f"float:{name}"] = value.detach().cpu().contiguous()
    for name, activation in model.activations().items():
        scale, zero_point = activation.calculate_qparams()
        tensors[f"step:{name}"] = scale.detach().cpu().clone()
        tensors[f"zero:{name}"] = zero_point.cpu().clone()
    note = {
        "format": FORMAT,
        "target": model.target.name,
        "layout": layout,
        "plan": model.plan.to_dict(),
    }
    # One key only: safetensors stores several in an order that differs from run to run.
    content = save(tensors, metadata={"sft": json.dumps(note, separators=(",", ":"))})
    write_bytes(path, content)
    return len(content)


def load(path: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Restore the network of a packed file: the same outputs as the one that was saved.

    model : the original network (its weights do not matter); needed unless the file's plan names
        a reference that `sft` can load by itself (`fashion-resnet`, `package.module:factory`).
    Raises `InputError` for a damaged file or a model that does not fit.
    """
    path = Path(path)
    check_manifest(path)
    try:
        with safe_open(path, "pt") as stored:
            note = json.loads(stored.metadata()["sft"])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        plan = Plan.from_json(json.dumps(note["plan"]), str(path))
        layout = note["layout"]
        target = find_target(note["target"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' is not a packed model of SFT: {error}.") from None
    original = load_model(plan.model) if model is None else model
    restored = prepare(apply(original, plan), plan, target)
    _fill(restored, tensors, layout, path)
    restored.set_modes(Mode.ROUND, Mode.ROUND)
    return restored


def _fill(
    model: QuantizedModel,
    tensors: dict[str, torch.Tensor],
    layout: dict[str, dict[str, object]],
    path: Path,
) -> None:
    try:
        with torch.no_grad():
            for name, (weight, rounding) in model.weights().items():
                integers = unpack_bits(
                    tensors[f"packed:{name}"].numpy(),
                    int(str(layout[name]["bits"])),
                    weight.numel(),
                )
                scale = tensors[f"scale:{name}"]
                values = torch.from_numpy(integers).reshape(weight.shape).float()
                sides = [-1 if i == rounding.ch_axis else 1 for i in range(weight.ndim)]
                weight.copy_(values * scale.reshape(sides))
                rounding.freeze(scale)
            for key, value in tensors.items():
                if key.startswith("float:"):
                    _tensor(model.graph_module, key[6:]).copy_(value)
            for name, activation in model.activations().items():
                activation.scale = tensors[f"step:{name}"]
                activation.zero_point = tensors[f"zero:{name}"]
    except (KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"'{path}' does not fit the model ({error}). Give load() the network it was made from."
        ) from None


def _rounding_names(model: QuantizedModel) -> set[str]:
    """Names of the rounding modules; one that is shared stands under several."""
    return {
        name
        for name, module in model.graph_module.named_modules(remove_duplicate=False)
        if isinstance(module, ActivationFakeQuantize | WeightFakeQuantize)
    }


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    value = getattr(module.get_submodule(owner), last)
    assert isinstance(value, torch.Tensor)
    return value
