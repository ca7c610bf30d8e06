"""`train`: within the budget, exportable, repeatable, resumable, and each option counts."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sft.core.budget import Budget
from sft.core.data import Batches
from sft.core.errors import BudgetError, InputError
from sft.exporters import export
from sft.runtimes.runner import Runner
from sft.surgery.apply import apply
from sft.training import checkpoint as checkpoint_file
from sft.training import end_to_end
from sft.training.end_to_end import _start, train

AT = {"target": "onnxruntime-avx2", "rank_multiple": 2, "steps": 16}
ASKED = Budget(size=0.16, macs=0.5)


@pytest.fixture(scope="module")
def measured(profiled):
    return profiled


def integers(trained) -> torch.Tensor:
    found = [rounding.integers(w).flatten() for w, rounding in trained.model.weights().values()]
    return torch.cat(found)


def test_the_result_is_within_the_budget_and_is_a_plan_like_any_other(
    net, data, measured, tmp_path
) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    events = []
    trained = train(net, data, ASKED, measured=measured, on_event=events.append, **AT)
    assert trained.plan.cost.size <= 0.16 * trained.plan.original.size
    assert trained.plan.cost.macs <= 0.5 * trained.plan.original.macs
    assert any(row.option.rank for row in trained.plan.rows)
    assert all(row.option.weight_bits == 4 and row.reason for row in trained.plan.rows)
    assert {e["phase"] for e in events if e["event"] == "phase"} == {
        "shrink",
        "recover",
        "integers",
    }
    apply(net, dataclasses.replace(trained.plan, statistics=None))
    artifact = export(trained.model, trained.plan, tmp_path / "model.onnx")
    x = data.validation.inputs[:4]
    with Runner(artifact.path, "onnxruntime") as runner:
        found = torch.from_numpy(runner.run(x.numpy()))
    torch.testing.assert_close(found, trained.model(x).detach(), atol=0.5, rtol=0.2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.slow
def test_training_teaches(net, data, measured) -> None:
    x, y = data.validation.inputs, data.validation.targets
    losses = []
    for rate in (1e-6, 3e-3):
        trained = train(
            net, data, Budget(size=0.14, macs=0.2), measured=measured, learning_rate=rate,
            integer_learning_rate=rate, **AT | {"steps": 60},
        )  # fmt: skip
        losses.append(float(torch.nn.functional.cross_entropy(trained.model(x), y).detach()))
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"shrinking": False}, {"bit_ramp": True}, {"seed": 1}, {"pretraining": "admm"},
     {"product_decay": False}, {"scheme": "spatial"}],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_result_and_equal_ones_do_not(
    net, data, measured, plain, change
) -> None:
    own = None if "scheme" in change else measured
    changed = train(net, data, ASKED, measured=own, **AT | change)
    assert not torch.equal(integers(changed), integers(plain))


@pytest.mark.slow
def test_dual_ascent_raises_the_prices_and_lowers_the_ranks(net, data, measured) -> None:
    """Where the original weights go on after the cut, as here, the result does not show it."""
    told = []
    for ascends in (True, False):
        events = []
        train(
            net, data, ASKED, measured=measured, dual_ascent=ascends, on_event=events.append,
            **AT | {"steps": 40},
        )  # fmt: skip
        told.append(next(e for e in events if e["event"] == "ranks"))
    assert max(told[0]["multipliers"]) > max(told[1]["multipliers"])
    assert sum(told[0]["ranks"].values()) < sum(told[1]["ranks"].values())


@pytest.mark.slow
def test_layers_are_kept_and_have_the_bits_that_were_asked_for(net, data, measured) -> None:
    bits = {"*": 4, "fc": 8}
    trained = train(
        net, data, Budget(macs=0.8), measured=measured, keep=["down"], weight_bits=bits, **AT
    )
    assert trained.plan.option("down").scheme == "keep"
    assert trained.plan.option("fc").weight_bits == 8
    widths = {n: r.bits for n, (_, r) in trained.model.weights().items()}
    assert not any(n.startswith("down") for n in widths)
    assert all((w == 8) == n.startswith("fc") for n, w in widths.items())


@pytest.fixture(scope="module")
def plain(shared, measured):
    net, data = shared
    return train(net, data, ASKED, measured=measured, **AT)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_integers(net, data, measured, plain) -> None:
    torch.manual_seed(77)
    again = train(net, data, ASKED, measured=measured, **AT)
    assert torch.equal(integers(again), integers(plain))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 7, 14])
def test_an_interrupted_training_ends_in_the_same_integers(
    net, data, measured, plain, tmp_path, monkeypatch, stop
) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)

    class Interrupting(Batches):
        given = 0

        def __iter__(self):
            for batch in super().__iter__():
                type(self).given += 1
                if type(self).given == stop + 5:  # four were compared, one was checked
                    raise KeyboardInterrupt
                yield batch

    x, y = data.train.inputs, data.train.targets
    broken = dataclasses.replace(data, train=Interrupting(x, y, 32, True))
    with pytest.raises(KeyboardInterrupt):
        train(net, broken, ASKED, measured=measured, checkpoint=tmp_path, **AT)
    resumed = train(net, data, ASKED, measured=measured, checkpoint=tmp_path, **AT)
    assert torch.equal(integers(resumed), integers(plain))
    with pytest.raises(InputError, match="of another run"):
        train(net, data, ASKED, measured=measured, checkpoint=tmp_path, **AT | {"seed": 3})


@pytest.mark.slow
def test_from_scratch_batch_norm_is_trained_and_folded(net, data) -> None:
    trained = train(net, data, Budget(macs=0.6), scratch=True, **AT | {"steps": 80})
    other = train(net, data, Budget(macs=0.6), scratch=True, seed=1, **AT | {"steps": 80})
    assert not torch.equal(integers(trained)[:100], integers(other)[:100])
    names = [n for n, _ in trained.model.graph_module.named_parameters()]
    assert not any("norm" in n for n in names)
    x, y = data.train.inputs, data.train.targets
    right = float((trained.model(x).argmax(1) == y).float().mean())
    assert right > 0.6  # of four classes


def test_what_cannot_be_is_refused_before_training(net, data, measured) -> None:
    with pytest.raises(BudgetError, match="the least is"):
        train(net, data, Budget(macs=0.001), measured=measured, **AT)
    with pytest.raises(InputError, match="budget on size and MACs"):
        train(net, data, Budget(latency=0.5), **AT)
    with pytest.raises(InputError, match="budget on size and MACs"):
        train(net, data, Budget(), **AT)
    with pytest.raises(InputError, match="pretraining"):
        train(net, data, ASKED, pretraining="gan", **AT)
    with pytest.raises(InputError, match="two factors"):
        train(net, data, ASKED, scheme="tucker2", **AT)
    with pytest.raises(InputError, match="matches no layer"):
        train(net, data, ASKED, measured=measured, weight_bits={"nowhere": 4}, **AT)
    with pytest.raises(InputError, match="steps"):
        train(net, data, ASKED, **AT | {"steps": 2})


@pytest.fixture
def request_of(net, data, measured, tmp_path, monkeypatch):
    """What the states of a call are told apart by; nothing is trained."""
    stand_in = lambda *given: SimpleNamespace(run=lambda: given[7])  # noqa: E731
    monkeypatch.setattr(end_to_end, "Course", stand_in)
    monkeypatch.setattr(end_to_end, "profile", lambda *_, **__: measured)
    for name in ("_start", "menus_of", "without_damage"):
        monkeypatch.setattr(end_to_end, name, lambda *_: None)

    def ask(**changed) -> str:
        usual = {"model": net, "data": data, "measured": measured, "checkpoint": tmp_path}
        given = usual | AT | {"budget": ASKED} | changed
        return train(given.pop("model"), given.pop("data"), **given)

    return ask


def test_states_of_another_teacher_loss_data_or_profile_are_told_apart(
    net, data, measured, request_of
) -> None:
    def nudged():
        other = copy.deepcopy(net)
        other.fc.bias.data[0] += 1e-3
        return other

    def with_train(x, y):
        return dataclasses.replace(data, train=Batches(x, y, 32, True))

    x, y = data.train.inputs, data.train.targets
    wrong, loss = with_train(x, (y + 1) % 4), torch.nn.functional.cross_entropy
    fewer = dataclasses.replace(measured, fingerprint=measured.fingerprint + "0")
    changes = [
        {}, {"teacher": net}, {"teacher": nudged()}, {"loss": loss},
        {"loss": torch.nn.functional.nll_loss}, {"data": with_train(x.flip(0), y)},
        {"loss": loss, "data": wrong}, {"scratch": True}, {"scratch": True, "data": wrong},
        {"measured": fewer}, {"measured": None, "model": nudged()}, {"measured": None},
        {"data": dataclasses.replace(data, calibration=data.validation, train=data.train)},
    ]  # fmt: skip
    found = [request_of(**change) for change in changes]
    assert len(set(found)) == len(changes)
    assert request_of() == found[0]
    assert request_of(data=wrong) == found[0]  # the teacher is learned from: no target is used


def test_a_shuffled_calibration_loader_is_the_same_in_every_call(data, request_of) -> None:
    x = data.calibration.inputs
    shuffled = dataclasses.replace(data, calibration=Batches(x, None, 32, True))
    found = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        state = torch.get_rng_state()
        found.append(request_of(data=shuffled))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != request_of()


def test_a_profile_of_other_weights_is_refused(net, request_of) -> None:
    with torch.no_grad():
        net.fc.bias[0] += 1e-3
    with pytest.raises(InputError, match="measured with other weights"):
        request_of()
    request_of(scratch=True)  # which draws other weights anyway


class Attending(torch.nn.Module):
    """Weights that `reset_parameters` does not reach: those of attention, and one of its own."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.norm, self.fc = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
        if bare:
            self.token = torch.nn.Parameter(torch.ones(1, 8))


def test_from_scratch_every_weight_is_drawn_anew_or_named(data) -> None:
    model = Attending(bare=False)
    for weight in model.parameters():
        torch.nn.init.constant_(weight, 7.0)
    torch.manual_seed(3)
    wanted = Attending(bare=False)
    drawn = _start(model, data, 3)
    assert all(not bool((w == 7).any()) for w in drawn.parameters())
    assert all(bool((w == 7).all()) for w in model.parameters())
    for name, weight in wanted.named_parameters():
        own = drawn.get_parameter(name)
        torch.testing.assert_close(own.std(), weight.std(), rtol=0.5, atol=1e-6, msg=name)
    with pytest.raises(InputError, match=r"nothing draws 'token' anew .* reset_parameters\(\)"):
        _start(Attending(bare=True), data, 3)
