"""The child process that runs one file: `python -m sft.runtimes.worker`.

Answers requests on standard input (see `protocol`) until it is closed:

    {"do": "load", "runtime": .., "path": .., "threads": ..}   -> {"inputs": [..], "outputs": [..]}
    {"do": "run"} + array (N, ...)                             -> {} + array (N, ...)
    {"do": "time", "count": ..}                                -> {"seconds": [..]}
    {"do": "place", "folder": ..}                              -> {"kernels": [..]}
    {"do": "memory"}                                           -> {"bytes": ..}

A request that fails is answered by {"error": message, "kind": "missing" | "failed"}. Only NumPy and
the runtime are imported, so that time and memory are the runtime's own.
"""

import dataclasses
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from sft.runtimes import RUNTIMES
from sft.runtimes.adapter import Adapter, Array
from sft.runtimes.protocol import Header, receive, send

Reply = tuple[Header, Array | None]


class Worker:
    """One loaded file and the last sample it was given."""

    def __init__(self) -> None:
        self._adapter: Adapter | None = None
        self._sample: Array | None = None

    def answer(self, header: Header, array: Array | None) -> Reply:
        """The reply to one request."""
        actions: dict[str, Callable[[Header, Array | None], Reply]] = {
            "load": self._load,
            "run": self._run,
            "time": self._time,
            "place": self._place,
            "memory": lambda header, array: ({"bytes": peak_memory()}, None),
        }
        return actions[header["do"]](header, array)

    @property
    def adapter(self) -> Adapter:
        if self._adapter is None:
            raise ValueError("no file is loaded")
        return self._adapter

    def _load(self, header: Header, array: Array | None) -> Reply:
        self._adapter = self._sample = None
        module, name = RUNTIMES[header["runtime"]].split(":")
        kind: type[Adapter] = getattr(importlib.import_module(module), name)
        self._adapter = kind(header["path"], header["threads"])
        ports = {"inputs": self._adapter.inputs, "outputs": self._adapter.outputs}
        return {k: [dataclasses.asdict(p) for p in v] for k, v in ports.items()}, None

    def _run(self, header: Header, array: Array | None) -> Reply:
        if array is None or len(array) == 0:
            raise ValueError("there is no sample to run")
        outputs = []
        for index in range(len(array)):
            y = self.adapter.run(array[index : index + 1])
            outputs.append(y if y.shape[:1] == (1,) else y[None])
        self._sample = array[-1:]
        return {}, np.concatenate(outputs)

    def _time(self, header: Header, array: Array | None) -> Reply:
        x, adapter, seconds = self._input(), self.adapter, []
        for _ in range(header["count"]):
            started = time.perf_counter()
            adapter.run(x)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}, None

    def _place(self, header: Header, array: Array | None) -> Reply:
        kernels = self.adapter.place(self._input(), header["folder"])
        return {"kernels": [dataclasses.asdict(k) for k in kernels]}, None

    def _input(self) -> Array:
        """The last sample given, or normal noise of a fixed seed."""
        if self._sample is None:
            port = self.adapter.inputs[0]
            shape = [1 if axis is None else axis for axis in port.shape]
            if None in port.shape[1:]:
                raise ValueError(
                    f"input '{port.name}' has no fixed shape {port.shape}; run a sample first"
                )
            self._sample = np.random.default_rng(0).standard_normal(shape).astype(port.dtype)
        return self._sample


def peak_memory() -> int:
    """Greatest resident memory of this process so far, in bytes (0: the system does not tell)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until `requests` ends."""
    worker = Worker()
    while True:
        try:
            header, array = receive(requests)
        except EOFError:
            return
        try:
            reply, result = worker.answer(header, array)
        except Exception as error:  # whatever a runtime raises becomes a message
            kind = "missing" if isinstance(error, ModuleNotFoundError) else "failed"
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reply, result = {"error": lines[0], "kind": kind}, None
        send(replies, reply, result)


def main() -> None:
    """Serve on standard input and output; what a runtime prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, replies)
    except BrokenPipeError:
        os._exit(1)  # the parent is gone


if __name__ == "__main__":
    main()
