"""Two factors in 4 and 3 bits on real layers: what rounding adds to the error of the outputs.

Each layer of one group is split on its output side at the rank of half its multiplications. The
baseline rounds the balanced split to nearest; `quantize_factors` fits the factors to each other
and to the data. Both are judged on the covariance of images that neither has seen. A layer that
read fewer positions than a patch has entries is left out: its covariance, and so the split itself,
would be one of those images only (EfficientNet-Lite0's classifier, one position a photo).
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator

from efficientnet_lite import load_efficientnet_lite0
from photos import load_photos
from quantization_files import Found, Settings, fashion_images
from torch import Tensor, nn

import sft
from sft.core.kernels import geometry_of, to_canonical
from sft.core.progress import say
from sft.decompositions import decompositions
from sft.profiling.statistics import gather_statistics
from sft.quantizers import balanced_nearest, excess, quantize_factors
from sft.surgery.modules import fold_batch_norm

SMALLEST, LANE = 16, 8
EVERY = 3  # of EfficientNet-Lite0's layers, in a quick run
IMAGES, PHOTOS = 512, 100
BITS = (4, 3)


@dataclasses.dataclass(frozen=True)
class SplitLayer:
    """A kernel ``(O, D)`` with factors ``(O, r)`` and ``(r, D)``, and covariances ``(D, D)``."""

    name: str
    weight: Tensor
    a: Tensor
    b: Tensor
    seen: Tensor
    held_out: Tensor


def measure(settings: Settings) -> Found:
    """By bits: one less our summed excess over the baseline's, the lower of both networks."""
    fashion = sft.load_model("fashion-resnet")
    lite, photos = load_efficientnet_lite0(), load_photos("calibration")[:PHOTOS]
    others = load_photos("test")[:PHOTOS]
    found = _network("fashion", fashion, fashion_images(0, IMAGES), fashion_images(IMAGES, IMAGES))
    found |= _network("efflite0", lite, photos, others, EVERY if settings.quick else 1)
    for bits in BITS:
        cuts = [float(found[f"factors_{name}_cut_{bits}bit"]) for name in ("fashion", "efflite0")]
        found[f"factor_excess_cut_{bits}bit"] = min(cuts)
    return found


def _network(
    name: str, network: nn.Module, seen: Tensor, held_out: Tensor, every: int = 1
) -> Found:
    """The excess of both ways, summed over the layers of one network; medians of the cuts."""
    ours: dict[int, list[float]] = {bits: [] for bits in BITS}
    theirs: dict[int, list[float]] = {bits: [] for bits in BITS}
    for layer in _split(network, seen, held_out, every):
        for bits in BITS:
            fitted = quantize_factors(layer.a, layer.b, layer.seen, bits, bits, weight=layer.weight)
            plain = balanced_nearest(layer.a, layer.b, bits, bits)
            ours[bits].append(_excess(layer, fitted.product()))
            theirs[bits].append(_excess(layer, plain.product()))
    found: Found = {f"factors_{name}_layers": len(ours[BITS[0]])}
    for bits in BITS:
        cuts = [1 - o / t for o, t in zip(ours[bits], theirs[bits], strict=True)]
        found[f"factors_{name}_cut_{bits}bit"] = 1 - sum(ours[bits]) / sum(theirs[bits])
        found[f"factors_{name}_median_cut_{bits}bit"] = statistics.median(cuts)
        found[f"factors_{name}_least_cut_{bits}bit"] = min(cuts)
        found[f"factors_{name}_excess_{bits}bit"] = statistics.fmean(ours[bits])
        found[f"factors_{name}_baseline_excess_{bits}bit"] = statistics.fmean(theirs[bits])
    return found


def _excess(layer: SplitLayer, product: Tensor) -> float:
    return excess(layer.weight, product.double(), layer.a @ layer.b, layer.held_out)


def _split(network: nn.Module, seen: Tensor, held_out: Tensor, every: int) -> Iterator[SplitLayer]:
    """Layers of one group with at least `SMALLEST` outputs and entries, split at half the MACs."""
    folded = fold_batch_norm(network, seen[:1])
    names = [n for n, m in folded.named_modules() if _fits(m)][::every]
    known, new = (
        gather_statistics(folded, names, sft.Batches(x, batch_size=25), patch_covariances=names)[0]
        for x in (seen, held_out)
    )
    for name in names:
        if known[name].count < known[name].patch_mean.shape[1]:
            say(f"{name} is left out: it read only {known[name].count} positions")
            continue
        layer = folded.get_submodule(name)
        geometry = geometry_of(layer)
        kernel = to_canonical(layer.weight.detach(), geometry).double()
        weight = kernel[0].flatten(1)
        outputs, entries = weight.shape
        half = outputs * entries / (2 * (outputs + entries))
        rank = max(LANE, math.floor(half / LANE) * LANE)
        split = decompositions["channel_out"].analyse(kernel, geometry, known[name])
        first, second = split.factors((rank,))
        moments = [own[name].full_covariance() for own in (known, new)]
        yield SplitLayer(
            name, weight, second[0, :, :, 0], first[0].flatten(1), *(m[0] for m in moments)
        )


def _fits(layer: nn.Module) -> bool:
    if type(layer) not in (nn.Conv2d, nn.Linear) or getattr(layer, "groups", 1) > 1:
        return False
    return min(len(layer.weight), layer.weight[0].numel()) >= SMALLEST
