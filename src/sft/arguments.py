"""From the options of a command to what the verbs take, and checks of where they write.

Rooms are imported when one is needed.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.errors import InputError
from sft.core.progress import say

if TYPE_CHECKING:
    from torch import nn

    from sft.core.budget import Budget
    from sft.core.data import Data, Evaluate
    from sft.core.events import ContinuedJsonLines, Events
    from sft.core.records import Artifact, Option, Plan
    from sft.job import Training


def model_of(options: argparse.Namespace) -> "nn.Module":
    from sft.core.distributed import broadcast_
    from sft.models.load import load_model

    model = load_model(options.model, options.weights)
    broadcast_([*model.parameters(), *model.buffers()])
    try:
        return model.to(options.device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The device '{options.device}' cannot be used: {reason}") from None


def data_of(options: argparse.Namespace) -> "Data":
    from sft.core.shards import shared_out
    from sft.models.data import load_data

    if options.data is None:
        if options.model != "fashion-resnet":
            raise InputError(
                "Give --data: fashion-mnist, imagefolder:DIR, npz:FILE or module:factory."
            )
        options.data = "fashion-mnist"
    return shared_out(load_data(options.data, options.model))


def score_of(options: argparse.Namespace) -> "Evaluate | None":
    from sft.core.data import top1
    from sft.models.imports import load_attribute

    if options.evaluate in (None, "agreement"):
        return None
    if options.evaluate == "top1":
        return top1
    found: Evaluate = load_attribute(options.evaluate)
    return found


def budget_of(options: argparse.Namespace) -> "Budget":
    from sft.core.budget import Budget

    names = [f.name for f in dataclasses.fields(Budget)]
    return Budget(
        **{n: getattr(options, n) for n in names if getattr(options, n, None) is not None}
    )


def overrides_of(options: argparse.Namespace) -> "dict[str, Option]":
    """Options set by hand: LAYER=SCHEME[:RANK[,RANK]][@BITS], 8 bits if none are given."""
    from sft.core.records import Option

    found: dict[str, Option] = {}
    for text in options.option:
        layer, equals, said = text.rpartition("=")
        whole, at, bits = said.partition("@")
        scheme, _, ranks = whole.partition(":")
        try:
            if not (layer and equals and scheme):
                raise ValueError("a part is missing")
            width = None if bits == "float" else int(bits) if at else 8
            rank = tuple(int(side) for side in ranks.split(",")) if ranks else ()
            option = Option(scheme, rank, width)
        except ValueError as error:
            reason = _reason_of(error)
            raise InputError(
                f"--option {text}: LAYER=SCHEME:RANK@BITS is wanted, for example "
                f"'layer1.*=channel_in:16@8', 'fc=dense@4' or 'stem=keep' ({reason})."
            ) from None
        if found.setdefault(layer, option) != option:
            raise InputError(f"--option names '{layer}' twice: {found[layer]} and {option}.")
    return found


def _reason_of(error: ValueError) -> str:
    """What a record, or Python, found wrong."""
    told = getattr(error, "errors", None)
    return str(told()[0]["msg"] if told else error).removeprefix("Value error, ").rstrip(".")


def measuring_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `profile` that were given; the others keep its own defaults."""
    names = ("schemes", "weight_bits", "rank_multiple", "anchor_samples", "anchor_error")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return given | ({"weight_bits": None} if options.in_float else {})


def training_of(options: argparse.Namespace) -> "Training":
    from sft.job import Training

    names = [f.name for f in dataclasses.fields(Training)]
    given = {n: getattr(options, n) for n in names if getattr(options, n, None) is not None}
    return Training(**given)


def course_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `train` that were given; the others keep its own defaults."""
    names = ("steps", "learning_rate", "integer_learning_rate", "rank_multiple", "pretraining")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    given |= {n.replace("-", "_"): False for n in options.without}
    return given | {"bit_ramp": options.bit_ramp}


def events_of(options: argparse.Namespace) -> "Events | None":
    from sft.core.events import JsonLines

    return JsonLines(options.log) if options.log else None


def plan_of(options: argparse.Namespace) -> "Plan":
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


def artifact_at(path: str, target: str) -> "Artifact":
    """The record of an exported file: the note beside it, or made from the file itself."""
    from sft.core.files import sha256
    from sft.core.records import Artifact
    from sft.runtimes.targets import find_target

    if note_of(path).is_file():
        return dataclasses.replace(Artifact.load(note_of(path)), path=path)
    digest = sha256(Path(path))
    return Artifact(path, find_target(target).name, Path(path).stat().st_size, digest, (), False)


def note_of(path: str) -> Path:
    return Path(f"{path}.json")


def check_output(path: str | Path, folder: bool = False) -> None:
    """Refuse, before the work, an output that cannot be written; drop what a killed run left of it.

    folder : files are to be written in `path`, and not one at `path`.
    """
    from sft.core import files

    files.check_output(Path(path), folder)
    if not folder:
        files.remove_unfinished(Path(path))


def check_output_of_first(path: str | Path, folder: bool = False) -> None:
    """`check_output` in the first of several processes, which alone writes; all are refused."""
    from sft.core.distributed import from_first

    def check() -> bytes:
        check_output(path, folder)
        return b""

    from_first(check)


def with_folder(path: str) -> Path:
    """The path of a file that is written now, its folder made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def log_of_states(folder: Path) -> "ContinuedJsonLines":
    """The log of a training beside its states; without any state it begins anew."""
    from sft.core.distributed import rank
    from sft.core.events import ContinuedJsonLines

    path = folder / "events.jsonl"
    if rank() == 0 and not any(folder.glob("*.state")):
        path.unlink(missing_ok=True)
    return ContinuedJsonLines(path)
