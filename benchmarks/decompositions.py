"""How fast the decompositions are: the convolution shapes of ResNet-50, beside two libraries.

    python benchmarks/decompositions.py            all 23 shapes
    python benchmarks/decompositions.py --quick    five of them; writes no file

Kernels are drawn with the spectrum of trained ones (`resnet50_kernels`). Everything starts and ends
in float64, on one thread, and is timed in turn in one run: medians of three rounds (one for what
takes over two seconds) of the processor's time, which is what the clock of an idle machine shows;
the ratios by the clock are given too.

Ours: all errors of all ranks of every scheme that splits the shape (`analyse`), and the refined
factors of one rank: `tucker2` at a quarter of the channels on both sides, `separable` with half as
many terms as outputs and penalty 1e-4. That bounds the energies of the terms to about 20 times the
kernel's; those of `parafac` have no bound. Both are in the table.

tensorly, one rank each: `partial_tucker` on modes (0, 1) and `parafac`, in the faster of its numpy
and torch backends, from the SVD, tolerance 1e-8, stopped by the first iteration whose squared
relative error is at most 1.01 times ours, at the latest after 100 and 300 iterations; their time
counts then. Beside it the best that was found for `parafac`: in float32 with its line search, which
is off by default. A pointwise kernel is a matrix, for which both methods are the SVD: it is not
compared with tensorly.

torch: `torch.linalg.svd` for each of 16 ranks, for the schemes that are an SVD (`channel_in`,
`channel_out`, `spatial`); one is timed and counted 16 times.

* `speedup_vs_tensorly`: tensorly's time for one rank of both methods over ours for all ranks and
  the refined factors of the two schemes, summed over the shapes.
* `error_ratio_vs_tensorly`: median of our squared error over tensorly's, shapes and methods.
* `gemm_share`: FLOPs of `analyse` of the five closed forms (`closed_form_flops`) over its time,
  relative to the rate of a 1024 x 1024 float64 product, for kernels of 2^19 weights and more.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from decompositions_report import PEERS, TUNED, WANTED, Row, show, spent, verdict, write
from resnet50_kernels import (
    Shape,
    closed_form_flops,
    drawn_kernel,
    geometry_of_shape,
    resnet50_shapes,
    unfoldings,
)
from tensorly_peer import (
    PARAFAC_CAP,
    Found,
    faster_backends,
    iterations_needed,
    parafac,
    partial_tucker,
)
from torch import Tensor

from sft.core.kernels import build_layer
from sft.decompositions import data_error, decompositions
from sft.decompositions.polyadic import fit_terms
from sft.decompositions.tucker2 import rotate_subspaces

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
QUICK = [(64, 3, 7, 2), (64, 64, 3, 1), (1024, 256, 1, 1), (128, 128, 3, 1), (256, 256, 3, 1)]
WITHIN, PENALTY = 1.01, 1e-4
ROUNDS, LONG_SECONDS, LARGE = 3, 2.0, 2**19

Tasks = dict[str, Callable[[], Any]]


def main() -> None:
    if any(os.environ.get(name) != count for name, count in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    options = _parse()
    torch.set_num_threads(1)
    backends = faster_backends(drawn_kernel((256, 256, 3, 1), 0)[0], (64, 64), 128)
    rows: list[Row] = []
    for seed, shape in enumerate(QUICK if options.quick else resnet50_shapes()):
        rows.append(measure(shape, seed, backends))
        show(rows[-1], header=not seed)
    figures = _figures(rows)
    details = _details(rows) | {f"backend of {peer}": own for peer, own in backends.items()}
    for name, value in details.items():
        print(f"{name:60} {value if isinstance(value, str) else f'{value:10.3f}'}")
    if not options.quick:
        print(f"written to {write(figures, details, rows)}")
    for name, value in figures.items():
        wanted = " ".join(map(str, WANTED[name]))
        print(f"{name:28} {value:8.3f}  wanted {wanted}  {verdict(name, value)}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five shapes; no file is written")
    return parser.parse_args()


def measure(shape: Shape, seed: int, backends: dict[str, str]) -> Row:
    """Times and errors of one shape."""
    geometry, kernel = geometry_of_shape(shape), drawn_kernel(shape, seed)
    probe, square = build_layer(geometry, bias=False), torch.randn(1024, 1024).double()
    schemes = [name for name in decompositions if not decompositions[name].unsupported(probe)]
    row: Row = {"shape": shape, "schemes": schemes}
    tasks: Tasks = {"gemm": lambda: square @ square}
    for name in schemes:
        tasks[name] = lambda method=decompositions[name]: method.analyse(kernel, geometry, None)
    for name, matrix in unfoldings(kernel, shape).items():
        tasks[f"svd {name}"] = lambda m=matrix: torch.linalg.svd(m, full_matrices=False)
    pairs = [] if geometry.pointwise else list(PEERS)
    if pairs:
        tasks |= _comparison(row, kernel, shape, backends)
    row["seconds"], row["clock"], results = _in_turn(tasks)
    for name in pairs:
        found: Found = results[PEERS[name]]
        row[f"error {name}"] = _error(kernel, results[f"{name} factors"], name, row)
        row[f"error {PEERS[name]}"] = _error(kernel, found.kernels, name, row)
        row[f"iterations {PEERS[name]}"] = found.iterations
    if pairs:
        row["growth separable"] = _growth(kernel, results["separable factors"])
        row["growth parafac"] = _growth(kernel, results["parafac"].kernels)
    return row


def _comparison(row: Row, kernel: Tensor, shape: Shape, backends: dict[str, str]) -> Tasks:
    """Refined factors of one rank of both schemes, and tensorly's."""
    outer, inner = shape[0] // 4, max(1, shape[1] // 4)
    terms, dense = shape[0] // 2, kernel[0]
    row["rank tucker2"], row["rank separable"] = (inner, outer), (terms,)
    menu = decompositions["tucker2"].analyse(kernel, geometry_of_shape(shape), None)

    def tucker2() -> list[Tensor]:
        return rotate_subspaces(kernel, menu.factors((inner, outer)))

    def separable() -> list[Tensor]:
        return fit_terms(kernel, terms, PENALTY)

    backend = backends["partial_tucker"]
    wanted = [
        WITHIN * _error(kernel, make(), name, row)
        for name, make in (("tucker2", tucker2), ("separable", separable))
    ]
    needed = iterations_needed(dense, (inner, outer), wanted[0], backend)
    return {
        "tucker2 factors": tucker2,
        "partial_tucker": lambda: partial_tucker(dense, (inner, outer), needed, backend)[0],
        "separable factors": separable,
        "parafac": lambda: parafac(dense, terms, wanted[1], backends["parafac"], False),
        TUNED: lambda: parafac(dense.float(), terms, wanted[1], backends["parafac"], True),
    }


