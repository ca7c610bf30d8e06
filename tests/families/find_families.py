"""Makes `families.json`: the smallest network of each conv-majority family of timm.

    python tests/families/find_families.py           all families; 20 minutes
    python tests/families/find_families.py NAME ..   the rows of these families anew

A family is a module of `timm.models`. Its smallest member is the one with fewest parameters; all
members are made on the meta device, with random weights, so that nothing is downloaded. The family
counts if more than half of that member's parameters, without its classifier (`num_classes=0`), are
those of convolutions: the classifier of a small network on 1,000 classes outweighs its body.

For each the table holds the smallest square input that the network takes (64, 96, ... pixels, or
what it is made for), and `fails`: what the network does not do even before a layer of it is split,
`export` (`torch.export.export`) or `compile` (`torch.compile(fullgraph=True)`), with the error.
`split` counts the convolutions and linear layers that are to be split, `kept` those that are
depthwise or of a class that is not one of `torch.nn`.

The table in the repository was made with timm 1.0.31, torchvision 0.28.0 and torch 2.13.0: 1,371
networks in 98 families, 56 of which are conv-majority. All of these are exported and compiled.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from operators import import_timm
from torch import Tensor, nn

TABLE = Path(__file__).with_name("families.json")
SIZES = (64, 96, 128, 160, 192, 224, 256)
timm: Any = import_timm()


def main(names: list[str]) -> None:
    if timm is None:
        sys.exit("needs timm: pip install 'structured-filter-transform[test-families]'")
    table = json.loads(TABLE.read_text()) if names else {}
    for family in names or timm.list_modules():
        model = smallest(family)
        share = convolution_share(model)
        print(f"{family:24s} {model:32s} {share:.3f}", flush=True)
        if share > 0.5:
            table[family] = row(model, share)
            lines = [f'"{name}": {json.dumps(table[name])}' for name in sorted(table)]
            TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(table)} families")


def smallest(family: str) -> str:
    """The member of a family that has fewest parameters."""
    sizes = {name: parameters(made(name)) for name in timm.list_models(module=family)}
    return min(sizes, key=lambda name: (sizes[name], name))


def convolution_share(name: str) -> float:
    """Share of the parameters without the classifier that convolutions hold."""
    body = made(name, num_classes=0)
    held = {
        id(p): p.numel()
        for layer in body.modules()
        if isinstance(layer, nn.modules.conv._ConvNd)
        for p in layer.parameters()
    }
    return sum(held.values()) / parameters(body)


def row(name: str, share: float) -> dict[str, Any]:
    """What the test needs to know of a network."""
    options, shape = smallest_input(name)
    model = timm.create_model(name, pretrained=False, **options).eval()
    x = torch.randn(1, *shape)
    return {
        "model": name,
        "options": options,
        "input": shape,
        "parameters": parameters(model),
        "share": round(share, 3),
        **layer_counts(model),
        "fails": failures(model, x),
    }


def layer_counts(model: nn.Module) -> dict[str, int]:
    """How many layers with a kernel are to be split, and how many are not."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    split = [
        layer
        for layer in layers
        if type(layer).__module__.startswith("torch.nn.")
        and not (isinstance(layer, kinds[1]) and 1 < layer.groups == layer.in_channels)
    ]
    return {"split": len(split), "kept": len(layers) - len(split)}


def smallest_input(name: str) -> tuple[dict[str, int], list[int]]:
    """Options of the network, and the shape of the smallest image that it takes with them."""
    channels, *native = made(name).pretrained_cfg["input_size"]
    for side in SIZES:
        for options in ({}, {"img_size": side}):
            try:
                model = made(name, **options)
                model(torch.empty(1, channels, side, side, device="meta"))
            except Exception:
                continue
            return options, [channels, side, side]
    return {}, [channels, *native]


def failures(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Why the dense network itself is not exported or compiled."""
    found = {}
    for verb, run in {"export": _export, "compile": _compile}.items():
        try:
            run(model, x)
        except Exception as error:
            found[verb] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
    torch.compiler.reset()
    return found


def _export(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.export.export(model, (x,))


def _compile(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def made(name: str, **options: Any) -> nn.Module:
    """A network without memory behind its weights, in eval mode."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
