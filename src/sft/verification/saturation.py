"""Integer weights that x86 processors without VNNI may add up wrongly.

Their kernel adds two neighbouring products of an unsigned activation and a signed weight in 16
bits, and saturates: two weights of one sign that reach beyond 128 together may be cut off there
(255 * 128 <= 32767 < 255 * 129). Neighbours are columns 2m and 2m + 1 of an output's weights, tap
by tap and within a tap channel by channel. A depthwise convolution runs on another kernel.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper

from sft.core.errors import InputError
from sft.core.files import read_bytes
from sft.core.records import Artifact
from sft.quantizers.fake import in_kernel_order
from sft.quantizers.grid import offending_pairs
from sft.runtimes.targets import find_target, instruction_set

SAFE_SUM = 128
MULTIPLYING = ("Conv", "Gemm", "MatMul")
PASSED = ("Transpose", "DequantizeLinear", "Cast")


def saturating_pairs(path: str | Path) -> dict[str, int]:
    """How many pairs of neighbouring weights can saturate, by node of an ONNX file; none: empty.

    Only nodes that multiply unsigned integers count. Raises `InputError` for a missing file.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(read_bytes(Path(path)))
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {t.name: t for t in graph.initializer}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in MULTIPLYING and _reads_unsigned(node, makers, constants):
            rows = _rows(node, makers, constants)
            pairs = 0 if rows is None else offending_pairs(rows, SAFE_SUM)
            if pairs:
                found[node.name or node.output[0]] = pairs
    return found


def saturation_failures(artifact: Artifact) -> list[str]:
    """A sentence if the file may saturate on the machine at hand."""
    target = find_target(artifact.target)
    if not artifact.integers or target.runtime != "onnxruntime" or instruction_set() != "avx2":
        return []
    found = saturating_pairs(artifact.path)
    if not found:
        return []
    return [
        f"{sum(found.values())} pairs of weights (the first in '{next(iter(found))}') can saturate "
        f"the 16-bit sums of this processor, which has no VNNI: the file was made for "
        f"'{target.name}'. Export it for 'onnxruntime-avx2'."
    ]


def _reads_unsigned(
    node: NodeProto, makers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> bool:
    """Whether the node's data comes from unsigned integers."""
    maker = makers.get(node.input[0])
    if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) < 3:
        return False
    zero = constants.get(maker.input[2])
    return zero is not None and zero.data_type == TensorProto.UINT8


def _rows(
    node: NodeProto, makers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> torch.Tensor | None:
    """The integer weights, an output a row, in the kernel's order; None if there are none."""
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    name, integer = node.input[1], False
    while name in makers and makers[name].op_type in PASSED:
        turned ^= makers[name].op_type == "Transpose"
        integer |= makers[name].op_type == "DequantizeLinear"
        name = makers[name].input[0]
    if not integer or name not in constants:
        return None
    weight = torch.from_numpy(numpy_helper.to_array(constants[name]).astype(np.int8))
    if node.op_type == "Conv":
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        depthwise = groups > 1 and groups == len(weight)
        return None if depthwise else in_kernel_order(weight)
    if weight.ndim != 2:
        raise InputError(
            f"The weight of '{node.name}' has shape {tuple(weight.shape)}, not (K, N)."
        )
    return weight if turned else weight.T


__all__ = ["SAFE_SUM", "saturating_pairs", "saturation_failures"]
