"""Run, time and profile an exported file in a child process.

A runtime that crashes on a file takes the child with it; here that is a `RuntimeFailure` which
names the file.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sft.core.errors import InputError, RuntimeFailure
from sft.core.records import Artifact, Timing
from sft.runtimes import RUNTIMES
from sft.runtimes.adapter import Array, Kernel, Port, size_of
from sft.runtimes.protocol import Header, receive, send
from sft.runtimes.targets import find_target

if TYPE_CHECKING:
    import torch

__all__ = ["Kernel", "Runner", "benchmark", "benchmark_interleaved", "predict_with"]

PACKET = 2**24  # bytes sent at once, so that the child's memory does not grow with the samples


class Runner:
    """A file loaded by its runtime in a child process; a context manager.

    Raises `InputError` for a missing file, an unknown or missing runtime or a file that does not
    take one sample of one input a run; `RuntimeFailure` when the runtime refuses it or crashes.
    """

    def __init__(self, path: str | Path, runtime: str, threads: int = 1) -> None:
        self.path, self.runtime, self.threads = Path(path), runtime, threads
        RUNTIMES[runtime]
        if threads < 1:
            raise InputError(f"threads={threads}: at least 1 is wanted.")
        _check_file(self.path)
        self._scratch = tempfile.TemporaryDirectory(prefix="sft-")
        self._log = Path(self._scratch.name) / "stderr"
        self._process = self._start()
        try:
            self.load(path)
        except BaseException:
            self.close()
            raise

    def load(self, path: str | Path) -> None:
        """Let the same child load another file in place of the one that it has.

        Raises as the constructor does. A child that refuses a file has none, but can load the next;
        one that crashed cannot.
        """
        self.path = Path(path)
        _check_file(self.path)
        found = {"path": str(self.path.resolve()), "threads": self.threads}
        reply, _ = self._ask({"do": "load", "runtime": self.runtime, **found})
        self.input = self._checked_input(reply)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def run(self, x: Array) -> Array:
        """The file's first output for each sample: (N, ...) -> (N, ...).

        Raises `InputError` unless `x` has the file's dtype and sample shape.
        """
        self._check(x)
        count = max(1, PACKET // max(1, x[:1].nbytes))
        outputs = []
        for start in range(0, len(x), count):
            _, y = self._ask({"do": "run"}, x[start : start + count])
            if y is None:
                raise RuntimeFailure(f"{self._who()} gave no output.")
            outputs.append(y)
        return np.concatenate(outputs)

    def time(self, count: int) -> list[float]:
        """Seconds of each of `count` runs, on the last sample given or fixed noise."""
        if count < 1:
            raise InputError(f"{count} runs cannot be timed: at least 1 is wanted.")
        seconds: list[float] = self._ask({"do": "time", "count": count})[0]["seconds"]
        return seconds

    def place(self) -> tuple[Kernel, ...]:
        """The nodes that multiply, as the runtime executes them after optimising the graph."""
        reply, _ = self._ask({"do": "place", "folder": self._scratch.name})
        return tuple(Kernel(**kernel) for kernel in reply["kernels"])

    def peak_memory(self) -> int:
        """Greatest resident memory of the child so far, in bytes (0: the system does not tell).

        Of all files that it loaded: ask before `place`, which loads the file a second time.
        """
        return int(self._ask({"do": "memory"})[0]["bytes"])

    def close(self) -> None:
        """End the child; a second call does nothing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes for a dead child
                    stream.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "sft.runtimes.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
            )

    def _ask(self, request: Header, array: Array | None = None) -> tuple[Header, Array | None]:
        """Send one request and wait for its reply."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise RuntimeFailure(f"{self._who()} was closed. Open it again.")
        try:
            send(stdin, request, array)
            reply, result = receive(stdout)
        except (EOFError, OSError):
            raise RuntimeFailure(self._obituary()) from None
        except BaseException:  # a reply half read would be taken for the next one
            self.close()
            raise
        if "error" in reply:
            if reply["kind"] == "missing":
                raise InputError(f"Cannot run '{self.path}': {reply['error']}")
            what = "refused" if request["do"] == "load" else f"failed to {request['do']}"
            raise RuntimeFailure(f"{self.runtime} {what} '{self.path}': {reply['error']}")
        return reply, result

    def _obituary(self) -> str:
        """How the child ended, with the last line it wrote."""
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
        said = self._log.read_text(errors="replace")[-2000:].strip().splitlines()
        last = f" It said: {said[-1]}" if said else ""
        return f"{self._who()} died ({how}).{last}"

    def _who(self) -> str:
        return f"The process that ran '{self.path}' in {self.runtime}"

    def _checked_input(self, reply: Header) -> Port:
        """The file's only input, which must take one sample a run."""
        ports = [Port(p["name"], tuple(p["shape"]), p["dtype"]) for p in reply["inputs"]]
        if len(ports) != 1:
            names = ", ".join(p.name for p in ports)
            raise InputError(f"'{self.path}' has {len(ports)} inputs ({names}); one is wanted.")
        if not ports[0].shape or ports[0].shape[0] not in (1, None):
            raise InputError(
                f"'{self.path}' takes an input of shape {ports[0].shape}; one sample a run "
                f"(1, ...) is wanted. Export it with a batch of 1."
            )
        return ports[0]

    def _check(self, x: Array) -> None:
        wanted, given = self.input.shape[1:], tuple(x.shape[1:])
        fits = len(wanted) == len(given) and all(
            w in (None, g) for w, g in zip(wanted, given, strict=True)
        )
        if x.ndim < 1 or not fits or size_of(x.shape) == 0:
            expected = ", ".join(["N", *("any" if w is None else str(w) for w in wanted)])
            raise InputError(
                f"'{self.path}' takes samples of shape ({expected}); an array of shape "
                f"{tuple(x.shape)} was given."
            )
        if x.dtype != np.dtype(self.input.dtype):
            raise InputError(f"'{self.path}' takes {self.input.dtype}; {x.dtype} was given.")


