"""The factors of split layers, refined to the covariance of the patches that the original sees.

A menu takes that covariance as a product of two small ones; here it is gathered whole, for the
layers that were split and only a few at a time, so that memory stays bounded whatever the network.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sft.core.data import Loader
from sft.core.errors import InputError
from sft.core.kernels import KINDS, geometry_of
from sft.core.progress import track
from sft.decompositions import decompositions, factorize
from sft.layers.factorized import FactorizedSFT
from sft.profiling.held_out import batches
from sft.profiling.profile import trusted
from sft.profiling.statistics import gather_statistics
from sft.surgery.modules import get_module, replace_module

AT_A_TIME = 2**26  # numbers of patch covariances held at once: 512 MiB


class Fitting:
    """The batches of a loader that do not judge, as a loader."""

    def __init__(self, loader: Loader, device: torch.device, seed: int) -> None:
        self.loader, self.device, self.seed = loader, device, seed

    def __iter__(self) -> Iterator[Tensor]:
        return batches(self.loader, self.device, held_out=False, seed=self.seed)


def refine_factors(fitted: nn.Module, original: nn.Module, loader: Loader, seed: int) -> int:
    """Refine, in `fitted` itself, every split layer that alternating least squares can improve.

    original : with the dense layers under the same names, batch norm folded. loader : calibration
    inputs. A layer that sees too few positions of them stays as it is. Returns how many layers
    were refined. The factors are made anew from the original's weights.
    """
    names = refinable(fitted, original)
    refined = 0
    for group in track(_groups(original, names), "groups of layers refined", len(names)):
        device = next(original.parameters()).device
        data = Fitting(loader, device, seed)
        found, _ = gather_statistics(original, group, data, patch_covariances=group, seed=seed)
        known = trusted(found)
        refined += len(known)
        for name in known:
            split = get_module(fitted, name)
            assert isinstance(split, FactorizedSFT)
            dense = get_module(original, name)
            better = factorize(dense, split.scheme, split.rank, known[name], refine=True)
            replace_module(fitted, name, better.train(split.training))
    return refined


def refinable(fitted: nn.Module, original: nn.Module) -> list[str]:
    """Names of the split layers whose closed form is not the optimum yet."""
    known = dict(original.named_modules())
    return [
        name
        for name, module in fitted.named_modules()
        if isinstance(module, FactorizedSFT)
        and type(known.get(name)) in KINDS.values()
        and not module.geometry.pointwise
        and _refines(module.scheme)
    ]


def _refines(scheme: str) -> bool:
    try:
        return decompositions[scheme].refinable
    except InputError:
        return False


def _groups(original: nn.Module, names: list[str]) -> list[list[str]]:
    """The names in stretches whose patch covariances fit in memory together."""
    groups: list[list[str]] = []
    held = 0
    for name in names:
        whole = geometry_of(get_module(original, name))
        numbers = whole.groups * (whole.inputs // whole.groups * whole.taps) ** 2
        if not groups or held + numbers > AT_A_TIME:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += numbers
    return groups
