"""Training with the rounding in place: what is learned, what is frozen, and what the file holds."""

import pytest
import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.data import Batches
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.exporters.packed import load, save_packed
from sft.models.inspect import inspect
from sft.quantizers.fake import ActivationFakeQuantize, Mode, WeightFakeQuantize
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import QuantizedModel, prepare
from sft.training import checkpoint as checkpoint_file
from sft.training import oscillation
from sft.training.finetune import finetune
from sft.training.steps import LearnedSteps

TARGET = "onnxruntime-avx2"


def dense_plan(model: nn.Module, example: torch.Tensor, bits: int) -> Plan:
    nothing = Cost(1, 1, 1)
    rows = tuple(
        PlanRow(layer.name, Option("dense", (), bits), 0.0, nothing, "test")
        for layer in inspect(model, example, "m").layers
    )
    shape = tuple(example.shape[1:])
    return Plan("m", TARGET, {}, rows, nothing, nothing, "optimal", 0, 0, 0, input_shape=shape)


def rounded_from(model: nn.Module, data, bits: int) -> QuantizedModel:
    plan = dense_plan(model, data.example(), bits)
    return quantize(apply(model, plan), plan, TARGET, data.calibration, spare_sensitive=False)


@pytest.fixture
def coarse(net, data) -> QuantizedModel:
    return rounded_from(net, data, 4)