def benchmark(artifact: Artifact, threads: int = 1, rounds: int = 15, runs: int = 20) -> Timing:
    """Latency and memory of one exported file, in the runtime of its target."""
    runtime = find_target(artifact.target).runtime
    return benchmark_interleaved([artifact], runtime, threads, rounds, runs)[0]


def benchmark_interleaved(
    artifacts: Sequence[Artifact], runtime: str, threads: int = 1, rounds: int = 15, runs: int = 20
) -> tuple[Timing, ...]:
    """Latency and memory of several files, measured in turn so that drift hits all alike.

    Each file has its own child. After a round that only warms up, each of `rounds` rounds times
    `runs` runs of each file; the median, minimum and 90th percentile are over all of them.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least 1 is wanted.")
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(Runner(a.path, runtime, threads)) for a in artifacts]
        seconds: list[list[float]] = [[] for _ in runners]
        for index in range(rounds + 1):
            for runner, found in zip(runners, seconds, strict=True):
                measured = runner.time(runs)
                if index > 0:
                    found.extend(measured)
        pairs = zip(runners, seconds, strict=True)
        return tuple(_timing(s, r.peak_memory(), threads) for r, s in pairs)


def predict_with(runner: Runner) -> "Callable[[torch.Tensor], torch.Tensor]":
    """The file as a function of a batch of tensors, for `evaluate` and for comparisons."""
    import torch

    def predict(x: torch.Tensor) -> torch.Tensor:
        given: Any = x.detach().cpu().numpy()
        return torch.from_numpy(runner.run(given))

    return predict


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"Cannot run '{path}': there is no such file.")


def _timing(seconds: list[float], peak_memory: int, threads: int) -> Timing:
    return Timing(
        latency_ms=statistics.median(seconds) * 1e3,
        latency_ms_min=min(seconds) * 1e3,
        latency_ms_p90=float(np.quantile(seconds, 0.9)) * 1e3,
        peak_memory_bytes=peak_memory,
        runs=len(seconds),
        threads=threads,
    )
