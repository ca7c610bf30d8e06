"""Ways to split a kernel. A new one is a file and a line here."""

from sft.decompositions.base import Decomposition, decompositions
from sft.decompositions.channel_in import ChannelIn
from sft.decompositions.channel_out import ChannelOut
from sft.decompositions.factorize import factorize
from sft.decompositions.regularized import RegularizedFactors, choose_rank, solve_regularized

decompositions.add(ChannelIn.name, ChannelIn())
decompositions.add(ChannelOut.name, ChannelOut())

__all__ = [
    "Decomposition",
    "RegularizedFactors",
    "choose_rank",
    "decompositions",
    "factorize",
    "solve_regularized",
]
