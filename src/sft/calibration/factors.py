"""What a split layer may do that a whole one cannot: choose its gauge.

Between two factors stands nothing, so ``(A R)(R^-1 B)`` is the same layer for any invertible R.
With orthonormal columns of A, errors in B reach the output as they are, none amplified. When B is
rounded, A is solved again for what is there (`refit`). This is one half of
`quantizers.quantize_factors`, with the rounding of activations taken in.
"""

import torch

from sft.core.records import Plan
from sft.quantizers.operators import nearest_owner
from sft.surgery.quantize import QuantizedModel


def factors_of(model: QuantizedModel, plan: Plan) -> dict[str, list[str]]:
    """The weights of every split layer, in the order in which they are applied."""
    split = {row.name for row in plan.rows if row.option.rank}
    found: dict[str, list[str]] = {}
    for name in model.weights():
        owner = nearest_owner(name.rpartition(".")[0], split)
        if owner is not None:
            found.setdefault(owner, []).append(name)
    return {owner: names for owner, names in found.items() if len(names) > 1}


@torch.no_grad()
def orthonormalize(model: QuantizedModel, plan: Plan) -> int:
    """Give pointwise last factors orthonormal columns, in place; how many there were.

    Only chains of two factors, whose last one is no wider than its outputs, without groups.
    """
    done = 0
    for names in factors_of(model, plan).values():
        first, second = (model.graph_module.get_parameter(n) for n in (names[0], names[-1]))
        chain = len(names) == 2 and names[0].endswith("first.weight")
        if not chain or second[0, 0].numel() != 1 or second.shape[1] != first.shape[0]:
            continue
        matrix = second.flatten(1).double()
        if matrix.shape[0] < matrix.shape[1]:
            continue
        basis, rest = torch.linalg.qr(matrix)
        sign = torch.sign(rest.diagonal() + 1e-300)  # keeps the channels as they were, if they may
        basis, rest = basis * sign, rest * sign[:, None]
        second.copy_(basis.view_as(second))
        first.copy_((rest @ first.flatten(1).double()).view_as(first))
        bias = dict(model.graph_module.named_parameters()).get(f"{names[0][:-6]}bias")
        if bias is not None:
            bias.copy_(rest @ bias.double())
        done += 1
    return done
