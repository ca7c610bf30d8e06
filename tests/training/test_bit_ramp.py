"""The bit ramp: widths fall in place to the last ones, with the best steps, and can be resumed."""

import pytest
import torch

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.planning.allocate import plan
from sft.surgery.apply import apply
from sft.training.bit_ramp import RAMP, BitRamp, at_first_bits
from sft.training.loop import Settings, run_steps
from sft.training.objective import Objective


@pytest.fixture
def planned(profiled):
    return plan(profiled, Budget(size=0.13))


@pytest.fixture
def ramped(net, planned, data):
    small = apply(net, planned)
    model = quantize(
        small, at_first_bits(planned), "onnxruntime-avx2", data.calibration, spare_sensitive=False
    )
    return model, BitRamp(model, planned)


def widths(model) -> dict[str, int]:
    return {name: rounding.bits for name, (_, rounding) in model.weights().items()}


def test_all_weights_start_at_8_bits_and_end_as_planned(net, planned, ramped, data) -> None:
    model, ramp = ramped
    assert set(widths(model).values()) == {8}
    wanted = widths(
        quantize(apply(net, planned), planned, "onnxruntime-avx2", data.calibration,
                 spare_sensitive=False)
    )  # fmt: skip
    assert min(wanted.values()) < 8
    seen = []
    for step in range(1, 41):
        ramp.after_step(step / 40)
        seen.append(min(widths(model).values()))
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 2
    assert seen[int(RAMP * 40) - 1] == min(wanted.values())
    assert widths(model) == wanted
    limits = {n: r.pair_sum for n, (_, r) in model.weights().items()}
    like = quantize(
        apply(net, planned), planned, "onnxruntime-avx2", data.calibration, spare_sensitive=False
    )
    assert limits == {n: r.pair_sum for n, (_, r) in like.weights().items()}


def test_each_narrowing_takes_steps_that_lose_less_than_stretched_ones(ramped) -> None:
    model, ramp = ramped
    before = {n: (w.detach().clone(), r.quant_max, r.scale.detach().clone())
              for n, (w, r) in model.weights().items()}  # fmt: skip
    ramp.after_step(RAMP)
    for name, (weight, rounding) in model.weights().items():
        old, top, scale = before[name]
        shape = [-1] + [1] * (weight.ndim - 1)
        stretched = (scale * top / rounding.quant_max).reshape(shape)
        steps = (old / stretched).round().clamp(-rounding.quant_max, rounding.quant_max)
        found = (rounding.on_grid(weight) - weight).square().sum()
        assert float(found.detach()) <= float((steps * stretched - old).square().sum()) * 1.001


def test_a_resumed_ramp_has_the_width_of_its_state(net, planned, ramped, data) -> None:
    model, ramp = ramped
    ramp.after_step(0.2)
    small = apply(net, planned)
    again = quantize(
        small, at_first_bits(planned), "onnxruntime-avx2", data.calibration, spare_sensitive=False
    )
    other = BitRamp(again, planned)
    for name, value in other.state().items():
        value.copy_(ramp.state()[name])
    assert widths(again) != widths(model)
    other.resumed()
    assert widths(again) == widths(model)
    torch.testing.assert_close(
        next(iter(again.weights().values()))[1].quant_max,
        next(iter(model.weights().values()))[1].quant_max,
    )


def test_a_finished_training_that_is_repeated_settles_at_the_last_width(
    net, planned, data, tmp_path
) -> None:
    """Killed after the last step, before its result was stored."""
    settings = Settings(4, learning_rate=1e-3)
    found = []
    for _ in range(2):
        model = quantize(
            apply(net, planned), at_first_bits(planned), "onnxruntime-avx2", data.calibration,
            spare_sensitive=False,
        )  # fmt: skip
        objective = Objective(model, net, torch.device("cpu"))
        run_steps(
            model, objective, data.train, [BitRamp(model, planned)], settings, tmp_path / "state"
        )
        found.append({name: r.integers(w) for name, (w, r) in model.weights().items()})
    once, again = found
    assert min(int(q.abs().max()) for q in once.values()) < 8
    assert all(torch.equal(once[name], again[name]) for name in once)
