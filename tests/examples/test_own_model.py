"""The example of an own model runs and meets its budget."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"


def test_own_model(tmp_path) -> None:
    result = runpy.run_path(str(EXAMPLE))["main"](str(tmp_path / "out"))
    assert result.met
    assert result.check.passed
    assert result.data["after"]["macs"] < 0.6 * result.data["before"]["macs"]
    assert (tmp_path / "out" / "report.html").is_file()
