"""Outputs are refused before the work, and only a path's own leftovers are deleted."""

import os
from pathlib import Path

import pytest

from sft.core.errors import InputError
from sft.core.files import check_output, remove_unfinished, write_text


def test_what_a_killed_write_left_is_deleted_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "t[1].safetensors"
    others = [
        "t[1].safetensors.abcd1234",
        ".t1.safetensors.abcd1234",
        ".t[1].safetensors.state",
        ".t[1].safetensors.backup-1",
        ".t[1].safetensors.abcd1234.old",
        "..t[1].safetensors.state.abcd1234",
    ]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    (tmp_path / ".t[1].safetensors.folder_1").mkdir()
    write_text(path, "whole")
    before = {p.name for p in tmp_path.iterdir()}
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", _interrupted)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert len({p.name for p in tmp_path.iterdir()} - before) == 1
    remove_unfinished(path)
    assert {p.name for p in tmp_path.iterdir()} == before
    remove_unfinished(tmp_path / "none" / "t.safetensors")


def test_an_output_is_checked_and_nothing_is_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "file")
    check_output(tmp_path / "a" / "b" / "new")
    check_output(tmp_path, folder=True)
    check_output(tmp_path / "a" / "new", folder=True)
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path)
    for path, folder in (("file/new", False), ("file", True), ("file/a/new", True)):
        with pytest.raises(InputError, match="cannot be written"):
            check_output(tmp_path / path, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
