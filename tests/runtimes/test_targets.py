"""The data files of the targets, and the choice for the machine at hand."""

import importlib
import json
import platform
from pathlib import Path

import pytest

from sft.core.errors import InputError
from sft.runtimes import RUNTIMES, targets
from sft.runtimes.targets import find_target, list_targets, machine


def test_all_files_load_under_their_names() -> None:
    files = sorted(p.stem for p in Path(targets.FOLDER).iterdir())
    assert [t.name for t in list_targets()] == files
    assert {"onnxruntime-avx2", "onnxruntime-vnni", "onnxruntime-arm64"} <= set(files)
    for name in files:
        assert find_target(name).name == name


@pytest.mark.parametrize("target", list_targets(), ids=lambda t: t.name)
def test_layout_fits_its_types(target: targets.Target) -> None:
    layout = target.layout
    ends = {"uint8": (0, 255), "int8": (-128, 127)}[layout.activation_dtype]
    assert (layout.activation_min, layout.activation_max) == ends
    assert -128 <= layout.weight_min < 0 < layout.weight_max <= 127
    assert target.note
    assert target.operators
    assert target.lane >= 1
    assert target.suffix[0] == "."


def test_two_products_fit_in_16_bits_without_vnni() -> None:
    layout = find_target("onnxruntime-avx2").layout
    assert layout.pair_sum is not None
    assert layout.activation_max * layout.pair_sum < 2**15
    assert layout.activation_max * (layout.pair_sum + 1) > 2**15 - 1  # one more would not
    assert layout.weight_max <= layout.pair_sum  # beside a zero, or one of the other sign


def test_nothing_is_mended_where_products_are_added_in_32_bits() -> None:
    for name in ("onnxruntime-vnni", "onnxruntime-arm64"):
        assert find_target(name).layout.pair_sum is None


def test_unknown_name_lists_known() -> None:
    with pytest.raises(InputError) as error:
        find_target("onnxruntime-avx3")
    for target in list_targets():
        assert target.name in str(error.value)


@pytest.mark.parametrize(
    ("arch", "flags", "want"),
    [
        ("aarch64", "", "arm64"),
        ("arm64", "", "arm64"),
        ("x86_64", "fpu avx2 sse", "avx2"),
        ("x86_64", "fpu avx2 avx512_vnni", "vnni"),
        ("AMD64", "fpu avx_vnni avx2", "vnni"),
        ("x86_64", None, "avx2"),
    ],
)
def test_a_runtime_s_name_means_the_machine_at_hand(
    arch: str, flags: str | None, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        # A second processor of another kind: the first one counts.
        info.write_text(f"model name\t: Some Chip\nflags\t\t: {flags}\n\nflags\t\t: avx512_vnni\n")
    monkeypatch.setattr(targets, "CPUINFO", info)
    monkeypatch.setattr(platform, "machine", lambda: arch)
    assert find_target("onnxruntime").name == f"onnxruntime-{want}"
    here = machine()
    assert here["instruction_set"] == want
    assert flags is None or here["processor"] == "Some Chip"


def test_machine_is_plain_and_complete() -> None:
    here = machine()
    assert json.loads(json.dumps(here)) == here
    assert here["processor"]
    assert here["logical_cores"] >= 1
    assert here["versions"]["python"] == platform.python_version()
    for package in ("torch", "onnxruntime"):
        assert here["versions"][package] == importlib.import_module(package).__version__
    assert {"onnx", "torchao"} <= set(here["versions"])


def test_every_target_has_a_runtime_and_every_runtime_a_target() -> None:
    assert {t.runtime for t in list_targets()} == set(RUNTIMES)


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_every_runtime_refuses_a_file_that_is_none(name: str, tmp_path: Path) -> None:
    module, kind = RUNTIMES[name].split(":")
    adapter = getattr(importlib.import_module(module), kind)
    (tmp_path / "empty").write_bytes(b"\xff not a model")
    with pytest.raises(Exception, match="empty"):
        adapter(str(tmp_path / "empty"), 1)
    for method in ("run", "place"):
        assert callable(getattr(adapter, method))
