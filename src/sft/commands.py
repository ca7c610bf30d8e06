"""What each sub-command calls. Rooms are imported when a command needs them."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.errors import InputError, VerificationError
from sft.core.progress import say

if TYPE_CHECKING:
    from torch import nn

    from sft.core.budget import Budget
    from sft.core.data import Data, Evaluate
    from sft.core.events import Events
    from sft.core.records import Artifact, Option, Plan, Record
    from sft.job import Training

DEMO_OUT = "out/demo"


def demo(options: argparse.Namespace) -> int:
    """The main job on the embedded network and data."""
    options.model, options.data, options.weights = "fashion-resnet", "fashion-mnist", None
    options.evaluate, options.keep, options.option = "top1", [], []
    options.steps = options.integer_steps = options.learning_rate = options.log = None
    from sft.core.budget import Budget

    return _compress(options, Budget(size=0.1, macs=0.34, max_drop=0.005))


def compress(options: argparse.Namespace) -> int:
    return _compress(options, _budget(options))


def inspect(options: argparse.Namespace) -> int:
    from sft.models.inspect import inspect
    from sft.reporting.table import format_table

    model, data = _model(options), _data(options)
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
    from sft.profiling.store import save_profile

    measured = profile(
        _model(options), _data(options), options.target, name=options.model,
        latency=not options.no_latency, threads=options.threads, resume=options.resume,
        data_free=options.data_free, loss_aware=options.loss_aware, seed=options.seed,
        **_measuring(options),
    )  # fmt: skip
    if rank() == 0:
        save_profile(measured, options.out)
    lines = [f"{x.layer.name}: {len(x.candidates)} options" for x in measured.layers]
    return _print(options, "\n".join([*lines, f"written to {options.out}"]), measured)


def plan(options: argparse.Namespace) -> int:
    from sft.planning.allocate import plan
    from sft.planning.front import front
    from sft.profiling.store import load_profile

    measured, fixed = load_profile(options.profile), _overrides(options)
    chosen = plan(measured, _budget(options), options.keep, fixed, options.method)
    if options.front:
        front(measured, options.front_cost, keep=options.keep, overrides=fixed).save(options.front)
    if options.out:
        chosen.save(options.out)
    return _print(options, str(chosen), chosen)


def apply(options: argparse.Namespace) -> int:
    from sft.core.files import write_bytes
    from sft.surgery.apply import apply

    small = apply(_model(options), _plan(options))
    write_bytes(Path(options.out), _weights(small))
    return _say(options, {"written": options.out})


def finetune(options: argparse.Namespace) -> int:
    from sft.core.distributed import rank
    from sft.core.files import check_writable, write_bytes
    from sft.surgery.apply import apply
    from sft.training.finetune import finetune

    model, training = _model(options), _training(options)
    out = Path(options.out)
    check_writable(out.parent)
    state = out.with_name(f".{out.name}.state")
    data = _data(options)
    held_out = None if training.patience is None else data.split("validation")[0]
    tuned = finetune(
        apply(model, _plan(options)), data.split("train")[0], model,
        steps=training.steps, minutes=training.minutes, learning_rate=training.learning_rate,
        ema=training.ema, seed=options.seed, checkpoint=state, save_every=training.save_every,
        validation=held_out, patience=training.patience or 1, on_event=_events(options),
    )  # fmt: skip
    if rank() == 0:
        write_bytes(out, _weights(tuned))
        for left in (state, *out.parent.glob(f".{state.name}.*")):  # half-written ones too
            left.unlink(missing_ok=True)
    return _say(options, {"written": options.out})


def train(options: argparse.Namespace) -> int:
    """Write the plan, the exported file with its note, the packed file and the events, at once."""
    import shutil

    from sft.core.distributed import rank
    from sft.core.events import JsonLines
    from sft.core.files import check_writable, publish
    from sft.exporters import export, save_packed
    from sft.training.end_to_end import train

    out = Path(options.out)
    state, staged = out / ".sft-train", out / ".sft-train" / "staged"
    check_writable(out)
    staged.mkdir(parents=True, exist_ok=True)
    named = ("steps", "learning_rate", "integer_learning_rate", "rank_multiple", "pretraining")
    given = {n: getattr(options, n) for n in named if getattr(options, n) is not None}
    given |= {n.replace("-", "_"): False for n in options.without}
    given |= {"bit_ramp": options.bit_ramp}
    trained = train(
        _model(options), _data(options), _budget(options), target=options.target,
        weight_bits=options.weight_bits, scheme=options.schemes, keep=options.keep,
        scratch=options.scratch, seed=options.seed, name=options.model, checkpoint=state,
        on_event=JsonLines(staged / "events.jsonl"), **given,
    )  # fmt: skip
    if rank() == 0:
        trained.plan.save(staged / "plan.json")
        artifact = export(trained.model, trained.plan, staged / "model.onnx")
        artifact = dataclasses.replace(artifact, path=str(out / "model.onnx"))
        artifact.save(_note(str(staged / "model.onnx")))
        save_packed(trained.model, staged / "model.safetensors")
        publish(staged, out)
        done = state.rename(out / ".sft-trained")  # in one step: no half of a state is taken up
        shutil.rmtree(done)
    return _print(options, f"{trained.plan}\nwritten to {out}", trained.plan)


def export(options: argparse.Namespace) -> int:
    from sft.exporters import export
    from sft.models.load import load_weights
    from sft.surgery.apply import apply

    chosen = _plan(options)
    small = apply(_model(options), chosen)
    if options.tuned:
        load_weights(small, Path(options.tuned))
    artifact = export(small, chosen, options.out, calibration=_data(options).calibration)
    artifact.save(_note(options.out))
    return _print(options, f"{artifact.path}: {artifact.file_bytes:,} bytes", artifact)


def verify(options: argparse.Namespace) -> int:
    from sft.verification.parity import verify

    evaluate = _evaluate(options)
    artifact = _artifact(options.file, options.target)
    check = verify(artifact, _model(options), _data(options), evaluate, threads=options.threads)
    _print(options, str(check), check)
    return 0 if check.passed else VerificationError.exit_code


def benchmark(options: argparse.Namespace) -> int:
    from sft.reporting.table import format_table
    from sft.runtimes.runner import benchmark_interleaved
    from sft.runtimes.targets import find_target

    artifacts = [_artifact(f, options.target) for f in options.files]
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

    try:
        result = json.loads(read_text(Path(options.result)))
    except ValueError as error:
        raise InputError(f"'{options.result}' is not JSON: {error}.") from None
    report(options.out, result)
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

    result = compress(
        _model(options), _data(options), budget, evaluate=_evaluate(options),
        target=options.target, out=options.out, keep=options.keep, overrides=_overrides(options),
        training=_training(options), on_event=_events(options),
        name=options.model, seed=options.seed, threads=options.threads,
    )  # fmt: skip
    print(json.dumps(result.data, indent=1) if options.json else result.summary)
    result.raise_if_failed()
    return 0


def _model(options: argparse.Namespace) -> "nn.Module":
    from sft.core.distributed import broadcast_
    from sft.models.load import load_model

    model = load_model(options.model, options.weights)
    broadcast_([*model.parameters(), *model.buffers()])
    try:
        return model.to(options.device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The device '{options.device}' cannot be used: {reason}") from None


def _data(options: argparse.Namespace) -> "Data":
    from sft.core.shards import shared_out
    from sft.models.data import load_data

    if options.data is None:
        if options.model != "fashion-resnet":
            raise InputError(
                "Give --data: fashion-mnist, imagefolder:DIR, npz:FILE or module:factory."
            )
        options.data = "fashion-mnist"
    return shared_out(load_data(options.data, options.model))


def _evaluate(options: argparse.Namespace) -> "Evaluate | None":
    from sft.core.data import top1
    from sft.models.imports import load_attribute

    if options.evaluate in (None, "agreement"):
        return None
    if options.evaluate == "top1":
        return top1
    found: Evaluate = load_attribute(options.evaluate)
    return found


def _budget(options: argparse.Namespace) -> "Budget":
    from sft.core.budget import Budget

    names = [f.name for f in dataclasses.fields(Budget)]
    return Budget(
        **{n: getattr(options, n) for n in names if getattr(options, n, None) is not None}
    )


def _overrides(options: argparse.Namespace) -> "dict[str, Option]":
    """Options set by hand: LAYER=SCHEME[:RANK[,RANK]][@BITS], 8 bits if none are given."""
    from sft.core.records import Option

    found = {}
    for text in options.option:
        layer, equals, said = text.rpartition("=")
        whole, at, bits = said.partition("@")
        scheme, _, ranks = whole.partition(":")
        try:
            if not (layer and equals and scheme):
                raise ValueError("a part is missing")
            width = None if bits == "float" else int(bits) if at else 8
            rank = tuple(int(side) for side in ranks.split(",")) if ranks else ()
            found[layer] = Option(scheme, rank, width)
        except ValueError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"--option {text}: LAYER=SCHEME:RANK@BITS is wanted, for example "
                f"'layer1.*=channel_in:16@8', 'fc=dense@4' or 'stem=keep' ({reason})."
            ) from None
    return found


def _measuring(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `profile` that were given; the others keep its own defaults."""
    names = ("schemes", "weight_bits", "rank_multiple", "anchor_samples", "anchor_error")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return given | ({"weight_bits": None} if options.in_float else {})


