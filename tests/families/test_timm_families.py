"""The layers of every conv-majority family of timm split, and the split network still works.

`families.json` names the smallest network of each family (`find_families.py` made it). Its weights
are random. Of each network

* every dense layer of `torch.nn` is split, with a quarter of its full rank, by all the schemes in
  turn; what computes its weight in a way of its own is refused with a reason;
* the forward pass keeps shape and dtype, and the image still decides the result;
* the state dict, through a safetensors file, makes an equal split network bit-equal;
* `torch.export.export` and `torch.compile(fullgraph=True)` take the split network, as they take
  each of the dense ones (`fails` of the table would name those that they do not take).

Layers of more than 4 million weights are split at random (`reset_parameters` of the factors instead
of a decomposition): a decomposition of those takes minutes and shows nothing new.

Three small and different families are in the quick suite, the others are slow.
"""

import json
import runpy
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.kernels import geometry_of, weight_of
from sft.decompositions import decompositions, factorize
from sft.layers.interpolative import INTERPOLATIVE
from sft.layers.like import factorized_like, interpolative_like, residual_like
from sft.layers.residual import RESIDUAL

HERE = Path(__file__).parent
TABLE: dict[str, dict[str, Any]] = json.loads((HERE / "families.json").read_text())
IMPORTS = runpy.run_path(str(HERE / "operators.py"))
QUICK = ("byobnet", "efficientnet", "maxxvit")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
LARGEST = 4_000_000  # weights of a layer that is decomposed
TOLERANCE = 1e-4  # of the largest output: the same numbers, added in another order

Split = dict[str, tuple[str, tuple[int, ...]]]  # scheme and rank of each layer by name


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    found: ModuleType | None = IMPORTS["import_timm"]()
    if found is None:
        pytest.skip("needs timm: pip install 'structured-filter-transform[test-families]'")
    return found


def test_the_table_holds_all_families() -> None:
    assert len(TABLE) == 56
    assert set(QUICK) <= set(TABLE)
    for name, row in TABLE.items():
        assert row["share"] > 0.5, name
        assert row["split"] > 0, name
        assert not row["fails"], name


@pytest.mark.filterwarnings("ignore:::timm", "ignore:::torch")
@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(TABLE)],
)
def test_family(family: str, timm: ModuleType) -> None:
    row = TABLE[family]
    dense, x = build(timm, row, seed=0), made_input(row)
    with torch.no_grad():
        wanted = dense(x)
    plan, refused = choose_splits(dense)
    assert (len(plan), len(refused)) == (row["split"], row["kept"])
    small = build(timm, row, seed=0)
    for name, (scheme, rank) in plan.items():
        replace(small, name, split_layer(small.get_submodule(name), scheme, rank))
    estimate_norms(small, row)
    with torch.no_grad():
        got, mirrored = small(x), small(x.flip(-1))
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == torch.float32
    moved = float((mirrored - got).abs().max() / got.abs().max())
    assert moved > 10 * TOLERANCE
    check_round_trip(small, build(timm, row, seed=1), plan, x, got)
    check_close(exported(small, x), got)
    check_close(compiled(small, x), got)


def build(timm: ModuleType, row: dict[str, Any], seed: int) -> nn.Module:
    """The network with random weights, none of which switches a branch off, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(row["model"], pretrained=False, **row["options"])
        for name, parameter in model.named_parameters():
            constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
            if constant and not name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.0)
    return model.eval()


def made_input(row: dict[str, Any], images: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, *row["input"], generator=generator)


@torch.no_grad()
def estimate_norms(model: nn.Module, row: dict[str, Any]) -> None:
    """Set the batch norms to what a few images give, so that a deep network passes its input on."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(made_input(row, images=8, seed=1))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def choose_splits(model: nn.Module) -> tuple[Split, dict[str, str]]:
    """How each layer is split, and why the others are not: by the scheme used least so far.

    Every layer that a look at its class and groups says can be split must be.
    """
    names, plan, refused = list(decompositions), {}, {}
    for name, layer in weighted_layers(model):
        reasons = {s: decompositions[s].unsupported(layer) for s in names}
        used = Counter(scheme for scheme, _ in plan.values())
        possible = [s for s, reason in reasons.items() if reason is None]
        scheme = min(possible, key=lambda s: used[s], default=None)
        groups = getattr(layer, "groups", 1)
        standard = type(layer) in DENSE and not 1 < groups == layer.in_channels
        assert (scheme is not None) == standard, f"{name}: {layer}: {reasons}"
        if scheme is None:
            refused[name] = str(reasons[names[0]])
            why = "depthwise" if type(layer) in DENSE else f"{type(layer).__name__} is no dense"
            with pytest.raises(InputError, match=f"cannot be split by '{names[0]}': {why}"):
                factorize(layer, names[0], 1)
            continue
        full = decompositions[scheme].full_rank(geometry_of(layer))
        plan[name] = scheme, tuple(max(1, f // 4) for f in full)
    return plan, refused


def weighted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Convolutions and linear layers, also of a class of their own, that stand in one place."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    found = list(model.named_modules(remove_duplicate=False))
    places = Counter(id(layer) for _, layer in found)
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        (name, layer)
        for name, layer in found
        if isinstance(layer, kinds) and places[id(layer)] == 1 and users[id(layer.weight)] == 1
    ]


def split_layer(layer: nn.Module, scheme: str, rank: tuple[int, ...]) -> nn.Module:
    if weight_of(layer).numel() <= LARGEST:
        return factorize(layer, scheme, rank)
    return empty_split(layer, scheme, rank)


def empty_split(layer: nn.Module, scheme: str, rank: tuple[int, ...]) -> nn.Module:
    """The form of a split layer, with random factors."""
    like = {RESIDUAL: residual_like, INTERPOLATIVE: interpolative_like}.get(scheme)
    small = like(layer, rank) if like else factorized_like(layer, rank, scheme)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small.reset_parameters()
    return small


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def check_round_trip(
    small: nn.Module, other: nn.Module, plan: Split, x: Tensor, wanted: Tensor
) -> None:
    """The state of `small` makes a network of other weights, split alike, compute the same bits."""
    for name, (scheme, rank) in plan.items():
        replace(other, name, empty_split(other.get_submodule(name), scheme, rank))
    with torch.no_grad():
        state = {k: v.contiguous().clone() for k, v in small.state_dict().items()}
        stored = safetensors.torch.load(safetensors.torch.save(state))
        assert any(not torch.equal(stored[k], v) for k, v in other.state_dict().items())
        other.load_state_dict(stored, strict=True)
        assert torch.equal(other(x), wanted)


def exported(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = torch.export.export(model, (x,)).module()(x)
    return result


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    torch.compiler.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return result


def check_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
