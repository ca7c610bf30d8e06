"""What quantising costs: seconds beside ONNX Runtime's and NNCF's, and memory by samples.

ResNet-18 on 100 noise images of 224 x 224, one tool after the other, each in a process of its own
on the same processors. Memory is the greatest that a process held which quantised ResNet-18 on
100, 400 and 1,600 noise images of 64 x 64.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peer_process import peak_bytes, save_images
from quantization_files import Found, Settings, dense_plan, export_file
from quantization_peers import write_peers
from speed_networks import make_noise, make_resnet18
from torch import Tensor

import sft
from sft.core.progress import say

IMAGES, QUICK_IMAGES = 100, 25
SAMPLES = (100, 400, 1600)
PEERS = {"ort-u8s8": "ort", "nncf-onnx": "nncf"}


def measure(settings: Settings) -> Found:
    """Seconds of each tool, and MiB by the number of samples."""
    folder = settings.folder / "cost"
    folder.mkdir(parents=True)
    count = QUICK_IMAGES if settings.quick else IMAGES
    noise = make_noise(count)
    found: Found = {"ptq_images": count}
    with _processors(settings.threads):
        images = save_images(noise.numpy(), folder)
        own = _child(settings.threads, "seconds", str(images), str(folder))
        found["ptq_seconds_resnet18"] = own["quantize"]
        found["ptq_and_export_seconds_resnet18"] = own["quantize"] + own["export"]
        for file in write_peers(make_resnet18(), noise, folder, tuple(PEERS)):
            if file.name in PEERS:
                found[f"ptq_seconds_resnet18_{PEERS[file.name]}"] = file.seconds
        peers = [float(found[f"ptq_seconds_resnet18_{name}"]) for name in PEERS.values()]
        found["ptq_seconds_resnet18_slower_peer"] = max(peers)
        for samples in SAMPLES:
            peak = _child(settings.threads, "memory", str(samples))["peak_mib"]
            found[f"ptq_peak_mib_{samples}"] = peak
    return found


def measure_seconds(images: str, folder: str) -> dict[str, float]:
    """Of `quantize` on stored images, and of `export` after it.

    Both start from the folded network: the peers start from an exported one, which is folded too.
    """
    import numpy as np

    noise = torch.from_numpy(np.load(images))
    network = make_resnet18()
    plan = dense_plan(network, noise[:1], 8)
    folded, batches = sft.apply(network, plan), sft.Batches(noise, batch_size=50)
    started = time.perf_counter()
    model = sft.quantize(folded, plan, plan.target, batches)
    quantized = time.perf_counter()
    export_file(model, "sft", Path(folder), noise)
    return {"quantize": quantized - started, "export": time.perf_counter() - quantized}


def measure_memory(samples: str) -> dict[str, float]:
    """MiB that this process held at most after `quantize` with so many samples."""
    network, drawn = make_resnet18(), _Drawn(int(samples))
    plan = dense_plan(network, next(iter(drawn))[:1], 8)
    sft.quantize(sft.apply(network, plan), plan, plan.target, drawn)
    return {"peak_mib": peak_bytes() / 2**20}


CHILDREN = {"seconds": measure_seconds, "memory": measure_memory}


class _Drawn:
    """Batches of noise images, each made when it is asked for; only one is ever held."""

    def __init__(self, samples: int, batch: int = 50) -> None:
        self.samples, self.batch = samples, batch

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.samples, self.batch):
            count = min(self.batch, self.samples - start)
            yield torch.randn(count, 3, 64, 64, generator=generator)


@contextlib.contextmanager
def _processors(count: int) -> Iterator[None]:
    """Inside, this process and those it starts have so many processors, and say so to OpenMP."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if allowed:
        os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _child(threads: int, kind: str, *arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, str(threads), kind, *arguments]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "memory" else {}
    done = subprocess.run(
        command, env={**os.environ, **settings}, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{kind} {arguments[0]}: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement, for `quantization.py`.")
    parser.add_argument("threads", type=int)
    parser.add_argument("kind", choices=sorted(CHILDREN))
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(CHILDREN[options.kind](*options.arguments)))


if __name__ == "__main__":
    main()
