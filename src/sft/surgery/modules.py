"""Modules by name, and batch norm folded into the convolution before it."""

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sft.core.copies import copy_module
from sft.core.errors import InputError
from sft.layers.opened import OPENED, open_recurrent

aten = torch.ops.aten
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVING = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; raises `InputError` that lists what is beside it."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(f"The model has no layer '{name}'. `sft inspect` lists them.") from None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is (in `model` itself), under all its names."""
    old = get_module(model, name)
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
    for each in names:
        parent, _, last = each.rpartition(".")
        setattr(get_module(model, parent) if parent else model, last, new)


def open_all_recurrent(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy with every `nn.LSTM`, `nn.GRU` and cell made of linear maps, and the closed ones.

    The closed modules, by name, are the copy's own. Where there is none, the copy is the model.
    """
    found = [n for n, m in model.named_modules() if type(m) in OPENED]
    if not found:
        return model, {}
    opened = copy_module(model)
    closed = {name: get_module(opened, name) for name in found}
    for name, module in closed.items():
        replace_module(opened, name, open_recurrent(module).eval())
    return opened, closed


def capture(model: nn.Module, example: torch.Tensor) -> GraphModule:
    """The model's graph for any batch size, by `torch.export`, in evaluation.

    example : ``(1, ...)``. Raises `InputError` that says why the model cannot be captured.
    """
    pair = torch.cat([example[:1], example[:1]])
    with warnings.catch_warnings(), _quiet_torch():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                model, (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"The model cannot be captured as a graph for any batch size: {reason} "
                "torch.export must accept it: remove branches on tensor values and fixed batch "
                "sizes from its forward; export a .pt2 with dynamic_shapes for the batch axis."
            ) from error
        graph = program.module()
    assert isinstance(graph, GraphModule)
    _drop_guards(graph)
    return graph


def fold_batch_norm(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of the model (eval mode) in which each batch norm is part of its convolution.

    Only a batch norm that reads nothing but one convolution's output is folded; the outputs stay
    the same up to rounding. The norm's place is taken by `nn.Identity`. In the copy, transformer
    layers call their linear layers, so that these may be replaced.
    """
    _check_precision(model, example)
    folded = copy_module(model)
    _call_every_layer(folded)
    for conv_name, norm_name in _conv_norm_pairs(capture(folded, example)):
        conv, norm = get_module(folded, conv_name), get_module(folded, norm_name)
        if not isinstance(conv, CONVOLUTIONS) or not isinstance(norm, NORMS):
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        trained = conv.weight if conv.bias is None else conv.bias
        conv.weight, conv.bias = weight, bias.requires_grad_(trained.requires_grad)
        replace_module(folded, norm_name, nn.Identity())
    return folded


def _call_every_layer(model: nn.Module) -> None:
    """Turn off the fused kernels of `torch.nn`, which read the weights of layers by name."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # 0: no activation that the kernel knows
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _conv_norm_pairs(graph: GraphModule) -> list[tuple[str, str]]:
    """Convolutions and the norms that read nothing else, each used once in the whole graph."""
    readers: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    pairs: list[tuple[str, str]] = []
    for node in graph.graph.nodes:
        source = node.args[0] if node.target == aten.batch_norm.default else None
        if not (isinstance(source, Node) and source.target in CONVOLVING):
            continue
        weight, mean = source.args[1], node.args[3]
        if not (isinstance(weight, Node) and isinstance(mean, Node)):
            continue
        once = readers[str(weight.target)] == readers[str(mean.target)] == 1
        if once and len(source.users) == 1:
            pairs.append((_owner(weight), _owner(mean)))
    return pairs


def _check_precision(model: nn.Module, example: torch.Tensor) -> None:
    for name, tensor in [("input", example), *model.named_parameters()]:
        if tensor.dtype != torch.float32:
            raise InputError(
                f"The model's '{name}' is of {tensor.dtype}; SFT compresses float32 networks with "
                f"float32 inputs. Convert with .float()."
            )


def _owner(attribute: Node) -> str:
    return str(attribute.target).rpartition(".")[0]


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """A failed capture logs its whole inner life; the one sentence of the error is enough."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _drop_guards(graph: GraphModule) -> None:
    """Remove the node that re-checks the example's shape: the graph serves any batch size."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.graph.erase_node(node)
    graph.recompile()
