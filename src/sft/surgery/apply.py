"""A plan and a model in, a factorised model out."""

import torch
from torch import nn

from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, Plan
from sft.decompositions import decompositions, factorize
from sft.models.inspect import inspect
from sft.planning.edit import check_plan
from sft.surgery.modules import fold_batch_norm, get_module, replace_module


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Split the layers that the plan splits; weights stay float here.

    Batch norm is folded first. Returns a new model in eval mode; `model` is untouched. Every row
    is checked before anything is built; an `InputError` names the layer and its shape.
    """
    if not plan.input_shape:
        raise InputError("The plan does not say the model's input shape. Make it with `plan`.")
    example = torch.zeros(1, *plan.input_shape, device=_device(model))
    _check(model, plan, example)
    small = fold_batch_norm(model, example)
    for row in plan.rows:
        option = row.option
        if option.scheme in (KEEP, DENSE):
            continue
        layer = get_module(small, row.name)
        statistics = (plan.statistics or {}).get(row.name)
        replace_module(small, row.name, factorize(layer, option.scheme, option.rank[0], statistics))
    return small


def _check(model: nn.Module, plan: Plan, example: torch.Tensor) -> None:
    """Every row fits the model, and every layer has its row."""
    layers = inspect(model, example, plan.model).layers
    refusals = {layer.name: layer.refusals.get("*") for layer in layers}
    for row in plan.rows:
        scheme = row.option.scheme
        if scheme in (KEEP, DENSE):
            continue
        layer = get_module(model, row.name)
        reason = refusals.get(row.name) or decompositions[scheme].unsupported(layer)
        if reason is not None:
            shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
            raise InputError(
                f"Layer '{row.name}' with weight {shape} cannot be '{scheme}': {reason}. "
                f'Set its scheme to "dense" or "keep".'
            )
    check_plan(plan, layers, {name: decompositions[name].full_rank for name in decompositions})


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
