"""SFT (Structured Filter Transform): trained convolutional networks, small and fast, with proof.

`sft.compress` runs the whole way; the other verbs are its steps. Everything is imported when it is
first used, so `import sft` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "sft.core.records",
    "Batches": "sft.core.data",
    "Budget": "sft.core.budget",
    "Check": "sft.core.records",
    "Data": "sft.core.data",
    "Inspection": "sft.core.records",
    "JsonLines": "sft.core.events",
    "Option": "sft.core.records",
    "Plan": "sft.core.records",
    "Profile": "sft.core.records",
    "Result": "sft.pipeline",
    "Target": "sft.core.records",
    "Timing": "sft.core.records",
    "Trained": "sft.training.course",
    "apply": "sft.surgery.apply",
    "benchmark": "sft.runtimes.runner",
    "compress": "sft.pipeline",
    "export": "sft.exporters",
    "factorize": "sft.decompositions",
    "finetune": "sft.training.finetune",
    "inspect": "sft.models.inspect",
    "load": "sft.exporters",
    "load_data": "sft.models.data",
    "load_model": "sft.models.load",
    "plan": "sft.planning.allocate",
    "profile": "sft.measure",
    "quantize": "sft.calibration.quantize",
    "reconstruct": "sft.training.reconstruct",
    "plan_in_place": "sft.planned",
    "remeasure": "sft.profiling.remeasure",
    "report": "sft.reporting.html",
    "top1": "sft.core.data",
    "train": "sft.training.end_to_end",
    "verify": "sft.verification.parity",
}
_ROOMS = ("decompositions", "layers", "quantizers")

__all__ = sorted([*_HOMES, *_ROOMS])

if TYPE_CHECKING:
    from sft import decompositions as decompositions
    from sft import layers as layers
    from sft import quantizers as quantizers
    from sft.calibration.quantize import quantize as quantize
    from sft.core.budget import Budget as Budget
    from sft.core.data import Batches as Batches
    from sft.core.data import Data as Data
    from sft.core.data import top1 as top1
    from sft.core.events import JsonLines as JsonLines
    from sft.core.records import Artifact as Artifact
    from sft.core.records import Check as Check
    from sft.core.records import Inspection as Inspection
    from sft.core.records import Option as Option
    from sft.core.records import Plan as Plan
    from sft.core.records import Profile as Profile
    from sft.core.records import Target as Target
    from sft.core.records import Timing as Timing
    from sft.decompositions import factorize as factorize
    from sft.exporters import export as export
    from sft.exporters import load as load
    from sft.measure import profile as profile
    from sft.models.data import load_data as load_data
    from sft.models.inspect import inspect as inspect
    from sft.models.load import load_model as load_model
    from sft.pipeline import Result as Result
    from sft.pipeline import compress as compress
    from sft.planned import plan_in_place as plan_in_place
    from sft.planning.allocate import plan as plan
    from sft.profiling.remeasure import remeasure as remeasure
    from sft.reporting.html import report as report
    from sft.runtimes.runner import benchmark as benchmark
    from sft.surgery.apply import apply as apply
    from sft.training.course import Trained as Trained
    from sft.training.end_to_end import train as train
    from sft.training.finetune import finetune as finetune
    from sft.training.reconstruct import reconstruct as reconstruct
    from sft.verification.parity import verify as verify


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sft.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
