"""The graph of a feed-forward network written as ONNX node by node, without `torch.onnx`.

`torch.onnx.export` traces a network two times more, reads its library of operators and optimises
what it wrote: seconds, which for a converted graph of a few plain operators change nothing. Such a
graph is written here in milliseconds, to the same bytes once the exporter's passes ran over both.
A graph with any other operator, or another use of one, is left to `torch.onnx.export`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch.fx import GraphModule, Interpreter, Node

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
WHOLE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
CLIPS: dict[Any, Any] = {aten.hardtanh.default: (-1.0, 1.0), aten.clamp.default: (None, None)}
IR_VERSION = 10


def write_directly(graph: GraphModule, example: torch.Tensor, opset: int) -> onnx.ModelProto | None:
    """The model of a converted graph, for inputs of the example's shape; None if it cannot be."""
    nodes = list(graph.graph.nodes)
    known = ("placeholder", "get_attr", "output")
    if any(node.op not in known and node.target not in WRITERS for node in nodes):
        return None
    if sum(node.op == "placeholder" for node in nodes) != 1 or example.dtype != torch.float32:
        return None
    shapes = _Shapes(graph)
    with torch.no_grad():
        shapes.run(example)
    writer = _Writer(graph, shapes.found)
    try:
        for node in nodes:
            writer.add(node)
    except _UnknownError:
        return None
    return writer.model(opset)


class _UnknownError(Exception):
    """An operator is used in a way that is not written here."""