def _in_turn(tasks: Tasks) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Medians of the processor's seconds and of the clock's, and the last result, by task."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    clock: dict[str, list[float]] = {name: [] for name in tasks}
    results: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            if sum(seconds[name]) > LONG_SECONDS:
                continue
            before = time.perf_counter(), time.process_time()
            results[name] = task()
            seconds[name].append(time.process_time() - before[1])
            clock[name].append(time.perf_counter() - before[0])
    median = statistics.median
    return (
        {name: median(own) for name, own in seconds.items()},
        {name: median(own) for name, own in clock.items()},
        results,
    )


def _error(kernel: Tensor, kernels: list[Tensor], scheme: str, row: Row) -> float:
    """Squared error of a chain, relative to the kernel's energy, from the kernel it stands for."""
    geometry = geometry_of_shape(row["shape"])
    parts = decompositions[scheme].factors(geometry, row[f"rank {scheme}"])
    return data_error(kernel, kernels, parts, geometry, None)


def _growth(kernel: Tensor, kernels: list[Tensor]) -> float:
    """Energies of the terms of a separable chain, summed, relative to the kernel's."""
    first, taps, last = kernels
    energies = first.square().sum((2, 3))[0] * taps.square().sum((1, 2, 3))
    return float((energies * last.square().sum((1, 3))[0]).sum() / kernel.square().sum())


def _figures(rows: list[Row]) -> dict[str, float]:
    done = possible = 0.0
    for row in (row for row in rows if _weights(row) >= LARGE):
        flops = closed_form_flops(row["shape"])
        done += sum(flops.values())
        rate = 2 * 1024**3 / row["seconds"]["gemm"]
        possible += rate * sum(row["seconds"][name] for name in flops)
    return {
        "speedup_vs_tensorly": _ratio(rows, "tensorly", "ours"),
        "error_ratio_vs_tensorly": statistics.median(_error_ratios(rows)),
        "gemm_share": done / possible,
    }


def _ratio(rows: list[Row], above: str, below: str, kind: str = "seconds") -> float:
    compared = [row for row in rows if above != "tensorly" or row["shape"][2] > 1]
    totals = [spent(row, kind) for row in compared]
    return sum(own[above] for own in totals) / sum(own[below] for own in totals)


def _error_ratios(rows: list[Row]) -> list[float]:
    return [
        row[f"error {name}"] / row[f"error {peer}"]
        for row in rows
        for name, peer in PEERS.items()
        if f"error {name}" in row
    ]


def _weights(row: Row) -> int:
    outputs, inputs, extent, _ = row["shape"]
    return int(outputs * inputs * extent**2)


def _details(rows: list[Row]) -> dict[str, float | str]:
    """What else there is to know, of all shapes together."""
    compared = [row for row in rows if row["shape"][2] > 1]
    ratios = _error_ratios(rows)

    def total(task: str) -> float:
        return sum(row["seconds"][task] for row in compared)

    def pair(scheme: str, peer: str) -> float:
        return total(peer) / (total(scheme) + total(f"{scheme} factors"))

    capped = sum(row["iterations parafac"] >= PARAFAC_CAP for row in compared)
    return {
        "speedup, by the clock": _ratio(rows, "tensorly", "ours", "clock"),
        "speedup, our time for all schemes": _ratio(rows, "tensorly", "all"),
        "speedup, tucker2 beside partial_tucker": pair("tucker2", "partial_tucker"),
        "speedup, separable beside parafac": pair("separable", "parafac"),
        f"speedup, separable beside {TUNED}": pair("separable", TUNED),
        "error ratio, worst": max(ratios),
        "parafac stopped by the cap, of shapes": f"{capped} of {len(compared)}",
        **{
            f"seconds, {task}": total(task)
            for scheme in PEERS
            for task in (scheme, f"{scheme} factors")
        },
        "one SVD for each of 16 ranks / our menus": _ratio(rows, "svd", "svd_menus"),
        "seconds, ours, two schemes": sum(spent(row)["ours"] for row in compared),
        "seconds, ours, all schemes": sum(spent(row)["all"] for row in rows),
        "seconds, tensorly": sum(spent(row)["tensorly"] for row in rows),
    }


if __name__ == "__main__":
    main()
