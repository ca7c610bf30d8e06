"""One peer's quantiser in a process of its own, so that its memory and its globals are its own.

    python benchmarks/peer_process.py MODULE NAME FLOAT_ONNX IMAGES_NPY OUT

MODULE is `onnxruntime_peer` or `nncf_peer`. The last line printed is one JSON object.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt


def save_images(images: npt.NDArray[np.float32], folder: Path) -> Path:
    """Store ``(N, 3, H, W)`` where the process finds them."""
    path = folder / "images.npy"
    np.save(path, images)
    return path


def quantize_apart(
    module: str, name: str, float_path: Path, images_path: Path, path: Path
) -> tuple[float, int]:
    """Write one quantised file: seconds of the peer's call, bytes the process grew by meanwhile.

    Raises `SystemExit` with the last line of the peer's own words where it fails.
    """
    command = [sys.executable, __file__, module, name, str(float_path), str(images_path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise SystemExit(f"{name} failed: {said[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["seconds"]), int(found["bytes"])


def main() -> None:
    module, name, *paths = sys.argv[1:]
    float_path, images_path, path = map(Path, paths)
    peer = importlib.import_module(module)
    images = np.load(images_path)
    with contextlib.redirect_stdout(sys.stderr):
        peer.require()
        before, started = _resident(), time.perf_counter()
        peer.quantize(name, float_path, images, path)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": max(0, peak_bytes() - before)}))


def peak_bytes() -> int:
    """Bytes of memory this process held at most.

    Linux hands the starting process's peak on in `getrusage`, so its status file is asked first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return 1024 * int(fields["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _resident() -> int:
    """Bytes of memory this process holds now; where that is unknown, its peak so far."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_bytes()
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
