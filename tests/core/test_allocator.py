"""Inside, freed memory stays with the process; outside, it goes back. Nothing else changes."""

import subprocess
import sys

import pytest

from sft.core import allocator
from sft.core.allocator import kept_memory

LINUX = sys.platform.startswith("linux")


class Recorder:
    """Stands in for glibc's `mallopt`."""

    def __init__(self) -> None:
        self.options: list[tuple[int, int]] = []

    def __call__(self, name: int, value: int) -> int:
        self.options.append((name, value))
        return 1


def test_the_settings_are_made_once_and_taken_back_once(monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(allocator, "_mallopt", lambda: recorder)
    with kept_memory():
        assert len(recorder.options) == 2
        with kept_memory():
            assert len(recorder.options) == 2
        assert len(recorder.options) == 2
    assert [name for name, _ in recorder.options] == [-4, -1, -4, -1]
    assert recorder.options[0][1] == 0
    assert recorder.options[2][1] > 0


def test_an_error_inside_takes_them_back_too(monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(allocator, "_mallopt", lambda: recorder)
    with pytest.raises(ValueError, match="inside"), kept_memory():
        raise ValueError("inside")
    assert len(recorder.options) == 4
    assert allocator._depth == 0


def test_without_glibc_nothing_happens(monkeypatch) -> None:
    monkeypatch.setattr(allocator, "_mallopt", lambda: None)

    @kept_memory()
    def work() -> int:
        return allocator._depth

    assert work() == 0


FAULTS = """
import resource, torch
from sft.core.allocator import kept_memory

def faults_of_ten():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB: by default a mapping of its own each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults_of_ten()
with kept_memory():
    faults_of_ten()  # the first few: a freed piece can be a little too short for its like
    print(usual, faults_of_ten())
"""


@pytest.mark.skipif(not LINUX, reason="page faults are counted by the kernel of Linux")
def test_large_tensors_that_come_again_cost_no_new_pages() -> None:
    # A process of its own: which free piece of a heap is taken depends on what was freed before.
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, run.stdout.split())
    assert kept < usual / 5
