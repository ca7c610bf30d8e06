"""Streaming statistics of what every layer sees: one pass over the data, sums only.

Memory depends on the layers' widths, not on the number of samples: no activation outlives its
batch. The sums are kept in float64 (see `moments`).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.data import Loader, check_finite, inputs_of, length_of
from sft.core.distributed import all_reduce_sum_, rank
from sft.core.errors import InputError
from sft.core.progress import track
from sft.core.shards import Shard
from sft.core.statistics import Statistics
from sft.profiling.gradients import backward, frozen_parameters, scale_of, tracked
from sft.profiling.layer_sums import LayerSums, Wanted
from sft.profiling.samples import shape_of_all


def gather_statistics(
    model: nn.Module,
    names: Collection[str],
    loader: Loader,
    *,
    patch_covariances: Collection[str] = (),
    gradients: bool = False,
    positions: int | None = None,
    seed: int = 0,
    one_shape: bool = False,
) -> tuple[dict[str, Statistics], int]:
    """Run the calibration data once and sum up what the named layers see.

    names : dense layers of `torch.nn`, batch norm best folded before. Several calls of one layer in
        one forward pass are summed.
    patch_covariances : those of the layers whose covariance of patches ``(G, D, D)`` is wanted too;
        of a pointwise layer that is its `input_covariance`.
    gradients : also the second moment of the gradient at each output, by one backward pass a batch.
    positions : use at most so many positions of each batch for the covariances, drawn afresh for
        each batch. By default all are used, but for the costly ones: 1,024 for `tap_covariance`,
        ``max(4096, 2 D)`` for a patch covariance wider than the output, ``max(4096, 2 o)`` for
        gradients. Means are of all positions always.
    seed : of the positions and of the sampled targets; torch's global generator is not used.
    one_shape : refuse samples that differ in shape; otherwise the model may take them as it can.

    Where a process group of torch.distributed runs, each process gives its share of the data, and
    all get the statistics of the whole. Where the loader is a `Shard`, they are those that one
    process would gather, but for the sampled targets.

    Returns the statistics by layer name and the number of samples. The model is run in eval mode
    and left as it was. Raises `InputError` for empty or non-finite data, a module that is no such
    layer, a layer that is never run, and outputs that cannot be differentiated.
    """
    extra = sorted(set(patch_covariances) - set(names))
    if extra or (positions is not None and positions < 1):
        raise InputError(
            f"Patch covariances are asked of {', '.join(extra)}, not among the layers gathered."
            if extra
            else f"At least 1 position of a batch must be used; {positions} were asked for."
        )
    sums = {}
    for name in names:
        wanted = Wanted(name in patch_covariances, gradients, positions, seed)
        sums[name] = LayerSums(name, model.get_submodule(name), wanted)
    run = _runner(model, gradients, seed + rank())
    seen = torch.zeros(1, dtype=torch.int64)
    shape: torch.Size | None = None
    with _watched(model, sums.values()):
        read = track(_inputs(loader, sums.values()), "calibration batches", length_of(loader))
        for number, x in enumerate(read, 1):
            check_finite(x, "calibration")
            shape = shape_of_all(x, shape, number) if one_shape else None
            if len(x):
                run(x)
            seen += len(x)
    all_reduce_sum_([seen])
    if not seen:
        raise InputError("The calibration data is empty: at least one batch is needed.")
    for own in sums.values():
        own.share()
    return {name: s.finish() for name, s in sums.items()}, int(seen)


def _inputs(loader: Loader, sums: Collection[LayerSums]) -> Iterator[Tensor]:
    """The inputs of each batch; of a slice of one, the sums know where it stands."""
    if not isinstance(loader, Shard):
        yield from map(inputs_of, loader)
        return
    for part in loader.parts():
        for own in sums:
            own.part = part
        yield inputs_of(part.batch)


def _runner(model: nn.Module, gradients: bool, seed: int) -> Callable[[Tensor], None]:
    """What is done with a batch: forward, or forward and backward with sampled targets."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            model(x.to(device))

    def both(x: Tensor) -> None:
        with frozen_parameters(model), torch.enable_grad():
            backward(model(x.to(device)), generator)

    return both if gradients else forward


@contextlib.contextmanager
def _watched(model: nn.Module, sums: Collection[LayerSums]) -> Iterator[None]:
    """Inside, the model is in eval mode and its layers add to their sums; then as before."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        model.eval()
        for own in sums:
            hooks.append(own.layer.register_forward_hook(_adder(own), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def _adder(sums: LayerSums) -> Callable[..., Tensor]:
    """The forward hook of one layer."""

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        with _exactly(output):
            sums.add(x.detach(), output.detach())
        if sums.gradients is not None:
            output = tracked(output)
            scale = scale_of(output.dtype)

            def add_gradient(gradient: Tensor) -> None:
                with _exactly(gradient):
                    sums.add_gradient(gradient, scale)

            output.register_hook(add_gradient)  # type: ignore[no-untyped-call]
        return output

    return add


@contextlib.contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """Inside, products of float32 are computed as such: no autocast, TF32 or bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    modes = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        for backend, mode in zip(backends, modes, strict=True):
            backend.fp32_precision = mode
