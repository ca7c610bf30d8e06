"""The records that pass from step to step: frozen, printable, stored as JSON.

Every record that is stored on its own carries `format`, the version of its shape. Large arrays
never go into the JSON; a record that owns some says so and stores them beside it.

A *layer* is a module with a weight; an *option* is what may become of one layer; *damage* is the
expected loss of fidelity of an option (mean Kullback-Leibler divergence from the original, in
nats, where the outputs are logits); a *plan* holds one option per layer.
"""

from sft.core.records.artifacts import Artifact, Check, Layout, Target, Timing
from sft.core.records.layers import DENSE, KEEP, STORED, Cost, Inspection, Layer, Option, totals
from sft.core.records.plans import Front, FrontPoint, Plan, PlanRow
from sft.core.records.profiles import Anchor, Candidate, LayerProfile, Profile
from sft.core.records.record import FORMAT, Record

__all__ = [
    "DENSE",
    "FORMAT",
    "KEEP",
    "STORED",
    "Anchor",
    "Artifact",
    "Candidate",
    "Check",
    "Cost",
    "Front",
    "FrontPoint",
    "Inspection",
    "Layer",
    "LayerProfile",
    "Layout",
    "Option",
    "Plan",
    "PlanRow",
    "Profile",
    "Record",
    "Target",
    "Timing",
    "totals",
]
