"""The command `train`: what it writes, and that it goes on where it was interrupted."""

import json
from pathlib import Path

import pytest

from sft.cli import build_parser, main
from sft.core.errors import BudgetError

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from conftest import made_data, trained_net
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    name = f"usernet_{tmp_path.name.replace('-', '_')}"
    text = FACTORY.format(tests=str(Path(__file__).parents[1]))
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.slow
def test_the_command_writes_all_files_at_the_end(module, tmp_path, capsys) -> None:
    words = [
        "train", f"{module}:trained_net", "--data", f"{module}:made_data", "--macs", "0.5",
        "--rank-multiple", "2", "--steps", "16", "-o", "made", "--quiet", "--bit-ramp",
    ]  # fmt: skip
    assert main(words) == 0
    made = tmp_path / "made"
    names = {"plan.json", "model.onnx", "model.onnx.json", "model.safetensors", "events.jsonl"}
    assert {p.name for p in made.iterdir()} == names | {"manifest.json"}
    kinds = [json.loads(x)["event"] for x in (made / "events.jsonl").read_text().splitlines()]
    assert kinds.count("phase") == 3
    assert json.loads((made / "model.onnx.json").read_text())["path"] == "made/model.onnx"


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_leaves_nothing(module, tmp_path, capsys) -> None:
    words = [
        "train", f"{module}:trained_net", "--data", f"{module}:made_data", "--macs", "0.001",
        "--rank-multiple", "2", "-o", "made", "--quiet",
    ]  # fmt: skip
    assert main(words) == BudgetError.exit_code
    assert "the least is" in capsys.readouterr().err
    assert not (tmp_path / "made" / "model.onnx").exists()


def test_every_part_can_be_left_out() -> None:
    words = ["train", "m", "--without", "shrinking", "--without", "product-decay"]
    assert build_parser().parse_args(words).without == ["shrinking", "product-decay"]
