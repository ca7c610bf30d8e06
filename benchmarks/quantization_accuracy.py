"""Accuracy at 8, 4 and 3 bits: files scored by ONNX Runtime on all 10,000 test images.

The embedded fashion-resnet is quantised after training, without labels. The depthwise network is
too; at 4 bits it is also trained, with the float network as teacher and unlabelled images. The
number of steps and the learning rate are fixed beforehand; the test images only score.
"""

from pathlib import Path

from depthwise_network import load_fashion_mobilenet
from quantization_files import (
    Found,
    Settings,
    accuracy_of,
    as_peer,
    bits_of,
    export_file,
    fashion_images,
    quantize_dense,
)
from quantization_peers import measure_latency
from torch import Tensor, nn

import sft
from sft.core.data import Loader
from sft.core.progress import say
from sft.exporters.packed import save_packed
from sft.models.zoo.augment import augment
from sft.surgery.quantize import QuantizedModel

TRAINED = Path(__file__).parent / "networks" / "fashion_mobilenet_w4.safetensors"
CALIBRATION = 512
BATCH, LEARNING_RATE = 64, 1e-3
QUICK_STEPS = 100
ROUNDS, QUICK_ROUNDS, RUNS = 60, 30, 20


def measure(settings: Settings) -> Found:
    """Drops in points, bytes and milliseconds of the files of both networks."""
    test = sft.load_data("fashion-mnist").split("test")[0]
    images = fashion_images(0, CALIBRATION)
    return _fashion(settings, images, test) | measure_depthwise(settings)


def _fashion(settings: Settings, images: Tensor, test: Loader) -> Found:
    network, folder = sft.load_model("fashion-resnet"), settings.folder / "fashion"
    original = export_file(network, "fp32", folder, images)
    before = accuracy_of(original, test)
    found: Found = {"fashion_fp32_accuracy": before, "fashion_fp32_bytes": original.file_bytes}
    files = {}
    for bits in (8, 4, 3):
        name = f"fashion_w{bits}a8"
        say(f"fashion-resnet in {bits} bits")
        files[bits] = export_file(quantize_dense(network, images, bits), name, folder, images)
        stored, computed = bits_of(files[bits])
        found[f"{name}_accuracy"] = accuracy_of(files[bits], test)
        found[f"{name}_drop"] = before - float(found[f"{name}_accuracy"])
        found[f"{name}_bytes"] = files[bits].file_bytes
        found[f"{name}_storage_bits"], found[f"{name}_compute_bits"] = stored, computed
    named = [as_peer(original, "fp32"), as_peer(files[8], "w8"), as_peer(files[4], "w4")]
    latency = measure_latency(named, QUICK_ROUNDS if settings.quick else ROUNDS, RUNS)
    for name, (median, least) in latency.items():
        found[f"fashion_{name}_ms"], found[f"fashion_{name}_ms_min"] = median, least
    found["w4_over_w8_bytes"] = files[4].file_bytes / files[8].file_bytes
    found["w4_over_w8_speed"] = latency["w8"][0] / latency["w4"][0]
    return found


def measure_depthwise(settings: Settings) -> Found:
    """Accuracies and drops of the depthwise network: 8 bits, 4 bits, 4 bits trained."""
    test = sft.load_data("fashion-mnist").split("test")[0]
    images = fashion_images(0, CALIBRATION)
    network, folder = load_fashion_mobilenet(), settings.folder / "depthwise"
    before = accuracy_of(export_file(network, "fp32", folder, images), test)
    found: Found = {"depthwise_fp32_accuracy": before}
    eight, four = (quantize_dense(network, images, bits) for bits in (8, 4))
    trained, how = _trained(settings, four, network)
    print(f"depthwise network, W4A8: {how}")
    found["depthwise_qat"] = how
    variants = {"w8a8": eight, "w4a8_untrained": four, "qat_w4a8": trained}
    for name, model in variants.items():
        artifact = export_file(model, name, folder, images)
        found[f"depthwise_{name}_accuracy"] = accuracy_of(artifact, test)
        found[f"depthwise_{name}_drop"] = before - float(found[f"depthwise_{name}_accuracy"])
        found[f"depthwise_{name}_bytes"] = artifact.file_bytes
    return found


def _trained(
    settings: Settings, four: QuantizedModel, teacher: nn.Module
) -> tuple[QuantizedModel, str]:
    """The network in 4 bits after training, and how it came about."""
    if settings.quick and TRAINED.exists():
        return sft.load(TRAINED, teacher), "trained in the full run"
    steps = QUICK_STEPS if settings.quick else settings.qat_steps
    train = sft.Batches(fashion_images(0, None), None, BATCH, shuffle=True, transform=augment)
    trained = sft.finetune(four, train, teacher, steps=steps, learning_rate=LEARNING_RATE)
    if not settings.quick:
        save_packed(trained, TRAINED)
    return trained, f"trained in this run, {steps} steps of {BATCH} of {len(train.inputs)} images"
