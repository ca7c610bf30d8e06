"""ONNX Runtime on the processor."""

import importlib
import json
from pathlib import Path
from typing import Any

from sft.runtimes.adapter import Array, Kernel, Port, size_of

Shape = tuple[int, ...]

# Operator -> where its weight stands among the inputs; the other factor is input 0.
CONVOLUTIONS = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
}
TRANSPOSED = {"ConvTranspose": 1, "QLinearConvTranspose": 3}
PRODUCTS = {
    "Gemm": 1,
    "FusedGemm": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
    "FusedMatMulActivation": 1,
    "TransposeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
}
PACKED_PRODUCTS = {"MatMulNBits": 1}
RECURRENT = {"RNN": 1, "GRU": 1, "LSTM": 1, "DynamicQuantizeLSTM": 1}
WEIGHTS = CONVOLUTIONS | TRANSPOSED | PRODUCTS | PACKED_PRODUCTS | RECURRENT

# These take float activations and turn them into integers before they multiply.
INTEGER_INSIDE = ("DynamicQuantizeMatMul", "DynamicQuantizeLSTM")


class OnnxRuntime:
    """A session on one file; see `adapter.Adapter`."""

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        self._session = _session(path, self._options())
        self.inputs = tuple(_port(p) for p in self._session.get_inputs())
        self.outputs = tuple(_port(p) for p in self._session.get_outputs())

    def run(self, x: Array) -> Array:
        found: list[Array] = self._session.run([self.outputs[0].name], {self.inputs[0].name: x})
        return found[0]

    def place(self, x: Array, folder: str) -> list[Kernel]:
        """The multiplying nodes of the optimised graph, from the runtime's own profile of a run.

        Two things of the profiled session differ, so that the profile shows whole weights:
        weights are not prepacked (a packed weight is no longer listed), and float convolutions
        stay out of the blocked layout, which pads channels. Which nodes run, and in which number
        type, is the same. Attention operators and Einsum are not counted.
        """
        options = self._options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "place")
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = _session(self._path, options, disabled_optimizers=["NchwcTransformer"])
        session.run([self.outputs[0].name], {self.inputs[0].name: x})
        trace = Path(session.end_profiling())
        events = json.loads(trace.read_text())
        trace.unlink()
        return kernels_of(events)

    def _options(self) -> Any:
        options = _package().SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = _package().GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


def kernels_of(events: list[dict[str, Any]]) -> list[Kernel]:
    """The multiplying nodes among the events of a profile, in the order of execution."""
    found = []
    for event in events:
        suffix, facts = "_kernel_time", event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith(suffix):
            continue
        op = facts["op_name"]
        if op not in WEIGHTS:
            continue
        inputs = [next(iter(i.items())) for i in facts["input_type_shape"]]
        (_, output), *_ = (next(iter(o.items())) for o in facts["output_type_shape"])
        types = (inputs[0][0], inputs[WEIGHTS[op]][0])
        integer = op in INTEGER_INSIDE or all(t.startswith(("int", "uint")) for t in types)
        macs = count_macs(op, [tuple(shape) for _, shape in inputs], tuple(output))
        found.append(Kernel(event["name"].removesuffix(suffix), op, integer, macs))
    return found


def count_macs(op: str, inputs: list[Shape], output: Shape) -> int:
    """Multiply-accumulates of one execution, from the shapes of all inputs and the first output.

    A convolution's weight is (out, in / groups, ...), a transposed one's (in, out / groups, ...),
    in either layout of the activations; a recurrent layer's are (directions, gates, width).
    """
    x, weight = inputs[0], inputs[WEIGHTS[op]]
    if op in CONVOLUTIONS:
        return size_of(output) * size_of(weight) // weight[0]
    if op in TRANSPOSED:
        return size_of(x) * size_of(weight) // weight[0]
    if op in RECURRENT:
        return x[0] * x[1] * (size_of(weight) + size_of(inputs[2]))
    if op in PACKED_PRODUCTS:
        return size_of(output) * x[-1]
    inner = weight[0] if len(weight) == 1 else size_of(weight[-2:]) // output[-1]
    return size_of(output) * inner


def _package() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ONNX Runtime is not installed: pip install onnxruntime"
        ) from None


def _session(path: str, options: Any, **more: Any) -> Any:
    return _package().InferenceSession(path, options, providers=["CPUExecutionProvider"], **more)


def _port(found: Any) -> Port:
    """From `tensor(float)` and symbolic axes to NumPy's dtype and None."""
    name = found.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    shape = tuple(a if isinstance(a, int) else None for a in found.shape)
    return Port(found.name, shape, dtype)
