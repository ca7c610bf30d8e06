"""The command `sft`: one sub-command a verb. No logic: parse, call, exit code."""

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sft import commands
from sft.core import progress
from sft.core.errors import SFTError

INTERRUPTED, INTERNAL = 130, 3
SHARED = ("compress", "demo", "finetune", "profile", "train")  # work that processes share out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 done and verified, 1 budget not met or verification failed, 2 bad input, 3 internal error or
    runtime crash, or another process lost, 130 interrupted (the same command goes on).
    """
    options = build_parser().parse_args(arguments)
    progress.show(not options.quiet)
    try:
        return _run(options) if _processes() == 1 else _run_shared(options)
    except SFTError as error:
        print(f"sft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sft: interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("sft: internal error (above); please report it.", file=sys.stderr)
        return INTERNAL


def _processes() -> int:
    """How many processes torchrun has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _run(options: argparse.Namespace) -> int:
    return int(options.run(options))


def _run_shared(options: argparse.Namespace) -> int:
    """The verb in one of several processes; only process 0 prints.

    What is not shared out process 0 does alone, and the others leave at once.
    """
    others = os.environ["RANK"] != "0"
    if options.run.__name__ not in SHARED:
        return 0 if others else _run(options)
    from torch import manual_seed

    from sft.core.distributed import joined

    with joined(options.device) as options.device, contextlib.ExitStack() as silence:
        manual_seed(options.seed)  # a factory of MODEL or DATA makes the same in all
        if others:
            progress.show(False)
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return _run(options)


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="sft", description="Make a trained convolutional network small and fast, with proof."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    demo = _verb(verbs, "demo", "compress the embedded network", commands.demo)
    _out(demo, commands.DEMO_OUT)
    compress = _verb(
        verbs, "compress", "the whole way: MODEL in, a proven file out", commands.compress
    )
    _model(compress, score=True)
    _budget(compress)
    _training(compress)
    compress.add_argument(
        "--integer-steps", type=int, help="fine-tuning steps with rounding in place"
    )
    compress.add_argument("--integer-learning-rate", type=float)
    _out(compress, "out")
    _train_verb(verbs)
    _model(_verb(verbs, "inspect", "list the layers of MODEL", commands.inspect))
    profile = _verb(verbs, "profile", "measure MODEL on data, once", commands.profile)
    _model(profile)
    _measuring(profile)
    _out(profile, "out/profile")
    plan = _verb(verbs, "plan", "choose one option a layer from a profile", commands.plan, False)
    plan.add_argument("profile", metavar="PROFILE_DIR")
    _limits(plan)
    plan.add_argument("--method", choices=("exact", "lagrangian"), default="exact")
    plan.add_argument("--front", metavar="FILE", help="write the front of the whole network")
    plan.add_argument("--front-cost", choices=("size", "latency"), default="size")
    _out(plan, None, "PLAN.json")
    _plan_verbs(verbs)
    verify = _verb(
        verbs, "verify", "run an exported FILE and compare it with MODEL", commands.verify
    )
    verify.add_argument("file", metavar="FILE")
    _model(verify, score=True)
    bench = _verb(verbs, "benchmark", "time exported FILEs in turn", commands.benchmark)
    bench.add_argument("files", nargs="+", metavar="FILE")
    report = _verb(verbs, "report", "write the page of a RESULT.json", commands.report, False)
    report.add_argument("result", metavar="RESULT.json")
    _out(report, "report.html", "FILE")
    _verb(verbs, "list", "models, data, targets and decompositions", commands.list_known, False)
    return parser


def _train_verb(verbs: Any) -> None:
    """Training within a budget, without a plan made before."""
    text = "train MODEL into low rank and few bits, in one go"
    verb = _verb(verbs, "train", text, commands.train)
    _model(verb)
    for name in ("size", "macs"):
        verb.add_argument(f"--{name}", type=float, help=f"fraction of the original {name}")
    verb.add_argument("--size-bytes", type=int)
    verb.add_argument("--macs-count", type=int)
    verb.add_argument("--weight-bits", type=int, default=4, metavar="N", help="2 to 8 (default 4)")
    verb.add_argument(
        "--scheme", action="append", dest="schemes", metavar="NAME", help="of two factors (repeat)"
    )
    verb.add_argument("--rank-multiple", type=int, metavar="N", help="default: the target's lanes")
    verb.add_argument(
        "--keep", action="append", default=[], metavar="LAYER", help="stays float (pattern; repeat)"
    )
    verb.add_argument("--steps", type=int, help="of the optimiser, in all (2000)")
    verb.add_argument("--learning-rate", type=float, help="in float")
    verb.add_argument("--integer-learning-rate", type=float, help="with rounding in place")
    verb.add_argument("--scratch", action="store_true", help="draw all weights anew")
    verb.add_argument("--pretraining", choices=("admm",), help="draw dense kernels to low rank")
    verb.add_argument(
        "--without", action="append", default=[], metavar="PART",
        choices=("shrinking", "dual-ascent", "product-decay"),
        help="shrinking, dual-ascent or product-decay (repeat)",
    )  # fmt: skip
    verb.add_argument("--bit-ramp", action="store_true", help="narrow the weights from 8 bits on")
    _out(verb, "out")


