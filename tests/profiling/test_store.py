"""A profile on disk: its statistics are read when they are first used, and not before."""

import subprocess
import sys

import pytest

from sft.core.errors import InputError
from sft.profiling.store import STATISTICS_FILE, load_profile, save_profile


@pytest.fixture
def folder(profiled, tmp_path):
    save_profile(profiled, tmp_path)
    return tmp_path


def test_what_is_read_is_what_was_saved(profiled, folder) -> None:
    found = load_profile(folder)
    assert found == profiled
    assert set(found.statistics) == set(profiled.statistics)
    assert len(found.statistics) == len(profiled.statistics) > 0
    for name, own in profiled.statistics.items():
        assert found.statistics[name].count == own.count
        assert found.statistics[name].patch_mean.equal(own.patch_mean)


def test_statistics_that_are_not_used_may_be_anything(profiled, folder) -> None:
    (folder / STATISTICS_FILE).write_bytes(b"no tensors")
    found = load_profile(folder)
    assert found == profiled
    with pytest.raises(InputError):
        len(found.statistics)


def test_statistics_that_changed_meanwhile_are_refused(folder) -> None:
    found = load_profile(folder)
    (folder / STATISTICS_FILE).write_bytes(b"other tensors")
    with pytest.raises(InputError, match="changed since"):
        found.statistics["body"]


def test_a_folder_without_statistics_is_refused_at_once(folder) -> None:
    (folder / STATISTICS_FILE).unlink()
    with pytest.raises(InputError, match="statistics"):
        load_profile(folder)


def test_planning_from_a_stored_profile_needs_no_pytorch(folder) -> None:
    code = (
        "import sys; from sft.cli import main; "
        f"code = main(['plan', {str(folder)!r}, '--size', '0.5', '--quiet']); "
        "assert code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
