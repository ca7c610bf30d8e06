"""How samples without splits of their own are divided: 80 % train, 10 % validation, 10 % test."""

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]

FEWEST = 10
CALIBRATION = 512
SEED = 0


def divide(count: int) -> dict[str, Positions]:
    """Positions of each split, in a seeded random order; the same for the same `count`.

    Calibration is up to `CALIBRATION` samples of train. Below `FEWEST` samples all of them are
    calibration, and there are no other splits.
    """
    if count < FEWEST:
        return {"calibration": np.arange(count)}
    order = np.random.default_rng(SEED).permutation(count)
    tenth = count // 10
    train = order[2 * tenth :]
    return {
        "calibration": train[:CALIBRATION],
        "train": train,
        "validation": order[:tenth],
        "test": order[tenth : 2 * tenth],
    }


def pick_calibration(count: int) -> Positions:
    """Up to `CALIBRATION` positions of `count` training samples, in a seeded random order."""
    return np.random.default_rng(SEED).permutation(count)[:CALIBRATION]
