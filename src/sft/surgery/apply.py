"""A plan and a model in, a factorised model out."""

from collections.abc import Callable

import torch
from torch import nn

from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, STORED, Layer, Plan
from sft.decompositions import decompositions, factorize
from sft.models.inspect import inspect
from sft.planning.edit import check_plan
from sft.surgery.modules import (
    fold_batch_norm,
    get_module,
    open_all_recurrent,
    replace_module,
)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Split the layers that the plan splits; weights stay float here.

    Batch norm is folded first, and a recurrent module of which a weight is split or planned in
    integers is opened into linear maps (`layers.open_recurrent`); one whose weights are all kept or
    stored stays whole. Returns a new model in eval mode;
    `model` is untouched.
    Every row is checked before anything is built; an `InputError` names the layer and its shape.
    """
    if not plan.input_shape:
        raise InputError("The plan does not say the model's input shape. Make it with `plan`.")
    example = _example(plan, _device(model))
    whole = (KEEP, DENSE, STORED)
    split = {row.name: row.option for row in plan.rows if row.option.scheme not in whole}
    _check(open_all_recurrent(model)[0], plan, example)
    small, closed = open_all_recurrent(fold_batch_norm(model, example))
    for name, option in split.items():
        layer = get_module(small, name)
        statistics = (plan.statistics or {}).get(name)
        replace_module(small, name, factorize(layer, option.scheme, option.rank, statistics))
    changed = [row.name for row in plan.rows if row.option.scheme not in (KEEP, STORED)]
    for name, module in closed.items():
        if not any(each.startswith(f"{name}.") for each in changed):
            replace_module(small, name, module)
    return small


def _example(plan: Plan, device: torch.device) -> torch.Tensor:
    """One sample of zeros; an `InputError` says the shape where there can be no such tensor."""
    try:
        return torch.zeros(1, *plan.input_shape, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The plan's input_shape {plan.input_shape} cannot be used: {reason} Correct it."
        ) from None


def _check(model: nn.Module, plan: Plan, example: torch.Tensor) -> None:
    """Every row fits the model, and every layer has its row."""
    layers = inspect(model, example, plan.model).layers
    refusals = {layer.name: layer.refusals.get("*") for layer in layers}
    for row in plan.rows:
        scheme = row.option.scheme
        if scheme in (KEEP, DENSE, STORED) or scheme not in decompositions:
            continue
        layer = get_module(model, row.name)
        reason = refusals.get(row.name) or decompositions[scheme].unsupported(layer)
        if reason is not None:
            shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
            raise InputError(
                f"Layer '{row.name}' with weight {shape} cannot be '{scheme}': {reason}. "
                f'Set its scheme to "dense" or "keep".'
            )
    check_plan(plan, layers, {name: _full_rank_by(name) for name in decompositions})


def _full_rank_by(scheme: str) -> Callable[[Layer], tuple[int, ...]]:
    def full_rank(layer: Layer) -> tuple[int, ...]:
        assert layer.geometry is not None
        return decompositions[scheme].full_rank(layer.geometry)

    return full_rank


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
