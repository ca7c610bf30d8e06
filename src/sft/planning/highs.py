"""The calls of HiGHS: pick one option per group, minimise a sum, obey limits on other sums."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, cast

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from sft.core.errors import SFTError
from sft.planning.table import Floats, Ints


def choose(
    objective: Floats,
    group: Ints,
    rows: Sequence[Floats],
    limits: Sequence[float],
    excluded: Sequence[Ints] = (),
    relative_gap: float = 0.0,
) -> tuple[Ints, float] | None:
    """Indices of the chosen options, one a group, and the dual bound; None when infeasible.

    objective : ``(N,)``. group : ``(N,)``, not decreasing, 0 to G-1, none empty.
    rows, limits : each ``(N,)`` and the most its sum over the chosen may be. HiGHS takes 1e-6 of
        absolute violation for none, so scale rows well above 1 and check the answer.
    excluded : choices, each ``(G,)``, that must not come again.
    Raises `SFTError` when HiGHS gives up.
    """
    count, groups = len(objective), int(group[-1]) + 1
    one_each = scipy.sparse.csr_array(
        (np.ones(count), (group, np.arange(count))), shape=(groups, count)
    )
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    if rows:
        constraints.append(LinearConstraint(np.stack(rows), -np.inf, np.array(limits)))
    for choice in excluded:
        row = np.zeros(count)
        row[choice] = 1.0
        constraints.append(LinearConstraint(row[None], -np.inf, groups - 1.0))
    with quiet_c_code():
        result = milp(
            objective,
            integrality=np.ones(count, dtype=np.intp),
            bounds=Bounds(0.0, 1.0),
            constraints=constraints,
            options={"mip_rel_gap": relative_gap},
        )
    if result.x is None:
        # Every variable is bounded, so "infeasible or unbounded" leaves one of the two.
        if result.status == 2 or "infeasible or unbounded" in result.message.lower():
            return None
        raise SFTError(f"The solver HiGHS gave up on the plan: {result.message}")
    starts = np.append(np.flatnonzero(np.diff(group, prepend=-1)), count)
    picked = [a + int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)]
    dual = result.fun if result.mip_dual_bound is None else result.mip_dual_bound
    return np.array(picked, dtype=np.intp), float(dual)


def prices(objective: Floats, group: Ints, rows: Floats) -> Floats | None:
    """What one more unit of each limited sum is worth when fractions of options may be picked.

    objective : ``(N,)``. group : as for `choose`. rows : ``(K, N)``, sums of at most 1.
    Returns ``(K,)``, none below 0; None when infeasible. Raises `SFTError` when HiGHS gives up.
    """
    count, groups = len(objective), int(group[-1]) + 1
    one_each = scipy.sparse.csr_array(
        (np.ones(count), (group, np.arange(count))), shape=(groups, count)
    )
    with quiet_c_code():
        result = linprog(
            objective, A_ub=rows, b_ub=np.ones(len(rows)),
            A_eq=cast(Any, one_each), b_eq=np.ones(groups), method="highs",
        )  # fmt: skip
    if result.status == 2:
        return None
    if result.status != 0:
        raise SFTError(f"The solver HiGHS gave up on the plan: {result.message}")
    found: Floats = np.maximum(-result.ineqlin.marginals, 0.0)
    return found


@contextmanager
def quiet_c_code() -> Iterator[None]:
    """Drop what C code prints to standard output meanwhile.

    The HiGHS inside scipy 1.17 prints a debugging line on some problems, whatever its options say
    (`HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();`). On standard output
    it would break `--json`, and it tells users nothing.
    """
    try:
        saved = os.dup(1)
    except OSError:  # there is no standard output to keep clean
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        _flush_c_stdout()
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush_c_stdout()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _flush_c_stdout() -> None:
    """What C printed waits in a buffer of its own; only where the stream can be reached."""
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    for name in ("stdout", "__stdoutp"):  # Linux, macOS
        with suppress(ValueError):
            libc.fflush(ctypes.c_void_p.in_dll(libc, name))
