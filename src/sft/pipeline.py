"""The whole way: a network and data in, a small file and its proof out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sft.accuracy_floor import Trial, search
from sft.core.budget import Budget
from sft.core.data import Data, Evaluate
from sft.core.errors import BudgetError
from sft.core.events import Events
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.core.records import Artifact, Check, Option, Plan
from sft.job import Job, Made, Training
from sft.reporting.table import summary
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel

__all__ = ["Result", "Training", "compress"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `compress` gives back; `data` is the content of `result.json`."""

    data: dict[str, Any]
    check: Check
    plan: Plan
    artifact: Artifact
    model: QuantizedModel
    out: Path

    @property
    def met(self) -> bool:
        """Whether the exported file keeps the budget (the score: on the validation split)."""
        return bool(self.data["budget"]["met"])

    @property
    def summary(self) -> str:
        """Before and after, measured on the exported files, as a table."""
        return summary(self.data)

    def raise_if_failed(self) -> None:
        """Raise `VerificationError` or `BudgetError` if the check or the budget was missed."""
        self.check.raise_if_failed()
        if not self.met:
            raise BudgetError(f"The budget was not met. {self.data['budget']['missed']}")


def compress(
    model: nn.Module,
    data: Data,
    budget: Budget,
    *,
    evaluate: Evaluate | None = None,
    target: str = "onnxruntime",
    out: str | Path = "out",
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
    training: Training | None = None,
    name: str | None = None,
    seed: int = 0,
    threads: int = 1,
    on_event: Events | None = None,
) -> Result:
    """Decompose, quantise, fine-tune, export, and prove the file; the model itself is untouched.

    budget : limits on size, MACs and score drop; see `Budget`.
    evaluate : ``evaluate(predict, loader) -> float``, higher is better, called with the exported
        file; without it the score is the agreement with the original model.
    keep : layers (names or patterns) that stay in float; overrides : options set by hand.
    name : a reference by which `sft.load` can make the network again.
    threads : of the runtime while it is measured. on_event : gets a dict for each event of the
        trainings; `sft.JsonLines` writes them to a file.

    Writes `result.json`, `plan.json`, `profile/`, the exported file, `model.safetensors`,
    `report.html` and `manifest.json` into `out`, all at the end. A call that was interrupted goes
    on from its last finished step when it is repeated. Raises `InputError` before anything is
    done, `BudgetError` if no plan fits; a file that misses the score is delivered and says so.
    """
    data.check()
    job = Job(
        model, data, find_target(target), training or Training(), evaluate,
        name or type(model).__name__, seed, threads, on_event,
    )  # fmt: skip
    validation = data.split("validation")[0]
    with forked_rng(seed):
        job.open(Path(out), f"{budget} {list(keep)} {overrides}")
        measured = job.profile()
        before = job.export_original()
        score = job.score(before, validation)
        say(f"validation score of the original file: {score:.4f}")

        def attempt(plan: Plan) -> Trial[Made]:
            made = job.build(plan)
            return Trial(made.model.plan, job.score(made.artifact, validation), made)

        trial = search(
            measured, budget, score, attempt, lambda b: job.plan(measured, b, keep, overrides)
        )
        say(f"validation score of the exported file: {trial.score:.4f}")
        outcome, check = job.prove(measured, trial, budget, before, score)
        outcome["budget"]["trials"] = [dataclasses.asdict(e) for e in trial.log]
        job.deliver(outcome, measured, trial.plan)
    path = str(job.work.out / f"model{job.target.suffix}")
    artifact = dataclasses.replace(trial.made.artifact, path=path)
    return Result(outcome, check, trial.plan, artifact, trial.made.model, job.work.out)
