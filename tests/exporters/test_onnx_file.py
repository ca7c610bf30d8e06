"""The exported ONNX file, run in its real runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import Option
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.verification.placement import integer_fraction, place

TARGET = "onnxruntime-avx2"


@pytest.fixture
def rounded(profiled, net, data):
    plan = make_plan(profiled, Budget())
    plan = plan.replace("body", Option("channel_out", (8,), 8))
    return quantize(apply(net, plan), plan, find_target(TARGET), data.calibration)


def run(path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate(
        [session.run(None, {name: x[i : i + 1].numpy()})[0] for i in range(len(x))]
    )


def test_the_integer_file_gives_the_simulated_outputs(rounded, data, tmp_path) -> None:
    artifact = export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)
    x = data.test.inputs
    wanted = rounded(x).detach().numpy()
    step = float(list(rounded.activations().values())[-1].calculate_qparams()[0])
    assert np.abs(run(artifact.path, x) - wanted).max() <= 2.01 * step
    assert (run(artifact.path, x).argmax(1) == wanted.argmax(1)).mean() >= 0.98


def test_the_files_integers_are_the_trained_ones(rounded, tmp_path) -> None:
    export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)
    stored = [
        numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "m.onnx").graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    ]
    for weight, rounding in rounded.weights().values():
        integers = rounding.integers(weight.detach()).numpy()
        same = [s for s in stored if s.shape == integers.shape or s.T.shape == integers.shape]
        assert any(np.array_equal(s, integers) or np.array_equal(s.T, integers) for s in same)


def test_every_multiplication_runs_in_integers(rounded, tmp_path) -> None:
    artifact = export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)
    kernels = place(artifact)
    assert integer_fraction(kernels) == 1.0
    assert sum(k.macs for k in kernels) == (
        144 * 16 * 9 + 144 * (8 * 16 * 9 + 8 * 16) + 36 * 32 * 16 * 9 + 32 * 4
    )


def test_the_float_file_equals_the_model_and_runs_in_float(net, data, tmp_path) -> None:
    artifact = export(net, None, tmp_path / "f.onnx", TARGET, example=data.example())
    x = data.test.inputs
    np.testing.assert_allclose(run(artifact.path, x), net(x).detach().numpy(), rtol=1e-3, atol=1e-4)
    assert integer_fraction(place(artifact)) == 0.0


def test_nothing_superfluous_is_in_the_file_and_it_is_repeatable(rounded, tmp_path) -> None:
    first = export(rounded, rounded.plan, tmp_path / "a.onnx", TARGET)
    second = export(rounded, rounded.plan, tmp_path / "b.onnx", TARGET)
    assert first.sha256 == second.sha256
    graph = onnx.load(first.path).graph
    assert not any(n.metadata_props or n.doc_string for n in graph.node)
    assert not graph.value_info
    assert "GlobalAveragePool" in {n.op_type for n in graph.node}


def test_a_plan_with_integers_needs_calibration(rounded, net, data, tmp_path) -> None:
    plan = rounded.plan
    with pytest.raises(InputError, match="calibration="):
        export(apply(net, plan), plan, tmp_path / "m.onnx", TARGET)
    assert not list(tmp_path.iterdir())
    artifact = export(
        apply(net, plan), plan, tmp_path / "m.onnx", TARGET, calibration=data.calibration
    )
    assert artifact.integers


def test_another_targets_integers_are_refused(rounded, tmp_path) -> None:
    with pytest.raises(InputError, match="made for 'onnxruntime-avx2'"):
        export(rounded, rounded.plan, tmp_path / "m.onnx", "onnxruntime-arm64")


def test_a_missing_folder_is_refused(rounded, tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        export(rounded, rounded.plan, tmp_path / "no" / "m.onnx", TARGET)
