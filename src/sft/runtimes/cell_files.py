"""Small ONNX files of one cell each, for ONNX Runtime to be timed on.

`torch.onnx.export` takes a second a file, so the files are written node by node, in the patterns of
`sft.exporters.onnxruntime`, which the runtime fuses as it does inside a network.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sft.core.errors import InputError
from sft.core.geometry import Geometry, Sizes
from sft.core.records import Layout
from sft.runtimes.cells import FLOAT, INTEGER, INTERPOLATIVE, MIXED, RESIDUAL, Cell, unsupported

OPSET, IR_VERSION = 21, 10
LARGEST_WEIGHT = 63  # two of one sign stay within every layout's `pair_sum`
STEP, OUTPUT_STEP = 1 / 32, 1 / 24  # of activations: between the factors, and behind the layer

Values = npt.NDArray[Any]


def write_cell(cell: Cell, layout: Layout, copies: int = 1) -> bytes:
    """A file that computes the cell `copies` times, with other weights of a fixed seed each.

    All copies read the one input, and only the first gives the output; ONNX Runtime executes nodes
    that nothing reads. So two files that differ in `copies` differ in the time of the layer alone:
    the run itself, and the change of layout at the edges, are in both. Where activations are
    integers, so are input and output, and their channels come last, as integer kernels have them.
    A mixed copy has an input of its own: slice `i` of the input's axis 1, which is long enough for
    one more. The batch is 1. Raises `InputError` for a cell that is `unsupported`.
    """
    reason = unsupported(cell)
    if reason is not None:
        raise InputError(f"The cell {cell} cannot be written: {reason}.")
    return _Writer(cell, layout).write(copies)


class _Writer:
    """Nodes and constants of one file."""

    def __init__(self, cell: Cell, layout: Layout) -> None:
        self.cell = cell
        self.quantised = cell.arithmetic != FLOAT
        self.dtype = np.dtype(layout.activation_dtype)
        self.middle = (layout.activation_min + layout.activation_max + 1) // 2
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.random = np.random.default_rng(0)

    def write(self, copies: int) -> bytes:
        """The whole file."""
        shape = self._input_shape()
        if self.cell.arithmetic == MIXED:
            length, shape[1] = shape[1], shape[1] * (copies + 1)
            outputs = [self._copy(self._slice(index, length)) for index in range(copies)]
        else:
            outputs = [self._copy("x") for _ in range(copies)]
        number = helper.np_dtype_to_tensor_dtype(
            self.dtype if self.quantised else np.dtype(np.float32)
        )
        graph = helper.make_graph(
            self.nodes,
            "cell",
            [helper.make_tensor_value_info("x", number, shape)],
            [helper.make_tensor_value_info(outputs[0], number, None)],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return bytes(proto.SerializeToString(deterministic=True))

    def _input_shape(self) -> list[int]:
        channels = self.cell.chain[0].inputs
        if self.cell.linear or self.quantised:
            return [1, *self.cell.size, channels]
        return [1, channels, *self.cell.size]

    def _copy(self, value: str) -> str:
        """The layer once, from integers to integers or from floats to floats."""
        if self.quantised:
            value = self._node("DequantizeLinear", self._channels_first(value), *self._grid())
        value = self._layer(value)
        if self.cell.arithmetic == MIXED:  # x -> x, fused; else the runtime rounds the weights
            value = self._node("LeakyRelu", value, alpha=1.0)
        elif self.cell.activation == "relu":
            value = self._node("Relu", value)
        elif self.cell.activation == "relu6":
            ends = (self._constant(np.array(end, np.float32)) for end in (0, 6))
            value = self._node("Clip", value, *ends)
        return self._channels_last(self._round(value, OUTPUT_STEP)) if self.quantised else value

    def _layer(self, value: str) -> str:
        chain, biased = self.cell.chain, self.cell.bias
        if self.cell.structure == RESIDUAL:
            branches = (
                self._follow(value, chain[:1], False),
                self._follow(value, chain[1:], biased),
            )
            return self._node("Add", *(self._regrid(branch) for branch in branches))
        if self.cell.structure == INTERPOLATIVE:
            return self._interpolate(value)
        return self._follow(value, chain, biased)

    def _follow(self, value: str, factors: tuple[Geometry, ...], biased: bool) -> str:
        """Factors that follow one another; the last has the bias."""
        for index, factor in enumerate(factors):
            value = value if index == 0 else self._regrid(value)
            value = self._multiply(value, factor, biased and index == len(factors) - 1)
        return value

    def _interpolate(self, value: str) -> str:
        """The first factor's outputs, the second's of those, put in order."""
        axis = -1 - self.cell.chain[0].axes
        value = self._multiply(value, self.cell.chain[0], True)
        for factor in self.cell.chain[1:]:
            value = self._regrid(value)
            others = self._regrid(self._multiply(value, factor, True))
            value = self._node("Concat", value, others, axis=axis)
        order = self.random.permutation(sum(f.outputs for f in self.cell.chain))
        return self._node("Gather", self._regrid(value), self._constant(order), axis=axis)

    def _multiply(self, value: str, factor: Geometry, biased: bool) -> str:
        """One factor as the exporter writes it: Conv, ConvTranspose, Gemm, or MatMul and Add."""
        bias = [self._constant(self._draw((factor.outputs,), 1.0))] if biased else []
        weight = self._weight(factor)
        if factor.axes:
            op = "ConvTranspose" if factor.transposed else "Conv"
            return self._node(op, value, weight, *bias, **_attributes(factor))
        if bias and not self.cell.size:
            return self._node("Gemm", value, weight, *bias, transB=1)
        value = self._node("MatMul", value, self._node("Transpose", weight, perm=[1, 0]))
        return self._node("Add", value, *bias) if bias else value

    def _weight(self, factor: Geometry) -> str:
        """Random weights in the layout of `torch.nn`; integers have a scale for each output."""
        shape, depth = factor.weight_shape, factor.params // factor.outputs
        if self.cell.arithmetic != INTEGER:
            return self._constant(self._draw(shape, depth**-0.5))
        integers = self.random.integers(-LARGEST_WEIGHT, LARGEST_WEIGHT + 1, shape, np.int8)
        scale = np.full(factor.outputs, 2 / (LARGEST_WEIGHT * depth**0.5), np.float32)
        zero = np.zeros(factor.outputs, np.int8)
        parts = [self._constant(part) for part in (integers, scale, zero)]
        return self._node("DequantizeLinear", *parts, axis=0)

    def _regrid(self, value: str) -> str:
        """Rounded to a grid of integers between two factors, in integer arithmetic."""
        if self.cell.arithmetic != INTEGER:
            return value
        return self._node("DequantizeLinear", self._round(value), *self._grid())

    def _round(self, value: str, step: float = STEP) -> str:
        return self._node("QuantizeLinear", value, *self._grid(step))

    def _grid(self, step: float = STEP) -> tuple[str, str]:
        """Scale and zero point of an activation."""
        scale, zero = np.array(step, np.float32), np.array(self.middle, self.dtype)
        return self._constant(scale, f"scale{step}"), self._constant(zero, "zero")

    def _slice(self, index: int, length: int) -> str:
        """Slice `index` of the input along axis 1."""
        ends = [[index * length], [(index + 1) * length], [1]]
        return self._node("Slice", "x", *(self._constant(np.array(end)) for end in ends))

    def _channels_first(self, value: str) -> str:
        axes = len(self.cell.size)
        if not self.quantised or self.cell.linear:
            return value
        return self._node("Transpose", value, perm=[0, axes + 1, *range(1, axes + 1)])

    def _channels_last(self, value: str) -> str:
        if self.cell.linear:
            return value
        return self._node("Transpose", value, perm=[0, *range(2, len(self.cell.size) + 2), 1])

    def _draw(self, shape: Sizes, scale: float) -> Values:
        drawn = self.random.standard_normal(shape, np.float32)
        return np.asarray(scale * drawn, np.float32)

    def _constant(self, values: Values, name: str | None = None) -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output


def _attributes(factor: Geometry) -> dict[str, Any]:
    before, after = factor.pads()
    found = {
        "kernel_shape": factor.kernel,
        "strides": factor.stride,
        "pads": (*before, *after),
        "dilations": factor.dilation,
        "group": factor.groups,
    }
    return {**found, "output_padding": factor.output_padding} if factor.transposed else found