def _plan_verbs(verbs: Any) -> None:
    """The verbs that take a model and a plan."""
    for name, text, run in (
        ("apply", "split MODEL's layers as PLAN says; writes float weights", commands.apply),
        (
            "finetune",
            "split, then fine-tune with MODEL as teacher; writes weights",
            commands.finetune,
        ),
        ("export", "split, quantise and export MODEL as PLAN says", commands.export),
    ):
        verb = _verb(verbs, name, text, run)
        _model(verb)
        verb.add_argument("--plan", required=True, metavar="PLAN.json")
        verb.add_argument(
            "--profile",
            metavar="DIR",
            help="statistics of the data (default: profile/ beside PLAN)",
        )
        if name == "finetune":
            _training(verb)
        if name == "export":
            verb.add_argument("--tuned", metavar="FILE", help="weights that finetune wrote")
        verb.add_argument("-o", "--out", required=True, metavar="FILE")


def _verb(
    verbs: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    measures: bool = True,
) -> argparse.ArgumentParser:
    """measures : whether the verb runs networks or files; the others have no use for a machine."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print the record as JSON")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    if not measures:
        return verb
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", default="cpu", help="for the PyTorch steps (cpu, cuda)")
    verb.add_argument("--threads", type=int, default=1, help="of the runtime, when it is measured")
    verb.add_argument("--target", default="onnxruntime", help="runtime, or target (see `sft list`)")
    return verb


def _model(verb: argparse.ArgumentParser, score: bool = False) -> None:
    verb.add_argument(
        "model", metavar="MODEL", help="fashion-resnet, package.module:factory, FILE.pt2, ..."
    )
    verb.add_argument("--weights", metavar="FILE", help="safetensors for MODEL")
    verb.add_argument(
        "--data", metavar="DATA", help="fashion-mnist, imagefolder:DIR, npz:FILE, module:factory"
    )
    if score:
        verb.add_argument(
            "--evaluate", metavar="SCORE", help="top1, agreement (default) or module:function"
        )


def _measuring(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--no-latency", action="store_true", help="do not time the options")
    verb.add_argument("--resume", metavar="DIR", help="keep what is finished there, and go on")
    verb.add_argument("--data-free", action="store_true", help="plain SVD of the weights")
    verb.add_argument(
        "--scheme", action="append", dest="schemes", metavar="NAME",
        help="a decomposition to plan with (see `sft list`; repeat; default: the target's)",
    )  # fmt: skip
    width = verb.add_mutually_exclusive_group()
    width.add_argument(
        "--weight-bits", type=int, nargs="+", metavar="N", help="widths on the menus (8 4 2)"
    )
    width.add_argument("--float", action="store_true", dest="in_float", help="round nothing")
    verb.add_argument(
        "--loss-aware", action="store_true", help="weigh output errors by the loss gradient"
    )
    verb.add_argument("--rank-multiple", type=int, metavar="N", help="default: the target's lanes")
    verb.add_argument("--anchor-samples", type=int, metavar="N", help="on which damage is measured")
    verb.add_argument(
        "--anchor-error", type=float, metavar="X", help="output error at which damage is measured"
    )


def _budget(verb: argparse.ArgumentParser) -> None:
    _limits(verb)
    verb.add_argument("--max-drop", type=float, help="of the score, in its own unit")
    verb.add_argument(
        "--minimize", choices=("size", "macs", "latency"), help="as far as --max-drop allows"
    )


def _limits(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--size", type=float, help="fraction of the original file")
    verb.add_argument("--macs", type=float, help="fraction of the original MACs")
    verb.add_argument("--latency", type=float, help="fraction of the original latency")
    verb.add_argument("--memory", type=float, help="fraction of the original activation memory")
    verb.add_argument("--size-bytes", type=int)
    verb.add_argument("--macs-count", type=int)
    verb.add_argument("--latency-ms", type=float)
    verb.add_argument("--memory-bytes", type=int)
    verb.add_argument(
        "--keep", action="append", default=[], metavar="LAYER", help="stays float (pattern; repeat)"
    )
    verb.add_argument(
        "--option", action="append", default=[], metavar="LAYER=SCHEME:RANK@BITS",
        help="set by hand (pattern; repeat)",
    )  # fmt: skip


def _training(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--steps", type=int, help="fine-tuning steps in float")
    verb.add_argument("--learning-rate", type=float)
    verb.add_argument("--minutes", type=float, help="end by the clock instead of after steps")
    verb.add_argument("--ema", type=float, metavar="DECAY", help="average the weights over steps")
    verb.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="keep what is best on the validation split; end after N judgements without a better",
    )
    verb.add_argument("--log", metavar="FILE", help="append events, one JSON object a line")
    verb.add_argument(
        "--save-every", type=float, metavar="SECONDS", help="between two stored states (20)"
    )


def _out(verb: argparse.ArgumentParser, default: str | None, metavar: str = "DIR") -> None:
    verb.add_argument("-o", "--out", default=default, metavar=metavar)
