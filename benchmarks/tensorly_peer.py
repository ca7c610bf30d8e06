"""tensorly's two decompositions of one kernel at one rank, stopped at a wanted error.

Both start from the SVD of the unfoldings and keep tensorly's defaults but for the tolerance. An
error is the squared one relative to the kernel's energy.
"""

import dataclasses
import time
import warnings
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-8
TUCKER_CAP, PARAFAC_CAP = 100, 300
BACKENDS = ("numpy", "pytorch")


@dataclasses.dataclass(frozen=True)
class Found:
    """The chain of canonical kernels that tensorly's factors make, and the iterations taken."""

    kernels: list[Tensor]
    iterations: int


def partial_tucker(
    dense: Tensor, rank: tuple[int, int], iterations: int, backend: str
) -> tuple[Found, list[float]]:
    """`partial_tucker` of ``(o, i, S)`` on outputs and inputs, and the error of each iteration.

    rank : of inputs and outputs. iterations : how many at most.
    """
    decomposition, data = _loaded(dense, backend)
    (core, (u, v)), errors = decomposition.partial_tucker(
        data, [rank[1], rank[0]], modes=[0, 1], n_iter_max=iterations, tol=TOLERANCE
    )
    core, u, v = (torch.as_tensor(part) for part in (core, u, v))
    kernels = [v.T[None, ..., None], core[None], u[None, ..., None]]
    return Found(kernels, len(errors)), [float(error) ** 2 for error in errors]


def iterations_needed(dense: Tensor, rank: tuple[int, int], wanted: float, backend: str) -> int:
    """The least iterations of `partial_tucker` whose error is at most `wanted`; else the cap."""
    tried = 1
    while True:
        _, errors = partial_tucker(dense, rank, tried, backend)
        reached = [index for index, error in enumerate(errors, 1) if error <= wanted]
        if reached:
            return reached[0]
        if tried >= TUCKER_CAP or len(errors) < tried:
            return len(errors)
        tried = min(4 * tried, TUCKER_CAP)


def parafac(dense: Tensor, rank: int, wanted: float, backend: str, linesearch: bool) -> Found:
    """`parafac` of ``(o, i, S)``, stopped by the first iteration with an error of `wanted` or less.

    linesearch : that option of `parafac`, off by default.
    """
    decomposition, data = _loaded(dense, backend)
    done = -1  # it is first called before the first iteration

    def reached(_: Any, error: Any) -> bool:
        nonlocal done
        done += 1
        return done > 0 and bool(float(error) ** 2 <= wanted)

    weights, (a, b, c) = decomposition.parafac(
        data,
        rank,
        n_iter_max=PARAFAC_CAP,
        tol=TOLERANCE,
        random_state=0,
        linesearch=linesearch,
        callback=reached,
    )
    a, b, c = (torch.as_tensor(part).double() for part in (a * weights, b, c))
    kernels = [b.T[None, ..., None], c.T[:, None, None], a[None, ..., None]]
    return Found(kernels, done)


def faster_backends(dense: Tensor, rank: tuple[int, int], terms: int) -> dict[str, str]:
    """The backend in which each method takes less of the processor's time, by name."""
    seconds: dict[str, dict[str, float]] = {"partial_tucker": {}, "parafac": {}}
    for backend in (*BACKENDS, *BACKENDS):  # the second time is kept
        started = time.process_time()
        partial_tucker(dense, rank, 2, backend)
        between = time.process_time()
        parafac(dense, terms, 0.3, backend, False)
        seconds["partial_tucker"][backend] = between - started
        seconds["parafac"][backend] = time.process_time() - between
    return {method: min(own, key=own.__getitem__) for method, own in seconds.items()}


def _loaded(dense: Tensor, backend: str) -> tuple[Any, Any]:
    """tensorly's decompositions with this backend, and the kernel as its tensor."""
    try:
        import tensorly
        from tensorly import decomposition
    except ImportError:
        raise SystemExit("This comparison needs tensorly: pip install tensorly") from None
    tensorly.set_backend(backend)
    warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
    return decomposition, dense if backend == "pytorch" else dense.numpy()
