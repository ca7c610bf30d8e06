"""ResNet-18 and MobileNetV2 in 8 bits against the fastest of ONNX Runtime's own layouts.

Batch 1, one thread, all files in turn; medians decide, minima stand beside them. Weights are random
and calibration is on noise: these networks are timed, not scored.
"""

from quantization_files import Found, Settings, as_peer, export_file, quantize_dense
from quantization_peers import QUICK, measure_latency, write_peers
from speed_networks import SPEED_NETWORKS, make_noise

from sft.core.progress import say

IMAGES = 4
ROUNDS, QUICK_ROUNDS, RUNS = 60, 30, 3
SHORT = {"resnet18": "resnet18", "mobilenet-v2": "mobilenetv2"}


def measure(settings: Settings) -> Found:
    """Milliseconds of every file, and how many times as fast ours is as the best of the others."""
    found: Found = {}
    noise = make_noise(IMAGES)
    for network, make in SPEED_NETWORKS.items():
        say(f"{network}: our file and those of ONNX Runtime")
        model, name = make(), SHORT[network]
        folder = settings.folder / network
        ours = as_peer(export_file(quantize_dense(model, noise), "sft", folder, noise), "sft")
        files = [ours, *write_peers(model, noise, folder, QUICK)]
        latency = measure_latency(files, QUICK_ROUNDS if settings.quick else ROUNDS, RUNS)
        for file in files:
            median, least = latency[file.name]
            found[f"{name}_{file.name}_ms"], found[f"{name}_{file.name}_ms_min"] = median, least
        best = min(QUICK, key=lambda peer: latency[peer][0])
        found[f"{name}_best_ort"] = best
        found[f"speed_vs_ort_{name}"] = latency[best][0] / latency["sft"][0]
        found[f"speed_vs_ort_{name}_min"] = latency[best][1] / latency["sft"][1]
        found[f"speed_vs_fp32_{name}"] = latency["fp32"][0] / latency["sft"][0]
    return found
