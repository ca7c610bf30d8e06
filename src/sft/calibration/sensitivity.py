"""Layers that integers would ruin, found by measuring each alone."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from sft.core.progress import track
from sft.core.records import KEEP, Option, Plan
from sft.profiling.damage import divergence
from sft.quantizers.fake import ActivationFakeQuantize, Mode
from sft.quantizers.operators import CLAMPING, module_of, name_in, nearest_owner
from sft.surgery.quantize import QuantizedModel

DAMAGE = 0.1  # nats (or relative squared error) of the whole from which a culprit is looked for
SHARE = 0.25  # of that, from which one layer alone is a culprit
FEWEST_BITS = 7  # of a weight: coarser ones were asked for, and their damage is known
SAMPLES = 32


@torch.no_grad()
def find_sensitive(
    model: QuantizedModel,
    originals: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    reference: Tensor,
    outputs: Tensor,
) -> dict[str, str]:
    """Layers that are better left in float, with the reason in words; most often none.

    originals : float weights by parameter name. reference, outputs : what the float and the rounded
    network give for `inputs`. Only if rounding everything costs more than 0.1 nats is each layer of
    at least 7 bits rounded alone, its weight, input and output; one that costs a quarter of the
    whole is named.
    """
    whole = divergence(reference, outputs)
    if whole <= DAMAGE:
        return {}
    rounded = {name: weight.detach().clone() for name, (weight, _) in model.weights().items()}
    rows = {row.name for row in model.plan.rows}
    found: dict[str, str] = {}
    layers = [x for x in model.rounded_nodes() if x[2].bits >= FEWEST_BITS]
    for parameter, fake, rounding in track(layers, "layers rounded alone", len(layers)):
        name = str(parameter.target)
        _restore(model, originals)
        model.set_modes(Mode.PASS, Mode.PASS)
        model.graph_module.get_parameter(name).copy_(rounded[name])
        for activation in _around(model, fake):
            activation.mode = Mode.ROUND
        alone = _damage(model, inputs, reference)
        owner = nearest_owner(module_of(parameter), rows)
        if owner is not None and alone > max(SHARE * whole, SHARE * DAMAGE):
            found[owner] = (
                f"kept in float: rounded alone to {rounding.bits} bits it costs {alone:.3g} of the "
                f"{whole:.3g} that all layers cost together"
            )
    _restore(model, rounded)
    model.set_modes(Mode.ROUND, Mode.ROUND)
    return found


def keep_in_float(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """The plan with these layers in float, each row with its reason."""
    rows = tuple(
        dataclasses.replace(row, option=Option(KEEP, weight_bits=None), reason=reasons[row.name])
        if row.name in reasons and not row.option.rank
        else dataclasses.replace(
            row,
            option=dataclasses.replace(row.option, weight_bits=None),
            reason=reasons[row.name],
        )
        if row.name in reasons
        else row
        for row in plan.rows
    )
    return dataclasses.replace(plan, rows=rows)


def first_output(given: object) -> Tensor:
    """The tensor that a network gives, or the first of several."""
    first = given[0] if isinstance(given, tuple | list) else given
    assert isinstance(first, Tensor)
    return first


def _damage(model: QuantizedModel, inputs: Sequence[Tensor], reference: Tensor) -> float:
    left, outputs = SAMPLES, []
    for x in inputs:
        outputs.append(first_output(model(x[:left])))
        left -= len(outputs[-1])
        if left <= 0:
            break
    given = torch.cat(outputs)
    return divergence(reference[: len(given)], given)


def _restore(model: QuantizedModel, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        model.graph_module.get_parameter(name).copy_(value)


def _around(model: QuantizedModel, fake: Node) -> list[ActivationFakeQuantize]:
    """The roundings of what the layer of a rounded weight reads and of what it gives."""
    found: list[ActivationFakeQuantize] = []
    for layer in fake.users:
        nodes = [a for a in layer.args if isinstance(a, Node)]
        for user in layer.users:
            nodes += [user, *(user.users if name_in(CLAMPING, user) else ())]
        for node in nodes:
            module = model.graph_module.get_submodule(str(node.target)) if _calls(node) else None
            if isinstance(module, ActivationFakeQuantize):
                found.append(module)
    return found


def _calls(node: Node) -> bool:
    return node.op == "call_module"
