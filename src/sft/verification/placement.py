"""Which multiply-accumulates of an exported file ran in integers, seen in the runtime itself."""

from sft.core.records import Artifact
from sft.runtimes.runner import Kernel, Runner
from sft.runtimes.targets import find_target


def integer_fraction(kernels: tuple[Kernel, ...]) -> float:
    """Share (0 to 1) of the file's multiply-accumulates that ran in integer kernels."""
    total = sum(k.macs for k in kernels)
    return sum(k.macs for k in kernels if k.integer) / total if total else 0.0


def place(artifact: Artifact, threads: int = 1) -> tuple[Kernel, ...]:
    """Run the file once and list the kernels that multiplied."""
    with Runner(artifact.path, find_target(artifact.target).runtime, threads) as runner:
        return runner.place()
