"""Closed-form repair of a split network: each layer is fitted to what it sees behind the others.

A split layer reads the outputs of layers that are split too, so its input ``x^`` is not the one it
was factorised for. Layer by layer, in the order in which they run, the last factor is solved again
by least squares, so that from ``x^`` the layer gives the *original* network's output `y`:

    A = E[y z^T] E[z z^T]^(-1)        z = what the last factor reads in the split network

with centred moments and the bias that goes with them (the asymmetric reconstruction of Zhang et al.
2015, without its non-linear part). Errors of the layers before are mended where a linear map can
mend them. There are no gradients and no labels, and only second moments are kept.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.allocator import kept_memory
from sft.core.copies import copy_module
from sft.core.data import Loader
from sft.core.distributed import broadcast_
from sft.core.errors import InputError
from sft.core.kernels import KINDS, bias_of, from_canonical, geometry_of, to_canonical, weight_of
from sft.core.progress import say, track
from sft.layers.factorized import FactorizedSFT
from sft.layers.interpolative import InterpolativeSFT
from sft.layers.residual import ResidualSFT
from sft.profiling.held_out import batches, device_of, distance, first_batch
from sft.profiling.moments import Moments
from sft.profiling.patches import draw, patches, picked, reads
from sft.surgery.modules import fold_batch_norm, open_all_recurrent
from sft.training.refit import refine_factors

PASSES = 8
POSITIONS = 4096  # of a batch, at least
CHUNK = 2**22  # numbers that are collected at a time
RIDGE = 1e-4  # of the mean variance of what a factor reads
WIDEST = 1024  # numbers that a layer reads which is fitted though it was not split
ENOUGH = 20  # positions for each number that a factor reads; with fewer it stays as it is

Stretch = dict[str, "_Fit"]


@kept_memory()
@torch.no_grad()
def reconstruct(
    small: nn.Module,
    teacher: nn.Module,
    loader: Loader,
    *,
    passes: int = PASSES,
    dense: bool = True,
    refine: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A copy of a split network whose layers are fitted to the original's outputs.

    small : what `apply` returned. teacher : the original network. loader : calibration inputs;
        every fifth batch is held out, and if the outputs are no closer to the original's there (on
        all of them, if there are fewer than 5), `small` itself is returned.
    passes : over the data; the layers are fitted in so many stretches, in the order they run.
    dense : fit the layers that were not split as well (those that read at most 1,024 numbers).
    refine : before that, refine the factors whose closed form is not the optimum by alternating
        least squares in the norm of the original's patches (`decompositions.refine`).
    seed : of the positions that are drawn, and of a loader that shuffles.
    A layer that is fitted has a bias, also if it had none. A layer stays as it is if it is called
    several times or shares its weight, has a dense branch beside it (`ResidualSFT`), or if there
    are fewer positions than 20 for each number that it reads.
    Where a process group of torch.distributed runs, each process gives its share of the data and
    all end with the same network.
    Raises `InputError` for data that is empty or not finite. Neither network is changed.
    """
    if passes < 1:
        raise InputError(f"At least 1 pass over the data is needed; {passes} were asked for.")
    fitted = copy_module(small)
    example = first_batch(loader, seed)[:1].to(device_of(fitted))
    original, _ = open_all_recurrent(
        fold_batch_norm(copy_module(teacher).to(example.device), example)
    )
    before = distance(fitted, original, loader, seed)
    refined = refine_factors(fitted, original, loader, seed) if refine else 0
    names = _in_order(fitted, original, example, dense)
    length = max(1, math.ceil(len(names) / passes))
    stretches = [names[i : i + length] for i in range(0, len(names), length)]
    generator = torch.Generator().manual_seed(seed)
    for stretch in track(stretches, "stretches fitted", len(stretches)):
        fits = {name: _Fit(fitted.get_submodule(name), generator) for name in stretch}
        _gather(fitted, original, fits, loader, seed)
        for fit in fits.values():
            fit.moments.share()
            fit.solve()
    broadcast_([*fitted.parameters(), *fitted.buffers()])
    after = distance(fitted, original, loader, seed)
    say(f"  refined {refined} layers, fitted {len(names)}")
    say(f"  divergence on held-out batches {before:.4g} before, {after:.4g} after")
    return fitted if after < before else small


