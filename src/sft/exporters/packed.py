"""`model.safetensors`: the integers in few bits, and the way back to a module.

The file holds, for each rounded weight, its integers in as few bits as their range needs, or coded
in fewer (`streams`), and one scale a channel; every other tensor in float32; scales and zero points
of all activations, in the order of the graph; and, as metadata, the plan.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sft.core.errors import InputError
from sft.core.files import check_manifest, write_bytes
from sft.core.records import FORMAT, Plan
from sft.exporters.streams import BITS, decode, encode
from sft.models.load import load_model
from sft.quantizers.fake import ActivationFakeQuantize, Mode, WeightFakeQuantize
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel, prepare


def save_packed(model: QuantizedModel, path: Path) -> int:
    """Write the packed file; returns its size in bytes."""
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, dict[str, object]] = {}
    rounded = model.weights()
    for name, (weight, rounding) in rounded.items():
        bits = rounding.bits
        integers = rounding.integers(weight.detach()).cpu().numpy()
        stream, coding = encode(integers, bits)
        tensors[f"packed:{name}"] = torch.from_numpy(stream)
        tensors[f"scale:{name}"] = rounding.scale.detach().cpu().contiguous()
        layout[name] = {"bits": bits, "shape": list(weight.shape), "coding": coding}
    roundings = _rounding_names(model)
    for name, value in model.graph_module.state_dict().items():
        if name not in rounded and name.rpartition(".")[0] not in roundings:
            tensors[f"float:{name}"] = value.detach().cpu().contiguous()
    grids = [each.calculate_qparams() for each in model.activations().values()]
    if grids:
        tensors["steps"] = torch.cat([scale.detach().cpu() for scale, _ in grids])
        tensors["zeros"] = torch.cat([zero.cpu() for _, zero in grids]).to(torch.int16)
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
                how = layout[name]
                integers = decode(
                    tensors[f"packed:{name}"].numpy(),
                    int(str(how["bits"])), weight.numel(), str(how.get("coding", BITS)),
                )  # fmt: skip
                scale = tensors[f"scale:{name}"]
                values = torch.from_numpy(integers).reshape(weight.shape).float()
                sides = [-1 if i == rounding.ch_axis else 1 for i in range(weight.ndim)]
                weight.copy_(values * scale.reshape(sides))
                rounding.freeze(scale)
            for key, value in tensors.items():
                if key.startswith("float:"):
                    _tensor(model.graph_module, key[6:]).copy_(value)
            for index, (name, activation) in enumerate(model.activations().items()):
                scale, zero = _grid_of(tensors, index, name)
                activation.scale, activation.zero_point = scale, zero.long()
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"'{path}' does not fit the model ({error}). Give load() the network it was made from."
        ) from None


def _grid_of(
    tensors: dict[str, torch.Tensor], index: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of an activation, each ``(1,)``; older files have a tensor for each."""
    if f"step:{name}" in tensors:
        return tensors[f"step:{name}"], tensors[f"zero:{name}"]
    if index >= len(tensors["steps"]):
        raise IndexError(f"no grid for activation {index}")
    return tensors["steps"][index : index + 1].clone(), tensors["zeros"][index : index + 1]


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
