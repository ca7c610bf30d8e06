"""Train the two keyword networks of the benchmarks on synthetic speech (espeak-ng is needed).

    python examples/train_keyword_networks.py --out build/keywords

The recipe: AdamW, batch 60, weight decay 0.02 on kernels only, the learning rate rises to its peak
over the first 15 % of the steps and falls as a cosine to zero, label smoothing 0.05; each pass
hears every train clip at a new moment, loudness and noise level. One thread, so that the same seed
gives the same weights. The validation voices watch progress; the schedule is fixed beforehand and
the last weights are kept, so they choose nothing here. The test voices are heard once, at the end.

Writes `keywords_waveform.safetensors` and `keywords_spectrogram.safetensors`, and prints.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from sft.core.data import Loader, top1

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from keyword_networks import NETWORKS
from keywords import keyword_data

BATCH, DECAY, SMOOTHING, RISING = 60, 0.02, 0.05, 0.15
PEAK_RATE = {"waveform": 4e-3, "spectrogram": 2e-3}
EPOCHS = {"waveform": 18, "spectrogram": 20}


def main() -> None:
    options = _parse()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        started = time.monotonic()
        data = keyword_data(options.data, name, options.seed, BATCH)
        print(f"{name}: data ready after {time.monotonic() - started:.0f} s", flush=True)
        network = _train(name, data.split("train")[0], data.split("validation")[0], options)
        weights = {k: v.contiguous() for k, v in network.state_dict().items()}
        save_file(weights, options.out / f"keywords_{name}.safetensors")
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name}: {parameters} parameters, {(time.monotonic() - started) / 60:.1f} min")
        print(f"{name}: test accuracy {top1(network, data.split('test')[0]):.4f}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/keywords"))
    parser.add_argument("--data", type=Path, help="folder of the synthesised clips")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, help="passes over the train clips")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _train(name: str, train: Loader, validation: Loader, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    network = NETWORKS[name]()
    optimizer = _optimizer(network)
    epochs = options.epochs or EPOCHS[name]
    total = epochs * len(train)
    step = 0
    for epoch in range(epochs):
        network.train()
        for x, labels in train:
            _set_rate(optimizer, PEAK_RATE[name], step / total)
            loss = functional.cross_entropy(network(x), labels, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            step += 1
        network.eval()
        with torch.no_grad():
            score = top1(network, validation)
        print(f"{name}: epoch {epoch} loss {loss:.3f} validation accuracy {score:.4f}", flush=True)
    return network


def _optimizer(network: nn.Module) -> torch.optim.AdamW:
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": kernels, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    )


def _set_rate(optimizer: torch.optim.AdamW, peak: float, done: float) -> None:
    falling = 0.5 * (1 + math.cos(math.pi * (done - RISING) / (1 - RISING)))
    for group in optimizer.param_groups:
        group["lr"] = peak * (done / RISING if done < RISING else falling)


if __name__ == "__main__":
    main()
