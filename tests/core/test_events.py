"""The log of events is refused when it is made, and goes on where it was cut off."""

import json

import pytest

from sft.core.errors import InputError
from sft.core.events import ContinuedJsonLines, JsonLines


def test_a_log_that_cannot_be_written_is_refused_when_it_is_made(tmp_path, monkeypatch) -> None:
    for path in (tmp_path / "none" / "log", tmp_path):
        with pytest.raises(InputError, match=f"'{path}' cannot be written"):
            JsonLines(path)
    monkeypatch.setenv("RANK", "1")  # one that will not write
    JsonLines(tmp_path / "none" / "log")


def test_a_log_keeps_what_it_had(tmp_path) -> None:
    path = tmp_path / "log"
    for step in (50, 50):
        JsonLines(path)({"event": "step", "step": step})
    assert path.read_text().count("\n") == 2


def test_a_continued_log_tells_what_is_new(tmp_path) -> None:
    path = tmp_path / "log"
    told = [
        {"event": "phase", "phase": "a"},
        {"event": "step", "step": 50},
        {"event": "step", "step": 100},
        {"event": "ranks"},
        {"event": "phase", "phase": "b"},
        {"event": "step", "step": 50},
    ]
    first = ContinuedJsonLines(path)
    for event in told[:3]:
        first(event)
    with path.open("a") as file:
        file.write('{"time": 1.0, "eve')
    second = ContinuedJsonLines(path)
    for event in [*told, told[-1]]:  # told twice by one run: both are kept
        second(event)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{k: v for k, v in e.items() if k != "time"} for e in written] == [*told, told[-1]]
    path.write_text("{\n")
    with pytest.raises(InputError, match="damaged"):
        ContinuedJsonLines(path)