def _training(options: argparse.Namespace) -> "Training":
    from sft.job import Training

    names = [f.name for f in dataclasses.fields(Training)]
    given = {n: getattr(options, n) for n in names if getattr(options, n, None) is not None}
    return Training(**given)


def _events(options: argparse.Namespace) -> "Events | None":
    from sft.core.events import JsonLines

    return JsonLines(options.log) if options.log else None


def _plan(options: argparse.Namespace) -> "Plan":
    from sft.core.records import Plan
    from sft.core.statistics import load_statistics
    from sft.profiling.store import STATISTICS_FILE

    chosen = Plan.load(options.plan)
    folder = Path(options.profile) if options.profile else Path(options.plan).parent / "profile"
    if options.profile or folder.is_dir():
        statistics = load_statistics(folder / STATISTICS_FILE)
        return dataclasses.replace(chosen, statistics=statistics)
    say(f"no profile beside '{options.plan}' and no --profile: factors by plain SVD")
    return chosen


def _artifact(path: str, target: str) -> "Artifact":
    """The record of an exported file: the note beside it, or made from the file itself."""
    from sft.core.files import sha256
    from sft.core.records import Artifact
    from sft.runtimes.targets import find_target

    if _note(path).is_file():
        return dataclasses.replace(Artifact.load(_note(path)), path=path)
    digest = sha256(Path(path))
    return Artifact(path, find_target(target).name, Path(path).stat().st_size, digest, (), False)


def _note(path: str) -> Path:
    return Path(f"{path}.json")


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
