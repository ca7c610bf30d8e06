"""Ways to split a kernel. A new one is a file and a line here."""

from sft.decompositions.anchored import (
    AnchoredFactors,
    anchored_factors,
    restricted_anchored_factors,
)
from sft.decompositions.base import Decomposition, Factorization, decompositions
from sft.decompositions.channel_in import ChannelIn
from sft.decompositions.channel_out import ChannelOut
from sft.decompositions.factorize import factorize
from sft.decompositions.interpolative import Interpolative
from sft.decompositions.metric import Metric
from sft.decompositions.ranks import (
    rank_by_energy,
    rank_by_error,
    rank_by_evbmf,
    rank_by_objective,
)
from sft.decompositions.refine import data_error, refine
from sft.decompositions.regularized import RegularizedFactors, choose_rank, solve_regularized
from sft.decompositions.residual import Residual
from sft.decompositions.separable import Separable
from sft.decompositions.spatial import Spatial
from sft.decompositions.tucker2 import Tucker2

decompositions.add(ChannelIn.name, ChannelIn())
decompositions.add(ChannelOut.name, ChannelOut())
decompositions.add(Interpolative.name, Interpolative())
decompositions.add(Residual.name, Residual())
decompositions.add(Separable.name, Separable())
decompositions.add(Spatial.name, Spatial())
decompositions.add(Tucker2.name, Tucker2())

__all__ = [
    "AnchoredFactors",
    "Decomposition",
    "Factorization",
    "Metric",
    "RegularizedFactors",
    "anchored_factors",
    "choose_rank",
    "data_error",
    "decompositions",
    "factorize",
    "rank_by_energy",
    "rank_by_error",
    "rank_by_evbmf",
    "rank_by_objective",
    "refine",
    "restricted_anchored_factors",
    "solve_regularized",
]