class _Shapes(Interpreter):
    """Runs the graph and keeps the shape of every value."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value, as it is."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = tuple(value.shape)
        return value


class _Writer:
    """The nodes and constants that were written so far; equal ones are written once."""

    def __init__(self, graph: GraphModule, shapes: dict[Node, tuple[int, ...]]) -> None:
        self.graph, self.shapes = graph, shapes
        self.nodes: list[NodeProto] = []
        self.constants: dict[bytes, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._values: dict[Node, str] = {}
        self._parameters: set[str] = set()
        self._written: dict[bytes, str] = {}

    def add(self, node: Node) -> None:
        """Write one node of the graph."""
        if node.op == "placeholder":
            self._values[node] = str(node.target)
            self.inputs.append(self._described(node))
        elif node.op == "output":
            if any(source.op != "call_function" for source in node.all_input_nodes):
                raise _UnknownError
            self.outputs = [self._described(source) for source in node.all_input_nodes]
        elif node.op == "call_function":
            WRITERS[node.target](self, node)

    def value(self, source: object) -> str:
        """The name of a value, or of a parameter, which then goes into the file."""
        if not isinstance(source, Node):
            raise _UnknownError
        if source.op != "get_attr":
            return self._values[source]
        name = str(source.target)
        if self.tensor(source).dtype not in (torch.float32, torch.int8):
            raise _UnknownError
        self._parameters.add(name)
        return name

    def constant(self, value: Any) -> str:
        """The name of a constant of the file."""
        array = np.asarray(value)
        tensor = numpy_helper.from_array(array)
        key = tensor.SerializeToString(deterministic=True)
        if key not in self.constants:
            tensor.name = f"val_{len(self.constants)}"
            self.constants[key] = tensor
        return self.constants[key].name

    def emit(self, node: Node, operator: str, inputs: list[str], **attributes: Any) -> None:
        """Write a node of the file that gives the value of `node`."""
        made = helper.make_node(operator, inputs, [""])
        made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        key = made.SerializeToString(deterministic=True)
        if key not in self._written:
            self._written[key] = made.output[0] = node.name
            made.name = f"node_{node.name}"
            self.nodes.append(made)
        self._values[node] = self._written[key]

    def tensor(self, source: object) -> torch.Tensor:
        """A parameter or buffer."""
        if not isinstance(source, Node) or source.op != "get_attr":
            raise _UnknownError
        owner, _, last = str(source.target).rpartition(".")
        found = getattr(self.graph.get_submodule(owner), last)
        assert isinstance(found, torch.Tensor)
        return found.detach()

    def model(self, opset: int) -> onnx.ModelProto:
        """All that was written."""
        stored = []
        for name, tensor in (*self.graph.named_parameters(), *self.graph.named_buffers()):
            if name in self._parameters:
                stored.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        stored += sorted(self.constants.values(), key=lambda tensor: not tensor.dims)
        graph = helper.make_graph(self.nodes, "main_graph", self.inputs, self.outputs, stored)
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION
        )
        made.producer_name, made.producer_version = "pytorch", torch.__version__
        return made

    def _described(self, node: Node) -> onnx.ValueInfoProto:
        name = self._values[node]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[node])


def _arguments(node: Node, *defaults: Any) -> list[Any]:
    """The positional arguments behind the first, filled up; keywords are not written here."""
    given = list(node.args[1:])
    if node.kwargs or len(given) > len(defaults):
        raise _UnknownError
    return given + list(defaults[len(given) :])


def _all_of(node: Node, count: int) -> list[Any]:
    """All arguments, which must be so many, none by keyword."""
    if node.kwargs or len(node.args) != count:
        raise _UnknownError
    return list(node.args)


def _quantise(writer: _Writer, node: Node) -> None:
    source, scale, zero, low, high, dtype = _all_of(node, 6)
    if WHOLE.get(dtype) != (low, high) or node.kwargs:
        raise _UnknownError
    zeros = writer.constant(torch.tensor(zero, dtype=dtype).numpy())
    names = [writer.value(source), writer.constant(np.float32(scale)), zeros]
    operator = "Quantize" if node.target == decomposed.quantize_per_tensor.default else "Dequantize"
    writer.emit(node, f"{operator}Linear", names)


def _dequantise_channels(writer: _Writer, node: Node) -> None:
    source, scale, zero, axis, _, _, dtype = _all_of(node, 7)
    scales = writer.constant(writer.tensor(scale).float().numpy())
    zeros = writer.constant(writer.tensor(zero).to(dtype).numpy())
    writer.emit(node, "DequantizeLinear", [writer.value(source), scales, zeros], axis=axis)


def _convolution(writer: _Writer, node: Node) -> None:
    weight, bias, stride, padding, dilation, groups = _arguments(node, None, None, 1, 0, 1, 1)
    if bias is None or isinstance(padding, str):
        raise _UnknownError
    kernel = writer.shapes[weight][2:]
    pads = _each(padding, len(kernel))
    writer.emit(
        node,
        "Conv",
        [writer.value(node.args[0]), writer.value(weight), writer.value(bias)],
        group=groups,
        pads=[*pads, *pads],
        auto_pad="NOTSET",
        strides=_each(stride, len(kernel)),
        dilations=_each(dilation, len(kernel)),
        kernel_shape=list(kernel),
    )


def _linear(writer: _Writer, node: Node) -> None:
    weight, bias = _arguments(node, None, None)
    source: Any = node.args[0]
    if bias is None or len(writer.shapes[source]) != 2:
        raise _UnknownError
    names = [writer.value(value) for value in (source, weight, bias)]
    writer.emit(node, "Gemm", names, beta=1.0, transB=1, alpha=1.0, transA=0)


def _add(writer: _Writer, node: Node) -> None:
    (other,) = _arguments(node, None)
    writer.emit(node, "Add", [writer.value(node.args[0]), writer.value(other)])


def _relu(writer: _Writer, node: Node) -> None:
    writer.emit(node, "Relu", [writer.value(node.args[0])])


def _clip(writer: _Writer, node: Node) -> None:
    if node.target == aten.relu6.default:
        low, high = 0.0, 6.0
    else:
        low, high = _arguments(node, *CLIPS[node.target])
    if low is None or high is None:
        raise _UnknownError
    ends = [writer.constant(np.float32(end)) for end in (low, high)]
    writer.emit(node, "Clip", [writer.value(node.args[0]), *ends])


def _max_pool(writer: _Writer, node: Node) -> None:
    kernel, stride, padding, dilation, up = _arguments(node, None, None, 0, 1, False)
    axes = 2
    if up:
        raise _UnknownError
    pads = _each(padding, axes)
    writer.emit(
        node,
        "MaxPool",
        [writer.value(node.args[0])],
        storage_order=0,
        dilations=_each(dilation, axes),
        ceil_mode=0,
        pads=[*pads, *pads],
        auto_pad="NOTSET",
        strides=_each(stride or kernel, axes),
        kernel_shape=_each(kernel, axes),
    )


def _global_pool(writer: _Writer, node: Node) -> None:
    (size,) = _arguments(node, None)
    if _each(size, 2) != [1, 1] or len(writer.shapes[node]) != 4:
        raise _UnknownError
    writer.emit(node, "GlobalAveragePool", [writer.value(node.args[0])])


def _mean(writer: _Writer, node: Node) -> None:
    axes, kept = _arguments(node, None, False)
    if sorted(a % 4 for a in axes or ()) != [2, 3] or not kept or len(writer.shapes[node]) != 4:
        raise _UnknownError
    writer.emit(node, "GlobalAveragePool", [writer.value(node.args[0])])


def _reshape(writer: _Writer, node: Node) -> None:
    shape = writer.shapes[node]
    if math.prod(shape) == 0:
        raise _UnknownError
    names = [writer.value(node.args[0]), writer.constant(np.array(shape, np.int64))]
    writer.emit(node, "Reshape", names, allowzero=1)


def _each(value: Any, axes: int) -> list[int]:
    several = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in several] * (axes if len(several) == 1 else 1)


WRITERS: dict[Any, Callable[[_Writer, Node], None]] = {
    decomposed.quantize_per_tensor.default: _quantise,
    decomposed.dequantize_per_tensor.default: _quantise,
    decomposed.dequantize_per_channel.default: _dequantise_channels,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.linear.default: _linear,
    aten.add.Tensor: _add,
    aten.relu.default: _relu,
    aten.relu6.default: _clip,
    aten.hardtanh.default: _clip,
    aten.clamp.default: _clip,
    aten.max_pool2d.default: _max_pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.mean.dim: _mean,
    aten.flatten.using_ints: _reshape,
}
