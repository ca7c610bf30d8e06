"""The import ladder, and that `import sft` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sft

SOURCE = Path(sft.__file__).parent
RUNGS = {
    "core": 0,
    "layers": 1,
    "models": 1,
    "quantizers": 1,
    "planning": 1,
    "runtimes": 1,
    "reporting": 1,
    "decompositions": 2,
    "surgery": 3,
    "profiling": 4,
    "calibration": 5,
    "exporters": 6,
    "training": 6,
    "verification": 6,
    "pipeline": 7,
    "accuracy_floor": 7,
    "measure": 7,
    "planned": 7,
    "job": 7,
    "outcome": 7,
    "workspace": 7,
    "arguments": 8,
    "commands": 8,
    "cli": 8,
}
TOP = {"__init__", "__main__"}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of `sft` that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sft" and len(parts) > 1:
                found.add(parts[1])
    return found & set(RUNGS)


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if room_of(p) not in TOP]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_its_own_room_and_lower_rungs_only(path: Path) -> None:
    room = room_of(path)
    assert room in RUNGS, f"{path}: a new room needs a rung"
    for other in imported_rooms(path) - {room}:
        same_top = RUNGS[room] == RUNGS[other] >= 7
        assert RUNGS[other] < RUNGS[room] or same_top, f"{path} ({room}) imports {other}"


def test_top_files_have_no_import_cycle() -> None:
    graph = {p.stem: imported_rooms(p) - {p.stem} for p in SOURCE.glob("*.py") if p.stem not in TOP}

    def reach(name: str, seen: frozenset[str]) -> None:
        assert name not in seen, f"import cycle through {name}"
        for other in graph.get(name, set()):
            reach(other, seen | {name})

    for name in graph:
        reach(name, frozenset())


def test_no_utils_files() -> None:
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in ("utils", "helpers", "common")]


def test_import_is_light() -> None:
    code = "import sft, sft.cli, sys; print(','.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.strip().split(",")}
    heavy = {"torch", "torchao", "onnx", "onnxruntime", "scipy", "numpy", "pydantic", "jinja2"}
    assert not loaded & heavy


def test_public_names_are_sorted_and_exist() -> None:
    assert sft.__all__ == sorted(sft.__all__)
    for name in sft.__all__:
        assert getattr(sft, name) is not None


def test_version_is_in_the_changelog() -> None:
    changelog = SOURCE.parents[1] / "CHANGELOG.md"
    assert f"## {sft.__version__}" in changelog.read_text()


def test_every_public_name_has_a_docstring() -> None:
    missing = [n for n in sft.__all__ if not (getattr(sft, n).__doc__ or "").strip()]
    assert not missing
