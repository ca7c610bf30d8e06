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
from torch.fx import GraphModule

from sft.core.errors import InputError
from sft.core.files import write_bytes
from sft.exporters.biases import round_biases
from sft.exporters.clips import clip_integers, drop_redundant_clips
from sft.exporters.direct import write_directly
from sft.exporters.few_bits import raise_opset, store_few_bits
from sft.exporters.floats import keep_floats
from sft.exporters.pads import keep_pads_in_integers
from sft.exporters.slimming import drop_default_attributes, shorten_names, strip_metadata
from sft.exporters.storage import Storage, read_onnx
from sft.exporters.widening import widen_stored_weights
from sft.exporters.wiring import drop_unread_constants

OPSET = 21


class OnnxRuntimeExporter:
    """`torch.onnx.export(dynamo=True)`, then the graph made small, and fit for integer kernels.

    Converted graphs of plain operators are written directly, to the same bytes (see `direct`).

    Weights of few bits are packed (see `few_bits`), which needs ONNX Runtime 1.23 to run, and 1.24
    for 2 bits.
    """

    runtime = "onnxruntime"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path) -> None:
        """Write the whole file or nothing. example : ``(1, ...)``, the shape of every run.

        Raises `InputError` with the cause if the network cannot be written as ONNX.
        """
        graph = network if isinstance(network, GraphModule) else None
        proto = None if graph is None else write_directly(graph, example, OPSET)
        proto = proto or _convert(network, example)
        use_global_pooling(proto.graph)
        drop_redundant_clips(proto.graph)
        clip_integers(proto.graph)
        keep_pads_in_integers(proto.graph)
        round_biases(proto.graph)
        raise_opset(proto)
        strip_metadata(proto)
        drop_default_attributes(proto)
        shorten_names(proto.graph, kept=_own_names(network))
        store_few_bits(proto)
        widen_stored_weights(proto.graph)
        keep_floats(proto.graph)
        write_bytes(path, proto.SerializeToString(deterministic=True))

    def storage(self, path: Path) -> dict[str, Storage]:
        """Every weight of a file that `write` wrote, with the bits it is stored in."""
        return read_onnx(path)


def _convert(network: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    with _silence():
        try:
            program = torch.onnx.export(
                network, (example,), dynamo=True, verbose=False, opset_version=OPSET
            )
        except Exception as error:
            raise InputError(
                f"The network cannot be written as ONNX: {_cause(error)} Change that operation, "
                f"or leave it out of the network that is exported."
            ) from error
    assert program is not None
    proto = onnx.ModelProto()
    proto.ParseFromString(program.model_proto.SerializeToString())
    return proto


def _cause(error: BaseException) -> str:
    """The first line of the innermost error; those around it only say which step failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _own_names(network: nn.Module) -> set[str]:
    """Names of parameters and buffers, without those that the conversion made up."""
    return {name for name in network.state_dict() if not name.startswith("_")}


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
    drop_unread_constants(graph)


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
