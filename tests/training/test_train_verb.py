"""The command `train`: what it writes, and that it goes on where it was interrupted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.cli import INTERRUPTED, build_parser, main
from sft.core.errors import BudgetError
from sft.core.files import sha256, write_text
from sft.core.records import Artifact
from sft.training.checkpoint import Checkpoint

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
import torch
from torch import nn
from conftest import made_images
from sft.core.data import Batches, Data

def tiny_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ).eval()

def few_images():
    x, y = made_images(32, 0)
    return Data(*(Batches(x, y, 16, shuffle) for shuffle in (False, True, False, False)))
"""
FILES = {"plan.json", "model.onnx", "model.onnx.json", "model.safetensors", "events.jsonl"}


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """The command on a tiny network in the user's module, in an empty folder."""
    name = f"usernet_{tmp_path.name.replace('-', '_')}"
    text = FACTORY.format(tests=str(Path(__file__).parents[1]))
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["train", f"{name}:tiny_net", "--data", f"{name}:few_images", "--rank-multiple", "2"]
    return [*given, "--steps", "16", "-o", "made"]


@pytest.fixture
def quick(monkeypatch) -> Callable[[Any], None]:
    """Puts a stand-in, ``train(checkpoint, on_event)``, where the command trains and exports."""

    def save_packed(model: Any, path: Path) -> None:
        write_text(path, "packed")

    def replace(train: Callable[[Path, Any], None]) -> None:
        plan = SimpleNamespace(save=lambda path: write_text(path, "plan"), to_json=lambda: "")

        def trained(*_: Any, checkpoint: Path, on_event: Any, **__: Any) -> SimpleNamespace:
            train(checkpoint, on_event)
            return SimpleNamespace(model=None, plan=plan)

        monkeypatch.setattr("sft.training.end_to_end.train", trained)
        monkeypatch.setattr("sft.exporters.export", no_export)
        monkeypatch.setattr("sft.exporters.save_packed", save_packed)

    return replace


def events_in(folder: Path) -> list[dict[str, Any]]:
    """What the log tells, without the times."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k not in ("time", "seconds")} for e in events]


def delivered(folder: Path) -> set[str]:
    """The names in the folder, which the manifest knows and nothing else."""
    named = json.loads((folder / "manifest.json").read_text())["sha256"]
    names = {p.name for p in folder.iterdir()}
    assert set(named) == names - {"manifest.json"}
    return set(named)


@pytest.mark.slow
def test_the_command_writes_all_files_and_goes_on_when_it_is_interrupted(
    words, tmp_path, monkeypatch
) -> None:
    words += ["--macs", "0.6", "--bit-ramp", "--quiet"]
    stop: list[tuple[str, int]] = []
    seen: list[tuple[str, int]] = []

    def stored(self: Checkpoint, step: int) -> None:
        self.save(step)
        seen.append((self.path.stem, step))
        if seen[-1] in stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save_if_due", stored)
    assert main([*words, "-o", "whole"]) == 0
    whole, made = tmp_path / "whole", tmp_path / "made"
    assert delivered(whole) == FILES
    assert json.loads((whole / "model.onnx.json").read_text())["path"] == "whole/model.onnx"
    phases = [e["phase"] for e in events_in(whole) if e["event"] == "phase"]
    assert phases == ["shrink", "recover", "integers"]
    every, seen[:] = list(seen), []
    monkeypatch.setattr("sft.exporters.export", no_export)
    stop.append(("recover", 3))
    assert main(words) == INTERRUPTED
    assert [p.name for p in made.iterdir()] == [".sft-train"]
    stop.clear()
    assert main(words) == 0
    assert seen == every
    assert delivered(made) == FILES
    assert events_in(made) == events_in(whole)
    for name in ("plan.json", "model.safetensors"):
        assert sha256(made / name) == sha256(whole / name), name


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_leaves_the_profile_for_the_next_try(
    words, tmp_path, capsys
) -> None:
    words += ["--macs", "0.001"]
    assert main(words) == BudgetError.exit_code
    said = capsys.readouterr().err
    assert "the least is" in said
    assert "taken from the interrupted profile" not in said
    work = tmp_path / "made" / ".sft-train"
    assert list((tmp_path / "made").iterdir()) == [work]
    assert not list((work / "staged").iterdir())
    assert not list(work.glob("*.state"))
    assert main(words) == BudgetError.exit_code
    assert "3 layers: taken from the interrupted profile" in capsys.readouterr().err


def test_a_work_folder_that_was_being_deleted_does_not_stop_the_next_training(
    words, quick, tmp_path, monkeypatch
) -> None:
    quick(lambda states, _: (states / "shrink.state").write_text("") and None)
    words += ["--macs", "0.6", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        assert main(words) == INTERRUPTED
    assert (tmp_path / "made" / ".sft-trained" / "shrink.state").exists()
    quick(lambda states, _: fail_if((states / "shrink.state").exists()))
    assert main(words) == 0
    assert delivered(tmp_path / "made") == FILES


def test_half_written_files_of_a_killed_training_are_not_delivered(words, quick, tmp_path) -> None:
    staged = tmp_path / "made" / ".sft-train" / "staged"
    staged.mkdir(parents=True)
    (staged / ".plan.json.abc123").write_text("half of")
    quick(lambda *_: None)
    assert main([*words, "--macs", "0.6", "--quiet"]) == 0
    assert delivered(tmp_path / "made") == FILES


def test_the_log_tells_each_step_once_and_begins_anew_without_a_state(
    words, quick, tmp_path
) -> None:
    words += ["--macs", "0.6", "--quiet"]

    def train(told: int, kept: bool, steps: int) -> Callable[[Path, Any], None]:
        def run(states: Path, tell: Any) -> None:
            events = [{"event": "phase", "phase": p, "steps": steps} for p in ("shrink", "recover")]
            for event in (events[0], {"event": "step", "step": 50}, events[1])[:told]:
                tell(event)
            if kept:
                (states / "shrink.state").write_text("")
            if told < 3:
                with (states / "events.jsonl").open("a") as log:
                    log.write('{"event": "st')
                raise KeyboardInterrupt

        return run

    for told, kept, steps in ((1, False, 200), (2, True, 100), (2, True, 100)):
        quick(train(told, kept, steps))
        assert main(words) == INTERRUPTED
    quick(train(3, True, 100))
    assert main(words) == 0
    assert events_in(tmp_path / "made") == [
        {"event": "phase", "phase": "shrink", "steps": 100},
        {"event": "step", "step": 50},
        {"event": "phase", "phase": "recover", "steps": 100},
    ]


def test_every_part_can_be_left_out() -> None:
    words = ["train", "m", "--without", "shrinking", "--without", "product-decay"]
    assert build_parser().parse_args(words).without == ["shrinking", "product-decay"]


def no_export(model: Any, plan: Any, path: Path) -> Artifact:
    """A stand-in: the real one takes seconds."""
    write_text(path, "onnx")
    return Artifact(str(path), "onnxruntime", 4, sha256(path), (), False)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def fail_if(found: bool) -> None:
    assert not found
