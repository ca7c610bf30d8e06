"""`train`: within the budget, exportable, repeatable, resumable, and each option counts."""

import dataclasses

import pytest
import torch

from sft.core.budget import Budget
from sft.core.data import Batches
from sft.core.errors import BudgetError, InputError
from sft.exporters import export
from sft.runtimes.runner import Runner
from sft.surgery.apply import apply
from sft.training import checkpoint as checkpoint_file
from sft.training.end_to_end import train

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
     {"product_decay": False}, {"dual_ascent": False}, {"scheme": "spatial"}],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_result_and_equal_ones_do_not(
    net, data, measured, plain, change
) -> None:
    own = None if "scheme" in change else measured
    changed = train(net, data, ASKED, measured=own, **AT | change)
    assert not torch.equal(integers(changed), integers(plain))


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
@pytest.mark.parametrize("stop", [1, 7, 11])
def test_an_interrupted_training_ends_in_the_same_integers(
    net, data, measured, plain, tmp_path, monkeypatch, stop
) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)

    class Interrupting(Batches):
        given = 0

        def __iter__(self):
            for batch in super().__iter__():
                type(self).given += 1
                if type(self).given == stop + 5:  # others look at a batch before
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
    trained = train(net, data, Budget(macs=0.6), scratch=True, **AT | {"steps": 40})
    other = train(net, data, Budget(macs=0.6), scratch=True, seed=1, **AT | {"steps": 40})
    assert not torch.equal(integers(trained)[:100], integers(other)[:100])
    names = [n for n, _ in trained.model.graph_module.named_parameters()]
    assert not any("norm" in n for n in names)
    x, y = data.train.inputs, data.train.targets
    right = float((trained.model(x).argmax(1) == y).float().mean())
    assert right > 0.3


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
