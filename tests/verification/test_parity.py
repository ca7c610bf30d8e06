"""The check of an exported file passes what is right and fails what is wrong."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.data import top1
from sft.core.errors import InputError, VerificationError
from sft.core.files import sha256
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.verification.parity import agreement_with, verify

TARGET = "onnxruntime-avx2"


@pytest.fixture
def rounded(profiled, net, data):
    plan = make_plan(profiled, Budget())
    return quantize(apply(net, plan), plan, find_target(TARGET), data.calibration)


@pytest.fixture
def artifact(rounded, tmp_path):
    return export(rounded, rounded.plan, tmp_path / "m.onnx", TARGET)


def test_a_good_file_passes_and_the_numbers_are_right(artifact, rounded, net, data) -> None:
    check = verify(artifact, net, data, top1, simulation=rounded)
    assert check.passed
    check.raise_if_failed()
    assert check.integer_macs_fraction == 1.0
    assert check.samples == 64
    x = data.test.inputs
    agree = float((rounded(x).argmax(1) == net(x).argmax(1)).float().mean())
    assert check.agreement == pytest.approx(agree, abs=0.05)
    assert check.sqnr_db > 25
    assert check.score == pytest.approx(
        float((net(x).argmax(1) == data.test.targets).float().mean()), abs=0.1
    )


def test_against_the_model_itself_the_error_is_measured(artifact, net, data) -> None:
    check = verify(artifact, net, data.test)
    x = data.test.inputs
    from sft.runtimes.runner import Runner

    with Runner(artifact.path, "onnxruntime") as runner:
        outputs = runner.run(x.numpy())
    difference = outputs - net(x).detach().numpy()
    assert check.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-4)
    signal = net(x).detach().square().sum()
    wanted = 10 * np.log10(float(signal.detach()) / np.square(difference).sum())
    assert check.sqnr_db == pytest.approx(wanted, abs=0.01)
    assert check.score == check.agreement


def test_fewer_samples_can_be_compared(artifact, net, data) -> None:
    assert verify(artifact, net, data.test, samples=40).samples == 40


def test_a_file_with_other_weights_fails_in_words(artifact, rounded, net, data) -> None:
    proto = onnx.load(artifact.path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and list(tensor.dims) == [32, 16, 3, 3]:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(-values, tensor.name))
    onnx.save(proto, artifact.path)
    from pathlib import Path

    changed = dataclasses.replace(artifact, sha256=sha256(Path(artifact.path)))
    check = verify(changed, net, data.test, simulation=rounded)
    assert not check.passed
    with pytest.raises(VerificationError, match="dB from its simulation"):
        check.raise_if_failed()


def test_a_float_file_that_claims_integers_fails(net, data, tmp_path) -> None:
    written = export(net, None, tmp_path / "f.onnx", TARGET, example=data.example())
    check = verify(dataclasses.replace(written, integers=True), net, data.test)
    assert not check.passed
    assert "ran in integers" in check.failures[0]


def test_the_file_of_another_network_fails_without_a_simulation_too(artifact, net, data) -> None:
    torch.manual_seed(1)
    other = type(net)().eval()
    other.fc.bias.data[1] = 100.0
    check = verify(artifact, other, data.test)
    assert not check.passed
    assert "another network" in check.failures[0]


def test_the_model_is_not_changed_even_in_training_mode(artifact, net, data) -> None:
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    verify(artifact, net, data.test)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_changed_file_is_refused(artifact, net, data) -> None:
    with pytest.raises(InputError, match="not the file that was exported"):
        verify(dataclasses.replace(artifact, sha256="0" * 64), net, data.test)


def test_empty_data_is_refused(artifact, net) -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        verify(artifact, net, [])


def test_agreement_counts_decisions(net, data) -> None:
    evaluate = agreement_with(net)
    assert evaluate(net, data.test) == 1.0
    assert evaluate(lambda x: torch.roll(net(x), 1, dims=1), data.test) == 0.0
