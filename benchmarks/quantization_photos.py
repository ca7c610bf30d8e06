"""EfficientNet-Lite0 with its ImageNet weights in 8 bits, beside ONNX Runtime's and NNCF's files.

All are calibrated on the same photos and judged on others, as files: agreement with the first
choice of the exported fp32 file, and SQNR of the logits against its logits. The loss of a file is
its SQNR below that of full-range weights computed without saturation (the float simulation of the
layout for VNNI). Where the machine has VNNI, the file for machines without it is made too, and,
where an emulator of such a machine is installed, run in it.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nncf_peer
import numpy as np
import onnxruntime_peer
import torch
from efficientnet_lite import load_efficientnet_lite0
from photos import load_photos
from quantization_files import (
    Found,
    Settings,
    as_peer,
    export_file,
    logits_of,
    quantize_dense,
    saturating_pairs,
    sqnr_db,
)
from quantization_peers import PeerFile, measure_accuracy, write_peers
from torch import Tensor

from sft.core.progress import say
from sft.runtimes.runner import Runner
from sft.runtimes.targets import find_target, instruction_set

FULL_RANGE, MENDED = "onnxruntime-vnni", "onnxruntime-avx2"
PEERS = (*onnxruntime_peer.LAYOUTS, *nncf_peer.SETTINGS)
QUICK_PEERS = ("ort-u8s8-7bit", "ort-s8s8", "ort-u8s8", "nncf-onnx-accurate")
PHOTOS = 100
EMULATOR, EMULATED = "qemu-x86_64", 8
SCRIPT = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
name, images = session.get_inputs()[0].name, numpy.load(sys.argv[2])
numpy.save(sys.argv[3], numpy.concatenate([session.run(None, {name: x[None]})[0] for x in images]))
"""


def measure(settings: Settings) -> Found:
    """SQNR in dB and agreement in percent of our file and of every peer's."""
    network, folder = load_efficientnet_lite0(), settings.folder / "photos"
    calibration = load_photos("calibration")[:PHOTOS]
    images = load_photos("test", crops=1 if settings.quick else 3)
    folder.mkdir(parents=True)
    original = export_file(network, "float", folder, calibration)
    with Runner(original.path, "onnxruntime") as runner:
        wanted = torch.from_numpy(runner.run(images.numpy()))
    found: Found = {"photos_calibration": len(calibration), "photos_test": len(images)}
    here = find_target("onnxruntime").name
    targets = dict.fromkeys((here, FULL_RANGE, *((MENDED,) if instruction_set() == "vnni" else ())))
    files, simulated = {}, {}
    for target in targets:
        say(f"EfficientNet-Lite0 for {target}")
        model = quantize_dense(network, calibration, 8, target)
        simulated[target] = sqnr_db(logits_of(model, images), wanted)
        files[target] = as_peer(export_file(model, target, folder, images), target)
        found[f"efflite0_{target}_simulated_sqnr_db"] = simulated[target]
        found[f"efflite0_{target}_saturating_pairs"] = saturating_pairs(model)
    sqnr, agreement = measure_accuracy(files[here], images, wanted)
    found["efflite0_sqnr_db"], found["efflite0_agreement"] = sqnr, 100 * agreement
    found["efflite0_bytes"] = files[here].file_bytes
    found["efflite0_sqnr_loss_db"] = simulated[FULL_RANGE] - sqnr
    if MENDED in simulated:
        found["efflite0_avx2_sqnr_loss_db"] = simulated[FULL_RANGE] - simulated[MENDED]
        found |= _emulate(files, images[:EMULATED], wanted[:EMULATED], folder)
    names = QUICK_PEERS if settings.quick else PEERS
    return found | _peers(names, calibration, images, wanted, folder)


def _peers(
    names: Sequence[str], calibration: Tensor, images: Tensor, wanted: Tensor, folder: Path
) -> Found:
    """Every peer's file on the same images, and the best SQNR and agreement among them."""
    found: Found = {}
    scores: dict[str, tuple[float, float]] = {}
    network = load_efficientnet_lite0()
    for file in write_peers(network, calibration, folder, names):
        if file.name == "fp32":
            continue
        scores[file.name] = measure_accuracy(file, images, wanted)
        sqnr, agreement = scores[file.name]
        say(f"{file.name}: {sqnr:.2f} dB, {100 * agreement:.2f} %")
        found[f"efflite0_{file.name}_sqnr_db"] = sqnr
        found[f"efflite0_{file.name}_agreement"] = 100 * agreement
        found[f"efflite0_{file.name}_bytes"] = file.file_bytes
    found["efflite0_best_peer_sqnr_db"] = max(sqnr for sqnr, _ in scores.values())
    found["efflite0_best_peer_agreement"] = 100 * max(share for _, share in scores.values())
    return found


def _emulate(files: dict[str, PeerFile], images: Tensor, wanted: Tensor, folder: Path) -> Found:
    """Each file in an emulated machine without VNNI; nothing where no emulator is installed."""
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        return {}
    given, script = folder / "emulated.npy", folder / "emulated.py"
    np.save(given, images.numpy())
    script.write_text(SCRIPT)
    found: Found = {}
    for target in (FULL_RANGE, MENDED):
        say(f"{target} in an emulator without VNNI")
        out = folder / f"{target}.npy"
        given_to = [str(script), str(files[target].path), str(given), str(out)]
        done = subprocess.run(
            [emulator, "-cpu", "max", sys.executable, *given_to], capture_output=True, text=True
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            say(f"the emulator failed: {said[-1]}")
            return {}
        found[f"efflite0_{target}_emulated_sqnr_db"] = sqnr_db(
            torch.from_numpy(np.load(out)), wanted
        )
    return found
