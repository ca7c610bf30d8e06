"""The one call of the solver."""

import ctypes
import os

import numpy as np
import pytest

from sft.planning.highs import _flush_c_stdout, choose, quiet_c_code

GROUP = np.array([0, 0, 1, 1])
OBJECTIVE = np.array([0.0, 2.0, 1.0, 4.0])


def test_choice_and_dual_bound():
    chosen, dual = choose(OBJECTIVE, GROUP, [], [])
    assert chosen.tolist() == [0, 2]
    assert dual == pytest.approx(1.0)


def test_rows_limit_the_choice():
    row = np.array([1.0, 0.0, 1.0, 0.0])
    chosen, _ = choose(OBJECTIVE, GROUP, [row], [1.0])
    assert chosen.tolist() == [1, 2]
    assert choose(OBJECTIVE, GROUP, [row], [-1.0]) is None


def test_excluded_choices_do_not_come_again():
    excluded = []
    for expected in ([0, 2], [1, 2], [0, 3], [1, 3]):
        chosen, _ = choose(OBJECTIVE, GROUP, [], [], excluded)
        assert chosen.tolist() == expected
        excluded.append(chosen)
    assert choose(OBJECTIVE, GROUP, [], [], excluded) is None


@pytest.mark.skipif(os.name != "posix", reason="C output is only redirected on POSIX")
def test_what_c_code_prints_is_shown_nowhere(capfd):
    libc = ctypes.CDLL(None)
    with quiet_c_code():
        libc.puts(b"from C")
    libc.puts(b"after")
    _flush_c_stdout()
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "")
