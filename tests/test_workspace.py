"""What an interrupted run leaves in its hidden folder is taken up whole or not at all."""

import json
import shutil

import pytest

from sft.core.files import write_text
from sft.workspace import DONE, HIDDEN, Workspace


def test_half_written_files_of_an_earlier_run_are_not_delivered(tmp_path) -> None:
    (Workspace(tmp_path, "a").staged / ".result.json.x1y2").write_text("half of")
    again = Workspace(tmp_path, "a")
    write_text(again.staged / "result.json", "{}")
    again.deliver()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "result.json"]
    assert list(json.loads((tmp_path / "manifest.json").read_text())["sha256"]) == ["result.json"]


def test_finished_steps_stay_for_the_same_request_only(tmp_path) -> None:
    (Workspace(tmp_path, "a").root / "step").write_text("done")
    assert (Workspace(tmp_path, "a").root / "step").read_text() == "done"
    assert not (Workspace(tmp_path, "b").root / "step").exists()


def test_work_that_was_being_deleted_is_not_taken_up(tmp_path, monkeypatch) -> None:
    work = Workspace(tmp_path, "a")
    (work.root / "step").write_text("done")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.deliver()
    assert not (tmp_path / HIDDEN).exists()
    assert not (Workspace(tmp_path, "a").root / "step").exists()
    assert not (tmp_path / DONE).exists()


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
