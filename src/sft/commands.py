"""What each sub-command calls. Rooms are imported when a command needs them."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.arguments import (
    artifact_at,
    budget_of,
    check_output,
    check_output_of_first,
    course_of,
    data_of,
    events_of,
    log_of_states,
    measuring_of,
    model_of,
    note_of,
    overrides_of,
    plan_of,
    score_of,
    training_of,
    with_folder,
)
from sft.core.errors import InputError, VerificationError

if TYPE_CHECKING:
    from torch import nn

    from sft.core.budget import Budget
    from sft.core.records import Record

DEMO_OUT = "out/demo"
DEMO_STEPS = 1100, 40  # in float and with rounding in place: most of the loss is that of the splits


def demo(options: argparse.Namespace) -> int:
    """The main job on the embedded network and data."""
    options.model, options.data, options.weights = "fashion-resnet", "fashion-mnist", None
    options.evaluate, options.keep, options.option = "top1", [], []
    options.steps, options.integer_steps = DEMO_STEPS
    options.learning_rate = options.log = None
    from sft.core.budget import Budget

    return _compress(options, Budget(size=0.1, macs=0.4, max_drop=0.005))


def compress(options: argparse.Namespace) -> int:
    return _compress(options, budget_of(options))


def inspect(options: argparse.Namespace) -> int:
    from sft.models.inspect import inspect
    from sft.reporting.table import format_table

    model, data = model_of(options), data_of(options)
    found = inspect(model, data.example(), options.model)
    rows = [
        [x.name, x.kind, list(x.weight_shape), list(x.output_shape), x.params, x.macs]
        for x in found.layers
    ]
    table = format_table(["layer", "kind", "weight", "output", "parameters", "MACs"], rows)
    total = f"{found.params:,} parameters, {found.macs:,} MACs a sample"
    return _print(options, f"{table}\n{total}", found)


def profile(options: argparse.Namespace) -> int:
    from sft.core.distributed import rank
    from sft.measure import profile
    from sft.profiling.store import PROFILE_FILE, STATISTICS_FILE, save_profile

    for name in (PROFILE_FILE, STATISTICS_FILE):
        check_output_of_first(Path(options.out) / name)
    measured = profile(
        model_of(options), data_of(options), options.target, name=options.model,
        latency=not options.no_latency, threads=options.threads, resume=options.resume,
        data_free=options.data_free, loss_aware=options.loss_aware, seed=options.seed,
        **measuring_of(options),
    )  # fmt: skip
    if rank() == 0:
        save_profile(measured, options.out)
    lines = [f"{x.layer.name}: {len(x.candidates)} options" for x in measured.layers]
    return _print(options, "\n".join([*lines, f"written to {options.out}"]), measured)


def plan(options: argparse.Namespace) -> int:
    from sft.planning.allocate import plan
    from sft.planning.front import front
    from sft.profiling.store import load_profile

    for path in (options.out, options.front):
        if path:
            check_output(path)
    measured, fixed = load_profile(options.profile), overrides_of(options)
    if options.front:  # first: a budget that cannot be met says nothing against it
        found = front(measured, options.front_cost, keep=options.keep, overrides=fixed)
        found.save(with_folder(options.front))
    chosen = plan(measured, budget_of(options), options.keep, fixed, options.method)
    if options.out:
        chosen.save(with_folder(options.out))
    return _print(options, str(chosen), chosen)


def apply(options: argparse.Namespace) -> int:
    from sft.core.files import write_bytes
    from sft.surgery.apply import apply

    check_output(options.out)
    small = apply(model_of(options), plan_of(options))
    write_bytes(with_folder(options.out), _weights(small))
    return _say(options, {"written": options.out})


def finetune(options: argparse.Namespace) -> int:
    from sft.core.distributed import rank
    from sft.core.files import write_bytes
    from sft.surgery.apply import apply
    from sft.training.finetune import finetune

    out = Path(options.out)
    state = out.with_name(f".{out.name}.state")
    for path in (out, state):
        check_output_of_first(path)
    told = events_of(options)
    model, training, data = model_of(options), training_of(options), data_of(options)
    if rank() == 0:
        with_folder(options.out)
    held_out = None if training.patience is None else data.split("validation")[0]
    tuned = finetune(
        apply(model, plan_of(options)), data.split("train")[0], model,
        steps=training.steps, minutes=training.minutes, learning_rate=training.learning_rate,
        ema=training.ema, seed=options.seed, checkpoint=state, save_every=training.save_every,
        validation=held_out, patience=training.patience or 1, on_event=told,
    )  # fmt: skip
    if rank() == 0:
        write_bytes(out, _weights(tuned))
        state.unlink(missing_ok=True)
    return _say(options, {"written": options.out})


def train(options: argparse.Namespace) -> int:
    """Write the plan, the exported file with its note, the packed file and the events, at once."""
    import shutil

    from sft.core.distributed import rank
    from sft.exporters import export, save_packed
    from sft.training.end_to_end import train
    from sft.workspace import Workspace

    check_output_of_first(options.out, folder=True)
    model, data, budget = model_of(options), data_of(options), budget_of(options)
    work = Workspace(Path(options.out), None, ".sft-train", ".sft-trained")
    log = log_of_states(work.root)
    trained = train(
        model, data, budget, target=options.target, weight_bits=options.weight_bits,
        scheme=options.schemes, keep=options.keep, scratch=options.scratch, seed=options.seed,
        name=options.model, checkpoint=work.root, on_event=log, **course_of(options),
    )  # fmt: skip
    if rank() == 0:
        trained.plan.save(work.staged / "plan.json")
        artifact = export(trained.model, trained.plan, work.staged / "model.onnx")
        artifact = dataclasses.replace(artifact, path=str(work.out / "model.onnx"))
        artifact.save(note_of(str(work.staged / "model.onnx")))
        save_packed(trained.model, work.staged / "model.safetensors")
        shutil.copyfile(log.path, work.staged / log.path.name)
        work.deliver()
    return _print(options, f"{trained.plan}\nwritten to {work.out}", trained.plan)


def export(options: argparse.Namespace) -> int:
    from sft.exporters import export
    from sft.models.load import load_weights
    from sft.surgery.apply import apply

    for path in (options.out, note_of(options.out)):
        check_output(path)
    chosen = plan_of(options)
    small = apply(model_of(options), chosen)
    if options.tuned:
        load_weights(small, Path(options.tuned))
    calibration = data_of(options).calibration
    artifact = export(small, chosen, with_folder(options.out), calibration=calibration)
    artifact.save(note_of(options.out))
    return _print(options, f"{artifact.path}: {artifact.file_bytes:,} bytes", artifact)


def verify(options: argparse.Namespace) -> int:
    from sft.verification.parity import verify

    evaluate = score_of(options)
    artifact = artifact_at(options.file, options.target)
    check = verify(artifact, model_of(options), data_of(options), evaluate, threads=options.threads)
    _print(options, str(check), check)
    return 0 if check.passed else VerificationError.exit_code


def benchmark(options: argparse.Namespace) -> int:
    from sft.reporting.table import format_table
    from sft.runtimes.runner import benchmark_interleaved
    from sft.runtimes.targets import find_target

    artifacts = [artifact_at(f, options.target) for f in options.files]
    timings = benchmark_interleaved(artifacts, find_target(options.target).runtime, options.threads)
    if options.json:
        print(json.dumps([t.to_dict() for t in timings], indent=1))
        return 0
    rows = [
        [f, t.latency_ms, t.latency_ms_min, t.latency_ms_p90]
        for f, t in zip(options.files, timings, strict=True)
    ]
    print(format_table(["file", "median ms", "least ms", "90 % ms"], rows))
    return 0


def report(options: argparse.Namespace) -> int:
    from sft.core.files import read_text
    from sft.reporting.html import report

    check_output(options.out)
    try:
        result = json.loads(read_text(Path(options.result)))
    except ValueError as error:
        raise InputError(f"'{options.result}' is not JSON: {error}.") from None
    report(with_folder(options.out), result)
    return _say(options, {"written": options.out})


def list_known(options: argparse.Namespace) -> int:
    from sft.decompositions import decompositions
    from sft.runtimes.targets import find_target, list_targets

    known = {
        "models": ["fashion-resnet", "timm:NAME", "torchvision:NAME", "package.module:factory",
                   "FILE.pt2"],
        "data": ["fashion-mnist", "imagefolder:DIR", "npz:FILE", "package.module:factory"],
        "targets": [t.name for t in list_targets()],
        "target here": [find_target("onnxruntime").name],
        "decompositions": list(decompositions),
    }  # fmt: skip
    return _say(options, known)


def _compress(options: argparse.Namespace, budget: "Budget") -> int:
    from sft.pipeline import compress

    check_output_of_first(options.out, folder=True)
    told = events_of(options)
    result = compress(
        model_of(options), data_of(options), budget, evaluate=score_of(options),
        target=options.target, out=options.out, keep=options.keep, overrides=overrides_of(options),
        training=training_of(options), on_event=told,
        name=options.model, seed=options.seed, threads=options.threads,
    )  # fmt: skip
    print(json.dumps(result.data, indent=1) if options.json else result.summary)
    result.raise_if_failed()
    return 0


def _weights(model: "nn.Module") -> bytes:
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})


def _print(options: argparse.Namespace, text: str, record: "Record") -> int:
    print(record.to_json() if options.json else text)
    return 0


def _say(options: argparse.Namespace, facts: dict[str, Any]) -> int:
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return 0
