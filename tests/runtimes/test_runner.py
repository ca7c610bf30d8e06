"""The child process: outputs, failures, timing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper

from sft.core.errors import InputError, RuntimeFailure
from sft.runtimes import runner as room
from sft.runtimes.runner import Runner, benchmark, benchmark_interleaved, predict_with

RUNTIME = "onnxruntime"


@pytest.mark.parametrize("kind", ["float", "uint8", "int8"])
def test_outputs_are_the_definition_s(cases: Any, samples: Any, kind: str) -> None:
    case = cases[kind]
    with Runner(case.path, RUNTIME) as runner:
        got = runner.run(samples)
    want = case.forward(samples)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert want.std() > 0.05  # the comparison has something to compare
    # A tie that float32 rounds the other way moves few outputs, and those by one step.
    assert np.abs(got - want).max() <= max(1e-6, 1.01 * case.step)
    assert np.sqrt(np.mean((got - want) ** 2)) <= max(1e-6, 0.3 * case.step)


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_outputs_are_those_of_a_session_in_this_process(
    cases: Any, samples: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnxruntime.InferenceSession(cases[kind].path, providers=["CPUExecutionProvider"])
    want = np.concatenate([session.run(None, {"x": x[None]})[0] for x in samples])
    with Runner(cases[kind].path, RUNTIME) as runner:
        np.testing.assert_allclose(runner.run(samples), want, rtol=0, atol=1e-6)
        monkeypatch.setattr(room, "PACKET", 2 * samples[0].nbytes)  # three packets of two
        np.testing.assert_allclose(runner.run(samples), want, rtol=0, atol=1e-6)
        strided = np.asfortranarray(samples)
        np.testing.assert_allclose(runner.run(strided), want, rtol=0, atol=1e-6)
        predicted = predict_with(runner)(torch.from_numpy(samples).requires_grad_())
    np.testing.assert_allclose(predicted.numpy(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 9), (0, 3, 9, 9), ()])
def test_wrong_shape_names_both(cases: Any, shape: tuple[int, ...]) -> None:
    with Runner(cases["float"].path, RUNTIME) as runner:
        with pytest.raises(InputError) as error:
            runner.run(np.zeros(shape, np.float32))
        assert "(N, 3, 9, 9)" in str(error.value)
        assert str(shape) in str(error.value)
        assert runner.run(np.zeros((1, 3, 9, 9), np.float32)).shape == (1, 4)  # still alive


def test_wrong_dtype(cases: Any, samples: Any) -> None:
    with (
        Runner(cases["float"].path, RUNTIME) as runner,
        pytest.raises(InputError, match="takes float32; float64"),
    ):
        runner.run(samples.astype(np.float64))


def test_corrupt_file(cases: Any, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(cases["float"].path.read_bytes()[:200])
    with pytest.raises(RuntimeFailure, match=r"refused '.*corrupt\.onnx': .*ONNXRuntimeError"):
        Runner(path, RUNTIME)


def test_missing_file_runtime_and_threads(cases: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx"):
        Runner(tmp_path / "absent.onnx", RUNTIME)
    with pytest.raises(InputError, match=r"no runtime 'tensorflow'\. Known: onnxruntime"):
        Runner(cases["float"].path, "tensorflow")
    with pytest.raises(InputError, match="threads=0"):
        Runner(cases["float"].path, RUNTIME, threads=0)


def test_file_that_takes_several_samples(save_graph: Callable[..., Path], tmp_path: Path) -> None:
    path = save_graph(tmp_path / "four.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, [4, 3])
    with pytest.raises(InputError, match=r"four\.onnx.*\(4, 3\).*batch of 1"):
        Runner(path, RUNTIME)


def test_axes_of_no_fixed_size(save_graph: Callable[..., Path], tmp_path: Path) -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    path = save_graph(tmp_path / "open.onnx", relu, {}, ["batch", "width"])
    x = np.array([[-1.0, 2.0, 3.0], [4.0, -5.0, 6.0]], np.float32)
    with Runner(path, RUNTIME) as runner:
        with pytest.raises(RuntimeFailure, match=r"failed to time .*run a sample first"):
            runner.time(1)
        np.testing.assert_array_equal(runner.run(x), np.maximum(x, 0))
        assert len(runner.time(3)) == 3


@pytest.mark.parametrize("ask", [lambda r: r.time(1), lambda r: r.place()])
def test_killed_child(cases: Any, ask: Callable[[Runner], object]) -> None:
    with Runner(cases["float"].path, RUNTIME) as runner:
        os.kill(runner.pid, signal.SIGKILL)
        for _ in range(2):  # a second request says it again
            with pytest.raises(RuntimeFailure, match=r"float\.onnx.*SIGKILL"):
                ask(runner)


def test_closed_runner(cases: Any) -> None:
    with Runner(cases["float"].path, RUNTIME) as runner:
        pid = runner.pid
    runner.close()
    with pytest.raises(RuntimeFailure, match=r"float\.onnx.*closed"):
        runner.time(1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_interrupted_request_ends_the_child(
    cases: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stream: object) -> None:
        raise KeyboardInterrupt

    with Runner(cases["float"].path, RUNTIME) as runner:
        monkeypatch.setattr(room, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(samples)
        monkeypatch.undo()
        with pytest.raises(RuntimeFailure, match="closed"):  # not the reply of the request before
            runner.time(1)


def test_the_child_holds_no_torch(cases: Any) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list what a process has loaded")
    with Runner(cases["float"].path, RUNTIME) as runner:
        loaded = Path(f"/proc/{runner.pid}/maps").read_text()
    assert "onnxruntime" in loaded
    assert "libtorch" not in loaded


def test_a_file_of_the_working_folder_is_not_imported(
    cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    with Runner(cases["float"].path, RUNTIME) as runner:
        assert len(runner.time(1)) == 1


def test_benchmark_measures_every_file(cases: Any) -> None:
    artifacts = [cases["float"].artifact(), cases["uint8"].artifact()]
    timings = benchmark_interleaved(artifacts, RUNTIME, threads=1, rounds=3, runs=4)
    timings += (benchmark(artifacts[0], threads=2, rounds=1, runs=5),)
    assert [t.runs for t in timings] == [12, 12, 5]
    assert [t.threads for t in timings] == [1, 1, 2]
    for t in timings:
        assert 0 < t.latency_ms_min <= t.latency_ms <= t.latency_ms_p90
        assert 2**24 < t.peak_memory_bytes < 2**31  # an interpreter and a runtime, in bytes


def test_benchmark_takes_turns_and_drops_the_first_round(
    cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def time(runner: Runner, count: int) -> list[float]:
        order.append(runner.path.stem)
        first = len(order) <= 2
        return [100.0 if first else 0.001 * (i + 1) for i in range(count)]

    monkeypatch.setattr(Runner, "time", time)
    artifacts = [cases["float"].artifact(), cases["uint8"].artifact()]
    timings = benchmark_interleaved(artifacts, RUNTIME, rounds=2, runs=3)
    assert order == ["float", "uint8"] * 3
    assert [round(t.latency_ms, 6) for t in timings] == [2.0, 2.0]
    assert [round(t.latency_ms_min, 6) for t in timings] == [1.0, 1.0]
    assert [round(t.latency_ms_p90, 6) for t in timings] == [3.0, 3.0]
    with pytest.raises(InputError, match="rounds=0"):
        benchmark_interleaved(artifacts, RUNTIME, rounds=0)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("sft.runtimes.runner", {"torch", "onnxruntime", "onnx", "torchao"}),
        ("sft.runtimes.worker", {"torch", "onnxruntime", "onnx", "pydantic"}),
    ],
)
def test_import_is_light(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*{heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
