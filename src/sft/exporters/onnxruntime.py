"""ONNX for ONNX Runtime: quantise/dequantise pairs that the runtime fuses into integer kernels."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import nn

from sft.core.errors import InputError
from sft.core.files import write_bytes

OPSET = 21


class OnnxRuntimeExporter:
    """`torch.onnx.export(dynamo=True)`, then metadata stripped and global means made poolings."""

    runtime = "onnxruntime"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path) -> None:
        with _silence():
            try:
                program = torch.onnx.export(
                    network, (example,), dynamo=True, verbose=False, opset_version=OPSET
                )
            except Exception as error:
                raise InputError(
                    f"The network cannot be written as ONNX: {str(error).splitlines()[0]}"
                ) from error
        assert program is not None
        proto = onnx.ModelProto.FromString(program.model_proto.SerializeToString())
        use_global_pooling(proto.graph)
        strip_metadata(proto)
        write_bytes(path, proto.SerializeToString(deterministic=True))


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Drop what no runtime reads: the exporter's notes dominate small files."""
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def use_global_pooling(graph: onnx.GraphProto) -> None:
    """Write a mean over both image axes as GlobalAveragePool, which has an integer kernel."""
    constants = {t.name: t for t in graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.input]}
    for node in graph.node:
        if (
            node.op_type == "ReduceMean"
            and ranks.get(node.input[0]) == 4
            and _is_image_mean(node, constants)
        ):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def _is_image_mean(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    attributes = {a.name: a.i for a in node.attribute}
    if len(node.input) < 2 or node.input[1] not in constants:
        return False
    axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return attributes.get("keepdims", 1) == 1 and sorted(axes) in ([-2, -1], [2, 3])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter warns about optional packages and its own steps; none of it helps a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
