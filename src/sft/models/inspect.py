"""What a network is made of: its layers, found by running it once on an example.

The model is left bit for bit as it was: training flags, buffers, hooks and random state.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.kernels import geometry_of
from sft.core.records import Inspection, Layer
from sft.models.quote import one_line

EVERY_DECOMPOSITION = "*"
STANDARD: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


@dataclasses.dataclass
class _Trace:
    """What the calls of one module showed; MACs are of the whole batch, over all calls."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int = 0
    calls: int = 0
    alike: bool = True


def inspect(model: nn.Module, example: Tensor, name: str = "model") -> Inspection:
    """Find every layer of `model`, in the order of its first call, by running it once.

    example : input of the model with its batch axis, `(N, ...)`; N may be 1.
    name : what reports call the model.

    A layer is a convolution, transposed convolution or `nn.Linear` that is called. MACs are of
    one sample; those of the whole count every matrix product and convolution, also outside the
    layers (half of what `torch.utils.flop_counter` counts).

    Raises `InputError` if the model does not run on the example, returns something else than one
    tensor, has weights that are not finite, or has no layer.
    """
    check_model(model, example)
    example = example.to(next((p.device for p in model.parameters()), example.device))
    with _as_it_was(model):
        traces, macs = _run(model, example)
        found = tuple(_layer(model, m, trace, len(example)) for m, trace in traces.items())
    if not found:
        raise InputError(
            f"The model '{name}' calls no layer that SFT handles (convolutions, transposed "
            "convolutions and nn.Linear), so there is nothing to compress."
        )
    params = sum(p.numel() for p in model.parameters())
    return Inspection(name, tuple(example.shape[1:]), params, macs // len(example), found)


def check_model(model: nn.Module, example: Tensor) -> None:
    """Raise `InputError` unless `model` is a module with finite weights and `example` a batch.

    The model is not run.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is of type {type(model).__name__}; an nn.Module is wanted.")
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) == 0:
        raise InputError("The example must be a tensor with a batch axis and at least one sample.")
    tensors = [*model.named_parameters(), *_running_statistics(model)]
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise InputError(
                f"The parameter '{name}' has no shape yet (a lazy module). Run the model once."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"The parameter '{name}' {tuple(tensor.shape)} holds NaN or infinite values. "
                "Load sound weights first."
            )


def refusal(module: nn.Module, alike: bool, shared: bool) -> str | None:
    """Why no decomposition can be used on `module`, or None.

    alike : all its calls in one run of the model have inputs of one shape.
    shared : its weight is also that of another module.
    """
    kind = _kind(module)
    if is_parametrized(module) or module._parameters.get("weight") is None:
        return "its weight is computed from other tensors (a parametrization); remove that first"
    if type(module) not in STANDARD:
        return f"{kind} is a class of its own, whose forward may do anything"
    if shared:
        return "its weight is shared with another module, which would keep the whole kernel"
    if not alike:
        return "it is called several times in one run, with inputs of different shapes"
    return None


def _layer(model: nn.Module, module: nn.Module, trace: _Trace, batch: int) -> Layer:
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    weight = cast(Tensor, module.weight)
    reason = refusal(module, trace.alike, _is_tied(model, module))
    return Layer(
        name=names[0],
        kind=_kind(module),
        weight_shape=tuple(weight.shape),
        bias=module.bias is not None,
        input_shape=trace.input_shape,
        output_shape=trace.output_shape,
        macs=trace.macs // batch,
        calls=trace.calls,
        refusals={} if reason is None else {EVERY_DECOMPOSITION: reason},
        geometry=None if reason is not None else geometry_of(module),
    )


def _kind(module: nn.Module) -> str:
    """The class name; of a parametrised module, the name of the class it had before."""
    cls = type(module).__mro__[1] if is_parametrized(module) else type(module)
    return cls.__name__


def _is_tied(model: nn.Module, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return weight is not None and owners[id(weight)] > 1


def _run(model: nn.Module, example: Tensor) -> tuple[dict[nn.Module, _Trace], int]:
    """Run the model; the trace of each layer in the order of first call, and all MACs."""
    traces: dict[nn.Module, _Trace] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, returned: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        output = _first(returned)
        trace = traces.setdefault(module, _Trace(_sample(module, x), _sample(module, output)))
        trace.alike &= trace.input_shape == _sample(module, x)
        trace.macs += _macs(module, x, output)
        trace.calls += 1

    layers = [m for m in model.modules() if isinstance(m, STANDARD)]
    handles = [m.register_forward_hook(record, with_kwargs=True) for m in layers]
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            output = model(example)
    except Exception as error:
        raise InputError(
            f"The model does not run on an input of shape {tuple(example.shape)} "
            f"({example.dtype}): {one_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise InputError(
            f"The model returns {type(output).__name__}; one tensor is wanted. Wrap the model in "
            "a module that returns the tensor to be kept."
        )
    return traces, counter.get_total_flops() // 2


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _sample(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of one sample: all of an unbatched convolution input, else without axis 0."""
    unbatched = isinstance(module, _ConvNd) and x.ndim == len(module.kernel_size) + 1
    return tuple(x.shape if unbatched else x.shape[1:])


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Each weight is used once for each position: of the output, or of what is transposed."""
    weight = cast(Tensor, module.weight)
    if isinstance(module, _ConvTransposeNd):
        return x.numel() // module.in_channels * weight.numel()
    if isinstance(module, _ConvNd):
        return output.numel() // module.out_channels * weight.numel()
    return output.numel() * weight.shape[1]


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; flags, buffers and random state are restored at the end."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, buffer, None if buffer is None else buffer.detach().clone())
        for m in model.modules()
        for name, buffer in m._buffers.items()
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if buffer is not None and before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def _running_statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    names = ("running_mean", "running_var")
    return [(n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in names]
