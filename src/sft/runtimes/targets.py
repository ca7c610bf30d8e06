"""The targets SFT knows (one JSON file each, in `targets/`) and the machine at hand."""

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from sft.core.errors import InputError
from sft.core.records import Target

FOLDER = Path(__file__).with_suffix("")
ARM = "arm64"
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "torchao", "onnx", "onnxruntime")


@functools.cache
def list_targets() -> tuple[Target, ...]:
    """All targets, by name."""
    return tuple(Target.load(p) for p in sorted(FOLDER.glob("*.json")))


def find_target(name: str) -> Target:
    """The target called `name`, or the one of a runtime that fits the machine at hand.

    "onnxruntime" is `onnxruntime-arm64` on ARM, `onnxruntime-vnni` on an x86 with VNNI, else
    `onnxruntime-avx2`. Raises `InputError` that lists what is known.
    """
    here = instruction_set()
    for target in list_targets():
        if name == target.name or (name == target.runtime and here == target.instruction_set):
            return target
    names = ", ".join(t.name for t in list_targets())
    runtimes = ", ".join(sorted({t.runtime for t in list_targets()}))
    raise InputError(
        f"There is no target '{name}'. Known: {names}; or a runtime ({runtimes}) "
        f"for the machine at hand ({here})."
    )


def can_run(target: Target) -> bool:
    """Whether the machine at hand multiplies a target's integers as the target does."""
    return (instruction_set() == ARM) == (target.instruction_set == ARM)


def instruction_set() -> str:
    """Which integer kernels the machine at hand runs well: "arm64", "vnni" or "avx2"."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ARM
    flags = _cpuinfo().get("flags", "").split()
    return "vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "avx2"


def machine() -> dict[str, Any]:
    """The machine at hand: processor, instruction set, logical cores, and versions by package."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "instruction_set": instruction_set(),
        "logical_cores": os.cpu_count() or 1,
        "versions": versions,
    }


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor; empty on a system without such a file."""
    try:
        first = CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
