"""One `compress` call: its inputs, its steps (each timed), and where their results are kept."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from sft import __version__
from sft.accuracy_floor import Trial
from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.copies import copy_module
from sft.core.data import Data, Evaluate, Loader, fingerprint_data
from sft.core.distributed import from_first, is_distributed, rank
from sft.core.errors import InputError
from sft.core.events import Events
from sft.core.files import write_text
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.core.records import STORED, Artifact, Check, Option, Plan, Profile, Target, Timing
from sft.core.shards import record_of_first
from sft.exporters import export, save_packed
from sft.measure import profile
from sft.outcome import describe, score_file
from sft.planned import plan_that_fits
from sft.planning.front import front
from sft.profiling.held_out import distance
from sft.profiling.profile import fingerprint, save_profile
from sft.reporting.html import report
from sft.runtimes.runner import benchmark_interleaved
from sft.runtimes.targets import can_run
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm
from sft.surgery.quantize import QuantizedModel
from sft.training.finetune import finetune
from sft.training.reconstruct import reconstruct
from sft.verification.parity import agreement_with, verify
from sft.workspace import Workspace

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

COMPARED_SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Training:
    """How the compressed network is fine-tuned, with the original as teacher.

    steps : optimiser steps in float; integer_steps : steps with rounding in place. 0 leaves out.
    minutes : end by the clock instead, both trainings of a network together; they share the time
    as they would the steps. ema : decay of a moving average of the weights (0: none). patience :
    judge on the validation split, keep what is best there, and end after so many judgements
    without a better one (None: no judging). See `finetune`.
    save_every : seconds between two stored states (20); it does not change the result.
    """

    steps: int = 800
    integer_steps: int = 120
    learning_rate: float = 2e-3
    integer_learning_rate: float = 3e-4
    minutes: float | None = None
    ema: float = 0.0
    patience: int | None = None
    save_every: float | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.integer_steps < 0:
            raise InputError(f"Training steps {self.steps}, {self.integer_steps}: 0 or more.")
        for rate in (self.learning_rate, self.integer_learning_rate):
            if not 0 < rate < float("inf"):
                raise InputError(f"Learning rate {rate}: it must be above 0 and finite.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise InputError(f"{self.minutes} minutes of training: a time above 0 is wanted.")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema={self.ema}: a decay of at least 0 and below 1 is wanted.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience={self.patience}: at least 1 judgement is wanted.")

    def minutes_of(self, steps: int) -> float | None:
        """The share of the time that a training of so many steps has."""
        if self.minutes is None:
            return None
        return self.minutes * steps / (self.steps + self.integer_steps)


@dataclasses.dataclass(frozen=True)
class Made:
    """A network made from a plan, and its exported file."""

    model: QuantizedModel
    artifact: Artifact


@dataclasses.dataclass
class Job:
    """The inputs of a call; `seconds` sums up the time of each kind of step."""

    model: nn.Module
    data: Data
    target: Target
    training: Training
    evaluate: Evaluate | None
    name: str
    seed: int
    threads: int
    on_event: Events | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InputError(f"threads={self.threads}: at least 1 is wanted.")

    def open(self, out: Path, request: str) -> None:
        """Check the model on the data; only then touch the output folder."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.original = fold_batch_norm(self.model, self.data.example().to(device))
        self.score_of = self.evaluate or agreement_with(self.original)
        with forked_rng(self.seed):
            train = fingerprint_data(self.data.split("train")[0])
        asked = (
            fingerprint(self.model, self.data, self.target, seed=self.seed),
            train, request, self.training, self.evaluate is None, self.name, repr(self.model),
            __version__, torch.get_num_threads(),
        )  # fmt: skip
        self.work = Workspace(out, hashlib.sha256(str(asked).encode()).hexdigest())

    def profile(self) -> Profile:
        def measure() -> Profile:
            say("profile")
            return profile(
                self.model, self.data, self.target.name, latency=can_run(self.target),
                threads=self.threads, name=self.name, seed=self.seed,
                resume=self.work.root / "unfinished",
            )  # fmt: skip

        return self._timed("profile", lambda: self.work.profiled(measure))

    def plan(
        self,
        measured: Profile,
        budget: Budget,
        keep: Sequence[str],
        overrides: Mapping[str, Option] | None,
    ) -> Plan:
        def choose() -> Plan:
            return plan_that_fits(
                measured, budget, self.model, self.data,
                keep=keep, overrides=overrides, seed=self.seed,
            )  # fmt: skip

        found = self._timed("plan", lambda: record_of_first(Plan, choose))
        return dataclasses.replace(found, statistics=measured.statistics)

    def export_original(self) -> Artifact:
        path = self.work.staged / f"original{self.target.suffix}"
        example = self.data.example()

        def write() -> Artifact:
            return export(self.original, None, path, self.target.name, example=example)

        return self._timed("export", lambda: record_of_first(Artifact, write))

    def score(self, artifact: Artifact, loader: Loader) -> float:
        """The score of an exported file, run in its runtime (by the first of several processes)."""

        def run() -> bytes:
            return repr(score_file(artifact, self.score_of, loader, self.threads)).encode()

        return float(self._timed("score", lambda: from_first(run)))

    def build(self, plan: Plan) -> Made:
        """From a plan to the exported file: split, fit, fine-tune, quantise, fine-tune, export."""
        key = hashlib.sha256("".join(str(r.option) for r in plan.rows).encode()).hexdigest()[:12]
        training, calibration = self.training, self.data.calibration
        small = self._timed("apply", lambda: apply(self.model, plan))
        if any(row.option.rank for row in plan.rows):
            small = self._timed("reconstruct", lambda: self._fit(small))
        small = self._tune(f"{key}-float", small, training.steps, training.learning_rate)
        rounded = self._timed("quantise", lambda: quantize(small, plan, self.target, calibration))
        if training.integer_steps:
            rounded = self._tune_integers(f"{key}-integers", rounded)
        path = self.work.root / f"{key}{self.target.suffix}"
        write = partial(export, rounded, plan, path, self.target.name)
        artifact = self._timed("export", lambda: record_of_first(Artifact, write))
        return Made(rounded, artifact)

    def _fit(self, small: nn.Module) -> nn.Module:
        say("fit the split layers")
        return reconstruct(small, self.model, self.data.calibration, seed=self.seed)

    def _tune_integers(self, stage: str, rounded: QuantizedModel) -> QuantizedModel:
        """The trained network, or the one as it was where training does harm on validation data."""
        how, (held_out, _) = self.training, self.data.split("validation")
        before = copy_module(rounded)
        after = self._tune(stage, rounded, how.integer_steps, how.integer_learning_rate)
        far = [distance(m, self.original, held_out, self.seed, whole=True) for m in (before, after)]
        helps = far[1] <= far[0]
        said = "stay trained" if helps else "are taken as they were before"
        say(f"  divergence on validation data {far[0]:.4g}, trained {far[1]:.4g}: integers {said}")
        return after if helps else before

    def _tune(self, stage: str, network: M, steps: int, learning_rate: float) -> M:
        how = self.training
        held_out = None if how.patience is None else self.data.split("validation")[0]

        def run(module: M, state: Path) -> M:
            length = f"{steps} steps" if how.minutes is None else f"{how.minutes_of(steps):.3g} min"
            say(f"fine-tune: {length}")
            return finetune(
                module, self.data.split("train")[0], self.original,
                steps=steps, minutes=how.minutes_of(steps), learning_rate=learning_rate,
                ema=how.ema, seed=self.seed, checkpoint=state, save_every=how.save_every,
                validation=held_out, patience=how.patience or 1, on_event=self.on_event,
            )  # fmt: skip

        if steps == 0:
            return network
        return self._timed("finetune", lambda: self.work.trained(stage, network, run))

    def prove(
        self, measured: Profile, trial: Trial[Made], budget: Budget, before: Artifact, score: float
    ) -> tuple[dict[str, Any], Check]:
        """Touch the test split, once: verify and time both files; returns `result.json`.

        Of several processes the first one does it.
        """

        def work() -> bytes:
            outcome, check = self._prove(measured, trial, budget, before, score)
            return json.dumps([outcome, check.to_json()]).encode()

        if not is_distributed():
            return self._prove(measured, trial, budget, before, score)
        outcome, check = json.loads(from_first(work))
        return outcome, Check.from_json(check)

    def _prove(
        self, measured: Profile, trial: Trial[Made], budget: Budget, before: Artifact, score: float
    ) -> tuple[dict[str, Any], Check]:
        test, split = self.data.split("test")
        say(f"verify and benchmark on the {split} split")
        made = trial.made
        artifact = self.work.stage(made.artifact, f"model{self.target.suffix}")
        check = self._timed("verify", lambda: self._verify(artifact, made.model, test))
        scores = (self.score(before, test), float(check.score or 0.0))
        timings = self._timed("benchmark", lambda: self._time(before, artifact))
        packed = save_packed(made.model, self.work.staged / "model.safetensors")
        outcome = describe(
            measured, trial.plan, budget,
            files=(before, artifact), packed_bytes=(_float_bytes(self.original), packed),
            timings=timings, check=check, test_scores=scores,
            validation_scores=(score, trial.score),
            params=sum(p.numel() for p in made.model.parameters()),
        )  # fmt: skip
        named = getattr(self.evaluate, "__name__", "score")
        outcome |= {
            "metric": "agreement" if self.evaluate is None else named,
            "split": split,
            "data": self.data.name,
            "seed": self.seed,
            "threads": self.threads,
            "seconds": {step: round(spent, 2) for step, spent in self.seconds.items()},
        }
        return outcome, check

    def deliver(self, outcome: dict[str, Any], measured: Profile, plan: Plan) -> None:
        """Write the records and the page beside the files, then move all into the output folder."""
        if rank() != 0:
            return
        staged = self.work.staged
        save_profile(measured, staged / "profile")
        plan.save(staged / "plan.json")
        write_text(staged / "result.json", json.dumps(outcome, indent=1) + "\n")
        costs = [cost for cost in ("size", "latency") if getattr(measured.original, cost)]
        fronts = [front(measured, cost) for cost in costs]
        for found in fronts:
            found.save(staged / "profile" / f"front-{found.cost}.json")
        report(staged / "report.html", outcome, *fronts)
        self.work.deliver()

    def _verify(self, artifact: Artifact, simulation: QuantizedModel, test: Loader) -> Check:
        rows = simulation.plan.rows
        rounded = [r for r in rows if r.option.weight_bits and r.option.scheme != STORED]
        integers = sum(r.cost.macs for r in rounded)
        share = integers / max(sum(r.cost.macs for r in rows), 1)
        return verify(
            artifact, self.original, test, self.score_of,
            simulation=simulation, integer_share=share, samples=COMPARED_SAMPLES,
            threads=self.threads,
        )  # fmt: skip

    def _time(self, *artifacts: Artifact) -> tuple[Timing, ...]:
        return benchmark_interleaved(artifacts, self.target.runtime, self.threads)

    def _timed(self, step: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - started


def _float_bytes(model: nn.Module) -> int:
    """Size of the network as a plain float32 safetensors file."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    return len(save(tensors))