class _Fit:
    """One layer: joint moments of what its last factor reads and of what it should give."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        self.layer, self.generator = layer, generator
        self.last = layer.factors[-1] if isinstance(layer, FactorizedSFT) else layer
        self.mixes = isinstance(layer, InterpolativeSFT) and len(layer.parts) == 2
        self.geometry = geometry_of(self.last)
        whole = layer.geometry if isinstance(layer, FactorizedSFT) and self.mixes else self.geometry
        self.groups, self.outputs = whole.groups, whole.outputs // whole.groups
        self.depth = self.geometry.inputs // self.groups * self.geometry.taps
        weight = weight_of(self.last)
        work = torch.promote_types(weight.dtype, torch.float32)
        self.moments = Moments(self.groups, self.depth + self.outputs, weight.device, work)

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add a batch: inputs of the last factor, and the outputs that the layer should give."""
        if not self.geometry.axes:
            z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1, y.shape[-1])
        elif z.ndim == self.geometry.axes + 1:
            z, y = z[None], y[None]
        columns = y.reshape(len(y), y.shape[1], -1)
        if isinstance(self.layer, InterpolativeSFT) and not self.mixes:
            columns = columns.index_select(1, self.layer.order.argsort())
        total = len(columns) * columns.shape[2]
        chosen = draw(total, max(POSITIONS, 4 * self.depth), self.generator)
        chosen = torch.arange(total) if chosen is None else chosen
        tables = reads(self.geometry, tuple(z.shape[2:]), tuple(y.shape[2:]), z.device)
        width = max(1, CHUNK // (self.groups * (self.depth + self.outputs)))
        for part in torch.split(chosen, width):
            found = patches(z, tables, part) if tables else picked(z[..., None], part)
            read = torch.cat(list(found), dim=2)
            wanted = torch.cat(list(picked(columns, part)), dim=2)
            both = [x.transpose(0, 1).reshape(self.groups, -1, len(part)) for x in (read, wanted)]
            joint = torch.cat(both, dim=1).flatten(0, 1)[None]
            self.moments.add([joint], joint.mean((0, 2)).double().view(self.groups, -1))

    def solve(self) -> None:
        """Fit the last factor and the bias; a ridge holds the factor to its present values."""
        if self.moments.count < ENOUGH * self.depth:
            return
        depth, covariance, mean = self.depth, self.moments.covariance(), self.moments.mean()
        inner, cross = covariance[:, :depth, :depth], covariance[:, depth:, :depth]
        kernel = self._present().to(inner)
        level = inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        ridge = RIDGE * level[:, None] * torch.ones_like(inner[:, 0])
        system = inner + torch.diag_embed(ridge)
        kernel = kernel + torch.linalg.solve(system, (cross - kernel @ inner).mT).mT
        bias = (mean[:, depth:] - (kernel @ mean[:, :depth, None])[..., 0]).flatten()
        if isinstance(self.layer, InterpolativeSFT) and self.mixes:
            with contextlib.suppress(InputError):  # dependent rows: the layer stays as it is
                self.layer.load_mixing(kernel, bias)
            return
        weight = weight_of(self.last)
        shaped = kernel.view(*kernel.shape[:2], -1, self.geometry.taps)
        weight.copy_(from_canonical(shaped, self.geometry))
        held = bias_of(self.last)
        trained = weight.requires_grad if held is None else held.requires_grad
        self.last.register_parameter("bias", nn.Parameter(bias.to(weight), trained))

    def _present(self) -> Tensor:
        """``(G, o, D)`` from what the last factor reads to the layer's outputs."""
        if isinstance(self.layer, InterpolativeSFT) and self.mixes:
            return self.layer.mixing()
        return to_canonical(weight_of(self.last).detach(), self.geometry).flatten(2)


class _ReachedError(Exception):
    """The last layer of a stretch has run; the rest of the network is not needed."""


def _gather(
    fitted: nn.Module, original: nn.Module, fits: Stretch, loader: Loader, seed: int
) -> None:
    """One pass: the original's outputs of the stretch's layers, and what the fitted ones read."""
    wanted: dict[str, list[Tensor]] = {name: [] for name in fits}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if name == list(fits)[-1]:
                wanted[name].append(output)
                raise _ReachedError
            wanted[name].append(output.clone())  # an activation may overwrite it in place

        return hook

    def add(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            fits[name].add(args[0] if args else named["input"], wanted[name].pop(0))
            if name == list(fits)[-1]:
                raise _ReachedError

        return hook

    with contextlib.ExitStack() as hooks:
        for name, fit in fits.items():
            watched = original.get_submodule(name).register_forward_hook(keep(name))
            hooks.callback(watched.remove)
            reading = fit.last.register_forward_pre_hook(add(name), with_kwargs=True)
            hooks.callback(reading.remove)
        for x in batches(loader, device_of(fitted), held_out=False, seed=seed):
            wanted.update((name, []) for name in fits)
            for network in (original, fitted):
                with contextlib.suppress(_ReachedError):
                    network(x)


def _in_order(fitted: nn.Module, original: nn.Module, example: Tensor, dense: bool) -> list[str]:
    """The layers to fit that both networks have and call once, in the order of their calls."""
    called: list[str] = []
    known = dict(original.named_modules())
    hooks = []
    inside: list[str] = []
    uses = Counter(id(p) for m in fitted.modules() for p in m._parameters.values() if p is not None)
    for name, module in fitted.named_modules():
        split = isinstance(module, FactorizedSFT) and not isinstance(module, ResidualSFT)
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, FactorizedSFT):
            inside.append(name)
        if any(uses[id(p)] > 1 for p in module.parameters()):
            continue
        if type(known.get(name)) in KINDS.values() and (split or _fits(module, dense)):
            hooks.append(module.register_forward_hook(lambda *_, n=name: called.append(n)))
    fitted(example)
    for hook in hooks:
        hook.remove()
    return [n for n in dict.fromkeys(called) if called.count(n) == 1]


def _fits(module: nn.Module, dense: bool) -> bool:
    """Whether a layer that was not split is fitted."""
    if not dense or type(module) not in KINDS.values():
        return False
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False  # computed from other parameters
    geometry = geometry_of(module)
    return geometry.inputs // geometry.groups * geometry.taps <= WIDEST
