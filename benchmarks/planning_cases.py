"""The two networks that are planned: profile, held-out images, and what a plan's file does."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import onnx
import torch
from efficientnet_lite import load_efficientnet_lite0
from onnx import TensorProto
from photos import load_other_pictures, load_photos
from torch import Tensor, nn

import sft
from sft.core.records import Artifact, Candidate, Cost, LayerProfile, Plan, PlanRow, Profile, totals
from sft.profiling.damage import divergence
from sft.runtimes.runner import Runner

TARGET, RUNTIME = "onnxruntime", "onnxruntime"
PHOTOS, FASHION_JUDGED = 100, 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with its data. judged : images that damage is measured on; none is calibrated on.

    budget : size of the random plans, of the float original. sizes : those of the comparison, of
    a file that has all layers whole in 8 bits. shown : inputs that files are quantised with, where
    they are fewer than the profile saw. begun : where an interrupted profile goes on.
    """

    name: str
    model: nn.Module
    data: sft.Data
    judged: Tensor
    folder: Path
    budget: float
    sizes: tuple[float, ...]
    shown: sft.Batches | None = None
    begun: Path | None = None

    @cached_property
    def profile(self) -> Profile:
        resume = None if self.begun is None else self.begun / self.name
        return sft.profile(self.model, self.data, TARGET, name=self.name, resume=resume)

    @cached_property
    def reference(self) -> Tensor:
        """The outputs of the exported original."""
        original = sft.export(
            self.model, None, self.folder / f"{self.name}.onnx", TARGET, example=self.judged[:1]
        )
        return outputs_of(original, self.judged)

    def build(self, plan: Plan) -> Artifact:
        """The plan's file: split, quantised, exported; nothing is trained.

        One that an interrupted run has left in the folder is taken from there.
        """
        options = " ".join(str(row.option) for row in plan.rows)
        path = self.folder / f"{self.name}-{sha256(options.encode()).hexdigest()[:12]}.onnx"
        note = path.with_suffix(".json")
        if note.is_file():
            return Artifact.load(note)
        small = sft.apply(self.model, plan)
        rounded = sft.quantize(small, plan, TARGET, self.shown or self.data.calibration)
        artifact = sft.export(rounded, plan, path, TARGET)
        artifact.save(note)
        return artifact

    def damage(self, artifact: Artifact) -> float:
        """Measured divergence of a file from the original's file, in nats a sample."""
        return divergence(self.reference, outputs_of(artifact, self.judged))

    def plan_of(self, chosen: Sequence[Candidate], reason: str) -> Plan:
        """A plan of one candidate a layer."""
        p = self.profile
        rows = tuple(
            PlanRow(entry.layer.name, c.option, c.damage, c.cost, reason)
            for entry, c in zip(p.layers, chosen, strict=True)
        )
        rest = Cost(0, p.overhead_macs, 0, p.overhead_latency, p.overhead_memory)
        whole = totals({"": rest} | {row.name: row.cost for row in rows})
        return Plan(
            p.model, p.target, {}, rows, whole, p.original, "edited",
            sum(c.damage for c in chosen), 0.0, 0.0,
            input_shape=p.input_shape, statistics=p.statistics,
        )  # fmt: skip


def fashion(folder: Path) -> Case:
    """The embedded network; judged on validation images."""
    data = sft.load_data("fashion-mnist", "fashion-resnet")
    images = torch.cat([x for x, _ in data.split("validation")[0]])[:FASHION_JUDGED]
    model = sft.load_model("fashion-resnet")
    sizes = (0.3, 0.2, 0.15)
    return Case("fashion-resnet", model, data, images, folder, 0.08, sizes)


def efficientnet(folder: Path) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights; calibrated on some photos, judged on others."""
    calibration = torch.cat([load_photos("calibration"), load_other_pictures()])
    data = sft.Data(calibration=sft.Batches(calibration, batch_size=25))
    sizes = (0.7, 0.6, 0.5)
    model = load_efficientnet_lite0()
    judged = load_photos("test", crops=1)
    shown = sft.Batches(calibration[:: len(calibration) // PHOTOS], batch_size=25)
    return Case("efficientnet-lite0", model, data, judged, folder, 0.17, sizes, shown)


CASES: dict[str, Callable[[Path], Case]] = {
    "fashion-resnet": fashion,
    "efficientnet-lite0": efficientnet,
}


def outputs_of(artifact: Artifact, images: Tensor) -> Tensor:
    with Runner(artifact.path, RUNTIME) as runner:
        return torch.from_numpy(runner.run(images.numpy()))


def integers(entry: LayerProfile) -> list[Candidate]:
    """The candidates that multiply in integers."""
    floats = ("keep", "stored")
    found = [c for c in entry.candidates if c.option.scheme not in floats and c.option.weight_bits]
    return found or [c for c in entry.candidates if c.option.scheme == "keep"]


def stored_tensor_bytes(path: str | Path) -> int:
    """Bytes of all weights, their scales and all biases in an ONNX file."""
    graph = onnx.load(path).graph
    readers: dict[str, list[tuple[str, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node.op_type, place))
    total = 0
    for tensor in graph.initializer:
        reading = readers.get(tensor.name, [])
        weight = len(tensor.dims) >= 2
        scale = len(tensor.dims) == 1 and ("DequantizeLinear", 1) in reading
        bias = any(op in ("Conv", "Gemm") and place == 2 for op, place in reading)
        if tensor.data_type == TensorProto.INT32:  # a bias in integers; its scale is not counted
            bias = True
        if weight or bias or (scale and not _of_bias(graph, tensor.name)):
            total += len(tensor.raw_data)
    return total


def _of_bias(graph: onnx.GraphProto, scale: str) -> bool:
    """Whether a scale belongs to a bias that is held as int32."""
    kinds = {t.name: t.data_type for t in graph.initializer}
    return any(
        n.op_type == "DequantizeLinear"
        and n.input[1] == scale
        and kinds.get(n.input[0]) == TensorProto.INT32
        for n in graph.node
    )
