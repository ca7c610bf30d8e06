"""Which operators of a captured graph can run in integers, and how their scales hang together.

Each table gives the name by which a target's `operators` lists the operator. What is in no table
runs in float between a dequantiser and a quantiser.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

# A weight, an input and an output, each with a scale of its own.
WEIGHTED = {
    aten.conv1d.default: "conv",
    aten.conv2d.default: "conv",
    aten.conv3d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.padding: "conv",
    aten.linear.default: "linear",
}
# Operators whose weights can be stored as integers though they run in float, with the places of
# their weights among the arguments and the axis of the output channels.
STORED = {
    aten.conv_transpose1d.default: (1, 1),
    aten.conv_transpose2d.input: (1, 1),
    aten.conv_transpose3d.input: (1, 1),
    aten.lstm.input: (2, 0),
    aten.gru.input: (2, 0),
    aten.rnn_tanh.input: (2, 0),
    aten.rnn_relu.input: (2, 0),
}
# Two tensors of any scales give one.
BINARY = {
    aten.add.Tensor: "add",
    aten.add_.Tensor: "add",
    aten.mul.Tensor: "mul",
    aten.mul_.Tensor: "mul",
}
CONCATENATION = {aten.cat.default: "concat", aten.concat.default: "concat"}
# Pieces of one tensor, each taken by a `getitem`; all have its scale.
SPLITTING = {
    aten.chunk.default: "split",
    aten.split.Tensor: "split",
    aten.split_with_sizes.default: "split",
    aten.tensor_split.sections: "split",
    aten.unbind.int: "split",
}
# The output has the values of the input, so it has its scale.
PASSING = {
    aten.flatten.using_ints: "reshape",
    aten.view.default: "reshape",
    aten.reshape.default: "reshape",
    aten._unsafe_view.default: "reshape",
    aten.permute.default: "reshape",
    aten.transpose.int: "reshape",
    aten.squeeze.dims: "reshape",
    aten.squeeze.dim: "reshape",
    aten.unsqueeze.default: "reshape",
    aten.contiguous.default: "reshape",
    aten.slice.Tensor: "reshape",
    aten.select.int: "reshape",
    aten.pixel_shuffle.default: "reshape",
    aten.channel_shuffle.default: "reshape",
    aten.max_pool1d.default: "max_pool",
    aten.max_pool2d.default: "max_pool",
    aten.max_pool3d.default: "max_pool",
    aten.constant_pad_nd.default: "pad",
    aten.pad.default: "pad",
    aten.upsample_nearest2d.vec: "resize",
    aten.upsample_nearest2d.default: "resize",
    aten.upsample_bilinear2d.vec: "resize",
    aten.upsample_bilinear2d.default: "resize",
}
# One tensor of a scale of its own gives another.
RESCALING = {
    aten.adaptive_avg_pool1d.default: "average_pool",
    aten.adaptive_avg_pool2d.default: "average_pool",
    aten.avg_pool1d.default: "average_pool",
    aten.avg_pool2d.default: "average_pool",
    aten.mean.dim: "average_pool",
    aten.sigmoid.default: "sigmoid",
    aten.leaky_relu.default: "leaky_relu",
    aten.leaky_relu_.default: "leaky_relu",
}
# The ends of the output's range do what the function does, so that it costs nothing.
CLAMPING = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "clamp",
    aten.hardtanh.default: "clamp",
    aten.hardtanh_.default: "clamp",
    aten.clamp.default: "clamp",
    aten.clamp_.default: "clamp",
}
# Elementwise functions that no integer kernel computes: said in the report, cheap.
FLOAT_FUNCTIONS = {
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.gelu.default: "gelu",
    aten.tanh.default: "tanh",
    aten.elu.default: "elu",
    aten.softmax.int: "softmax",
}


def name_in(table: Mapping[Any, str], node: Node) -> str | None:
    """The name of a node's operator in one of the tables, or None."""
    return table.get(node.target)


def pieces_of(split: Node) -> list[Node]:
    """The nodes that take the pieces of a splitting operator."""
    return [user for user in split.users if user.target is operator.getitem]


def stands_on(node: Node, place: int) -> list[Node]:
    """The parameters at a place among the arguments: one tensor, or a list of them."""
    found: Any = node.args[place] if place < len(node.args) else None
    several = found if isinstance(found, list | tuple) else [found]
    return [n for n in several if isinstance(n, Node) and n.op == "get_attr"]


def pads_with_zero(node: Node) -> bool:
    """Whether a padding writes zeros, which every grid holds exactly."""
    arguments = dict(enumerate(node.args)) | dict(node.kwargs)
    mode = "constant" if node.target == aten.constant_pad_nd.default else arguments.get(2)
    value = arguments.get(2 if node.target == aten.constant_pad_nd.default else 3)
    return mode in (None, "constant") and value in (None, 0, 0.0)


def module_of(parameter: Node) -> str:
    """The name of the module that owns a parameter of the graph."""
    return str(parameter.target).rpartition(".")[0]


def nearest_owner(module: str, names: Any) -> str | None:
    """The longest of `names` that is `module` or one that it lies in."""
    while module and module not in names:
        module = module.rpartition(".")[0]
    return module or None
