"""The child's protocol, with runtimes made up for the purpose."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.runtimes.protocol import receive, send
from sft.runtimes.worker import serve

FAKE = """
import os, sys
from sft.runtimes.adapter import Kernel, Port
class Fake:
    inputs = outputs = (Port("x", (1, 2), "float32"),)
    def __init__(self, path, threads):
        if path == "absent":
            raise ModuleNotFoundError("Fake is not installed: pip install fake")
        if path == "bad":
            raise ValueError("first line\\nsecond line")
        self.calls = 0
    def run(self, x):
        os.write(1, b"noise on the output\\n")
        print("more noise", flush=True)
        self.calls += 1
        return x * 2 + 100 * (self.calls - 1)
    def place(self, x, folder):
        return [Kernel("k", "Mul", False, int(x.sum()))]
"""
START = """
from sft.runtimes import RUNTIMES
from sft.runtimes import worker
RUNTIMES.add("fake", "fake:Fake")
worker.main()
"""
LOAD = {"do": "load", "runtime": "fake", "threads": 1}


def converse(tmp_path: Path, requests: list[Any]) -> list[Any]:
    """Send all requests to a child that knows the runtime "fake"; all its replies."""
    (tmp_path / "fake.py").write_text(FAKE)
    stream = io.BytesIO()
    for header, array in requests:
        send(stream, header, array)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{START}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=stream.getvalue(), capture_output=True, check=True
    )
    answers = io.BytesIO(done.stdout)
    found = [receive(answers) for _ in requests]
    assert answers.read() == b""
    return found


def test_noise_of_a_runtime_stays_out_of_the_replies(tmp_path: Path) -> None:
    x = np.array([[1, 2], [3, 4]], np.float32)
    loaded, ran, timed, placed = converse(
        tmp_path,
        [
            ({**LOAD, "path": "good"}, None),
            ({"do": "run"}, x),
            ({"do": "time", "count": 3}, None),
            ({"do": "place", "folder": "."}, None),
        ],
    )
    assert loaded[0]["inputs"] == [{"name": "x", "shape": [1, 2], "dtype": "float32"}]
    np.testing.assert_array_equal(ran[1], [[2, 4], [106, 108]])  # sample by sample
    assert len(timed[0]["seconds"]) == 3
    assert placed[0]["kernels"][0]["macs"] == 7  # the last sample given


def test_errors_are_replies(tmp_path: Path) -> None:
    replies = converse(
        tmp_path,
        [
            ({**LOAD, "path": "absent"}, None),
            ({**LOAD, "path": "bad"}, None),
            ({"do": "time", "count": 1}, None),
            ({"do": "memory"}, None),
        ],
    )
    missing, bad, empty, memory = (r[0] for r in replies)
    assert missing == {"error": "Fake is not installed: pip install fake", "kind": "missing"}
    assert bad == {"error": "first line", "kind": "failed"}
    assert empty == {"error": "no file is loaded", "kind": "failed"}
    assert memory["bytes"] > 2**23


@pytest.mark.parametrize("dtype", ["float32", ">f4", "int8", "uint8", "bool", "int64", "float16"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 4), ()])
def test_arrays_survive_the_way(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    stream = io.BytesIO()
    send(stream, {"do": "run"}, array)
    send(stream, {"next": 1})
    stream.seek(0)
    header, got = receive(stream)
    assert header == {"do": "run"}
    assert got is not None
    assert got.shape == shape
    assert got.dtype == np.dtype(dtype).newbyteorder("<")
    np.testing.assert_array_equal(got, array)
    assert receive(stream) == ({"next": 1}, None)


def test_objects_are_not_sent_nor_read() -> None:
    stream = io.BytesIO()
    with pytest.raises(TypeError, match="object"):
        send(stream, {}, np.array([object()]))
    assert stream.getvalue() == b""
    with pytest.raises(ValueError, match="OBJECT"):
        receive(io.BytesIO(b'{"array": ["|O", [1]]}\n' + bytes(8)))


@pytest.mark.parametrize("cut", [0, 5, -1])
def test_a_message_broken_off(cut: int) -> None:
    stream = io.BytesIO()
    send(stream, {"do": "run"}, np.zeros(3))
    with pytest.raises(EOFError):
        receive(io.BytesIO(stream.getvalue()[:cut]))


def test_serve_ends_with_its_input() -> None:
    replies = io.BytesIO()
    serve(io.BytesIO(b'{"do": "run"'), replies)
    assert replies.getvalue() == b""


def test_peak_memory_is_of_the_past_and_in_bytes() -> None:
    code = """
import numpy as np
from sft.runtimes.worker import peak_memory
before = peak_memory()
block = np.ones(2**24)
del block
print(before, peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**23 < before < 2**28
    assert abs(after - before - 2**27) < 2**24  # 128 MiB came and went
