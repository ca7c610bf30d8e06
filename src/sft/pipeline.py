"""The whole way: a network and data in, a small file and its proof out."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from sft.accuracy_floor import Trial, search
from sft.core.budget import Budget
from sft.core.data import Data, Evaluate
from sft.core.errors import BudgetError
from sft.core.files import write_text
from sft.core.progress import say
from sft.core.records import Artifact, Check, Option, Plan, Profile, Target
from sft.exporters import export, save_packed
from sft.outcome import describe, score_file
from sft.planning.allocate import plan as make_plan
from sft.profiling.profile import fingerprint, profile, save_profile
from sft.reporting.html import report
from sft.reporting.table import summary
from sft.runtimes.runner import benchmark_interleaved
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm
from sft.surgery.quantize import QuantizedModel, quantize
from sft.training.finetune import finetune
from sft.verification.parity import agreement_with, verify
from sft.workspace import Workspace

T = TypeVar("T")

COMPARED_SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Training:
    """How the compressed network is fine-tuned, with the original as teacher.

    steps : optimiser steps in float; integer_steps : steps with rounding in place. 0 leaves out.
    """

    steps: int = 500
    integer_steps: int = 100
    learning_rate: float = 2e-3
    integer_learning_rate: float = 3e-4


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


@dataclasses.dataclass(frozen=True)
class _Made:
    """One network made from one plan, and its file."""

    model: QuantizedModel
    artifact: Artifact


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
) -> Result:
    """Decompose, quantise, fine-tune, export, and prove the file; the model itself is untouched.

    budget : limits on size, MACs and score drop; see `Budget`.
    evaluate : ``evaluate(predict, loader) -> float``, higher is better, called with the exported
        file; without it the score is the agreement with the original model.
    keep : layers (names or patterns) that stay in float; overrides : options set by hand.
    name : a reference by which `sft.load` can make the network again.
    threads : of the runtime while it is measured.

    Writes `result.json`, `plan.json`, `profile/`, the exported file, `model.safetensors`,
    `report.html` and `manifest.json` into `out`, all at the end. A call that was interrupted goes
    on from its last finished step when it is repeated. Raises `InputError` before anything is
    done, `BudgetError` if no plan fits; a file that misses the score is delivered and says so.
    """
    data.check()
    run = _Run(model, data, find_target(target), training or Training(), seed, threads)
    request = (budget, tuple(keep), dict(overrides or {}), run.training, evaluate is None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run.open(Path(out), name or type(model).__name__, str(request))
        evaluate_file = evaluate or agreement_with(run.original)
        measured = run.work.profiled(lambda: run.timed("profile", run.profile))
        before = run.timed("export", run.export_original)
        validation = data.split("validation")[0]
        score = run.timed("score", lambda: score_file(before, evaluate_file, validation, threads))
        say(f"validation score of the original file: {score:.4f}")

        def attempt(plan: Plan, label: str) -> Trial[_Made]:
            made = run.build(plan, label)
            return Trial(
                plan,
                run.timed(
                    "score", lambda: score_file(made.artifact, evaluate_file, validation, threads)
                ),
                made,
            )

        def planned(asked: Budget) -> Plan:
            return run.timed("plan", lambda: make_plan(measured, asked, keep, overrides))

        trial = search(measured, budget, score, attempt, planned)
        say(f"validation score of the exported file: {trial.score:.4f}")
        return run.prove(measured, trial, budget, before, score, evaluate, evaluate_file)


class _Run:
    """The steps of one `compress` call, each timed."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        target: Target,
        training: Training,
        seed: int,
        threads: int,
    ) -> None:
        self.model, self.data, self.target = model, data, target
        self.training, self.seed, self.threads = training, seed, threads
        self.seconds: dict[str, float] = {}

    def open(self, out: Path, name: str, request: str) -> None:
        """Check the model on the data, then make the work folder."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.name = name
        self.original = fold_batch_norm(self.model, self.data.example().to(device))
        settings = fingerprint(self.model, self.data, self.target, False, self.seed)
        digest = hashlib.sha256(f"{settings} {request} {name}".encode()).hexdigest()
        self.work = Workspace(out, digest)

    def timed(self, step: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - started

    def profile(self) -> Profile:
        say("profile")
        return profile(self.model, self.data, self.target.name, name=self.name, seed=self.seed)

    def export_original(self) -> Artifact:
        path = self.work.staged / f"original{self.target.suffix}"
        return export(self.original, None, path, self.target.name, example=self.data.example())

    def build(self, plan: Plan, label: str) -> _Made:
        """From a plan to the exported file, training included."""
        key = hashlib.sha256("".join(str(r.option) for r in plan.rows).encode()).hexdigest()[:12]
        training, train = self.training, self.data.split("train")[0]
        small = self.timed("apply", lambda: apply(self.model, plan))

        def tune(stage: str, network: T, steps: int, rate: float) -> T:
            if steps == 0:
                return network
            say(f"fine-tune, {stage}: {steps} steps")

            def run(module: Any, state: Path) -> Any:
                return finetune(
                    module, train, self.original, steps=steps, learning_rate=rate,
                    seed=self.seed, checkpoint=state,
                )  # fmt: skip

            return self.timed(
                "finetune",
                lambda: self.work.trained(f"{key}-{stage}", network, run),  # type: ignore[type-var]
            )

        small = tune("float", small, training.steps, training.learning_rate)
        calibration = self.data.calibration
        rounded = self.timed("quantise", lambda: quantize(small, plan, self.target, calibration))
        rounded = tune("integers", rounded, training.integer_steps, training.integer_learning_rate)
        path = self.work.root / f"{key}{self.target.suffix}"
        artifact = self.timed("export", lambda: export(rounded, plan, path, self.target.name))
        return _Made(rounded, artifact)

    def prove(
        self,
        measured: Profile,
        trial: Trial[_Made],
        budget: Budget,
        before: Artifact,
        score: float,
        evaluate: Evaluate | None,
        evaluate_file: Evaluate,
    ) -> Result:
        """Touch the test split, once: verify and time both files, and deliver everything."""
        test, split = self.data.split("test")
        made, staged, plan = trial.made, self.work.staged, trial.plan
        say(f"verify and benchmark on the {split} split")
        artifact = self.work.stage(made.artifact, f"model{self.target.suffix}")
        check = self.timed(
            "verify",
            lambda: verify(
                artifact, self.original, test, evaluate_file, simulation=made.model,
                samples=COMPARED_SAMPLES, threads=self.threads,
            ),
        )  # fmt: skip
        test_score = self.timed(
            "verify", lambda: score_file(before, evaluate_file, test, self.threads)
        )
        timings = self.timed(
            "benchmark",
            lambda: benchmark_interleaved([before, artifact], self.target.runtime, self.threads),
        )
        packed = save_packed(made.model, staged / "model.safetensors")
        outcome = describe(
            measured, plan, budget,
            files=(before, artifact), packed_bytes=(_float_bytes(self.original), packed),
            timings=timings, check=check, test_scores=(test_score, float(check.score or 0.0)),
            validation_scores=(score, trial.score),
        )  # fmt: skip
        outcome |= {
            "metric": "agreement" if evaluate is None else getattr(evaluate, "__name__", "score"),
            "split": split, "data": self.data.name, "seed": self.seed, "threads": self.threads,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
        }  # fmt: skip
        save_profile(measured, staged / "profile")
        plan.save(staged / "plan.json")
        write_text(staged / "result.json", json.dumps(outcome, indent=1) + "\n")
        report(staged / "report.html", outcome)
        self.work.deliver()
        delivered = dataclasses.replace(
            artifact, path=str(self.work.out / Path(artifact.path).name)
        )
        return Result(outcome, check, plan, delivered, made.model, self.work.out)


def _float_bytes(model: nn.Module) -> int:
    """Size of the network as a plain float32 safetensors file."""
    return len(
        save({k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()})
    )
