"""A layer solved again for what it will read: inputs in integers, behind layers in integers.

What the layers before have lost is mended as far as a linear map can mend it; then the layer itself
is rounded (`profiling.regression`, with rounding in place of low rank).
"""

from torch import Tensor
from torch.fx import Node

from sft.calibration.walk import Walk
from sft.core.geometry import Geometry
from sft.profiling.regression import solve_rows


def refit(
    walk: Walk, node: Node, rows: Tensor, geometry: Geometry, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Rows ``(G, o, D)`` that give the float outputs from the rounded inputs, and their bias.

    None where there are too few positions to tell.
    """
    data = node.args[0]
    assert isinstance(data, Node)
    walk.plain[node] = walk.run(node, walk.plain, rounding=False)
    return solve_rows(rows, geometry, walk.rounded[data], walk.plain[node], seed)