def roundings(model: QuantizedModel) -> dict[str, WeightFakeQuantize | ActivationFakeQuantize]:
    weights = {name: rounding for name, (_, rounding) in model.weights().items()}
    return {**weights, **model.activations()}


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def distance(model: nn.Module, teacher: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted, given = teacher(x).log_softmax(1), model(x).log_softmax(1)
    return float((wanted.exp() * (wanted - given)).sum(1).mean())


def test_every_step_is_learned_and_stays_positive(coarse, net, data) -> None:
    before = {name: r.scale.clone() for name, r in roundings(coarse).items()}
    tuned = finetune(coarse, data.train, net, steps=5, learning_rate=1e-2)
    for name, rounding in roundings(tuned).items():
        assert not torch.equal(rounding.scale, before[name]), name
        assert float(rounding.scale.min()) > 0
        assert not isinstance(rounding.scale, nn.Parameter)
        assert torch.equal(roundings(coarse)[name].scale, before[name])
    fixed = finetune(coarse, data.train, net, steps=5, learning_rate=1e-2, learn_steps=False)
    for name, rounding in roundings(fixed).items():
        assert torch.equal(rounding.scale, before[name])


@pytest.mark.parametrize("learn_steps", [True, False])
def test_the_integers_of_training_are_those_of_the_file(
    coarse, net, data, tmp_path, learn_steps
) -> None:
    tuned = finetune(coarse, data.train, net, steps=8, learning_rate=1e-2, learn_steps=learn_steps)
    changed = 0
    for name, (weight, rounding) in tuned.weights().items():
        assert torch.equal(rounding.on_grid(weight), weight)
        integers = rounding.integers(weight)
        assert int(integers.abs().max()) <= 7
        old, its = coarse.weights()[name]
        changed += int((integers != its.integers(old)).sum())
    assert changed > 0
    x = data.calibration.inputs
    torch.testing.assert_close(tuned.convert()(x), tuned(x), rtol=1e-5, atol=1e-5)
    save_packed(tuned, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors", net)
    assert torch.equal(back(x), tuned(x))
    for name, (weight, rounding) in back.weights().items():
        other, its = tuned.weights()[name]
        assert torch.equal(rounding.integers(weight), its.integers(other))


def test_training_brings_the_integers_closer_to_the_teacher(net, data) -> None:
    rounded = rounded_from(net, data, 2)
    x = data.validation.inputs
    tuned = finetune(rounded, data.train, net, steps=40, learning_rate=1e-2)
    assert distance(tuned, net, x) < 0.5 * distance(rounded, net, x)


@pytest.mark.parametrize("stop_at", [2, 9])
def test_an_interrupted_run_ends_in_the_same_integers(
    coarse, net, data, tmp_path, monkeypatch, stop_at
) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(oscillation, "LAST_THRESHOLD", 0.001)  # so that some are frozen
    settings = {"steps": 12, "learning_rate": 2e-2}
    whole = finetune(coarse, data.train, net, **settings)
    path = tmp_path / "state"
    x = data.train.inputs

    class Interrupting(Batches):
        given = 0

        def __iter__(self):
            for batch in super().__iter__():
                type(self).given += 1
                if type(self).given == stop_at + 6:  # four were compared, one was for the teacher
                    raise KeyboardInterrupt
                yield batch

    train = Interrupting(x, None, 32, True)
    with pytest.raises(KeyboardInterrupt):
        finetune(coarse, train, net, checkpoint=path, **settings)
    assert path.is_file()
    resumed = finetune(coarse, Batches(x, None, 32, True), net, checkpoint=path, **settings)
    assert states_equal(whole, resumed)
    again = finetune(coarse, Batches(x, None, 32, True), net, checkpoint=path, **settings)
    assert states_equal(whole, again)


def test_frozen_weights_change_the_result(coarse, net, data, monkeypatch) -> None:
    monkeypatch.setattr(oscillation, "LAST_THRESHOLD", 0.001)
    free, held = (
        finetune(coarse, data.train, net, steps=12, learning_rate=2e-2, freeze_oscillations=freeze)
        for freeze in (False, True)
    )
    assert not states_equal(free, held)


def test_logarithms_get_the_gradient_of_the_chain_rule(coarse, data) -> None:
    learned = LearnedSteps(coarse)
    coarse(data.validation.inputs).square().sum().backward()
    wanted = {n: r.scale.grad * r.scale.detach() for n, r in roundings(coarse).items()}
    learned.collect_gradients()
    for name, logarithm in learned.logarithms.items():
        assert torch.equal(logarithm.grad, wanted[name])
        assert roundings(coarse)[name].scale.grad is None
        logarithm.data -= 30.0
    learned.follow()
    assert all(0 < float(r.scale.detach().max()) < 1e-9 for r in roundings(coarse).values())
    learned.settle()
    assert not any(name.endswith(".scale") for name, _ in coarse.named_parameters())


def test_roundings_without_ranges_are_left_and_weights_still_end_on_a_grid(net, data) -> None:
    plan = dense_plan(net, data.example(), 8)
    bare = prepare(apply(net, plan), plan, find_target(TARGET))
    bare.set_modes(Mode.PASS, Mode.ROUND)
    tuned = finetune(bare, data.train, net, steps=2)
    assert all(float(a.scale) == 1 for a in tuned.activations().values())
    for weight, rounding in tuned.weights().values():
        assert rounding.scale.shape == (len(weight),)
        assert torch.equal(rounding.on_grid(weight), weight)


def test_a_weight_that_several_layers_use_stays_on_one_grid(data) -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        """One convolution called twice."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(144, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body(torch.relu(self.body(x))).flatten(1))

    model = Twice().eval()
    rounded = rounded_from(model, data, 8)
    tuned = finetune(rounded, data.train, model, steps=4, learning_rate=1e-2)
    before = rounded.weights()["body.weight"][1].scale
    assert not torch.equal(tuned.weights()["body.weight"][1].scale, before)
    x = data.validation.inputs
    torch.testing.assert_close(tuned.convert()(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_a_network_in_float_is_trained_as_before(net, data) -> None:
    one, other = (
        finetune(net, data.train, net, steps=3, learn_steps=on, freeze_oscillations=on)
        for on in (True, False)
    )
    assert states_equal(one, other)


def test_a_state_of_other_options_is_refused(coarse, net, data, tmp_path) -> None:
    path = tmp_path / "state"
    finetune(coarse, data.train, net, steps=1, checkpoint=path)
    for changed in ({"learn_steps": False}, {"freeze_oscillations": False}):
        with pytest.raises(checkpoint_file.InputError, match="of another run"):
            finetune(coarse, data.train, net, steps=1, checkpoint=path, **changed)
