"""A profile on disk: its statistics are read when they are first used, and not before."""

import dataclasses
import shutil
import subprocess
import sys

import pytest

from sft.core.errors import InputError
from sft.core.statistics import save_statistics
from sft.profiling.store import PROFILE_FILE, STATISTICS_FILE, load_profile, save_profile


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


def test_statistics_of_another_run_are_refused_at_once(profiled, folder, tmp_path) -> None:
    other = dataclasses.replace(profiled, fingerprint="weights:another")
    save_profile(other, tmp_path / "other")
    for ours, theirs in ((folder, tmp_path / "other"), (tmp_path / "other", folder)):
        mixed = tmp_path / f"mixed-{ours.name}"
        mixed.mkdir()
        shutil.copy(ours / PROFILE_FILE, mixed)
        shutil.copy(theirs / STATISTICS_FILE, mixed)
        with pytest.raises(InputError, match="of one run and the statistics"):
            load_profile(mixed)


def test_statistics_that_name_no_profile_are_taken(profiled, folder) -> None:
    save_statistics(profiled.statistics, folder / STATISTICS_FILE)  # as before they named one
    assert set(load_profile(folder).statistics) == set(profiled.statistics)
    (folder / STATISTICS_FILE).write_bytes(b"")
    assert load_profile(folder) == profiled


def test_equal_profiles_give_equal_bytes_and_none_has_statistics_too(profiled, tmp_path) -> None:
    bare = dataclasses.replace(profiled, statistics=None)
    for saved in (profiled, bare):
        contents = set()
        for name in ("a", "b"):
            save_profile(saved, tmp_path / name)
            contents.add((tmp_path / name / STATISTICS_FILE).read_bytes())
        assert len(contents) == 1
    assert dict(load_profile(tmp_path / "a").statistics) == {}


def test_a_file_where_the_folder_should_be_is_refused(profiled, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"'{place}' cannot be written"):
            save_profile(profiled, place)
    assert (tmp_path / "file").read_text() == "mine"


def test_planning_from_a_stored_profile_needs_no_pytorch(folder) -> None:
    code = (
        "import sys; from sft.cli import main; "
        f"code = main(['plan', {str(folder)!r}, '--size', '0.5', '--quiet']); "
        "assert code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
