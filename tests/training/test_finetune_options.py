"""Every option of fine-tuning changes something, and says so where it cannot."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from sft.core.data import Batches
from sft.core.errors import InputError
from sft.core.events import JsonLines
from sft.decompositions import factorize
from sft.training import checkpoint as checkpoint_file
from sft.training import selection
from sft.training.averages import Averaged
from sft.training.finetune import finetune
from sft.training.loop import Idle, Settings, run_steps
from sft.training.objective import Objective


@pytest.fixture
def student(net):
    small = type(net)()
    small.load_state_dict(net.state_dict())
    small.down = factorize(net.down, "channel_out", 3)
    return small.eval()


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def brier(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (
        (outputs.softmax(1) - functional.one_hot(targets, outputs.shape[1])).square().sum(1).mean()
    )


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 1.0},
        {"feature_weight": 0.0},
        {"match": ["down", "stem"]},
        {"loss": brier},
        {"ema": 0.5},
        {"mixed": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_changes_the_result(student, net, data, option) -> None:
    usual, other = (
        finetune(student, data.train, net, steps=4, learning_rate=1e-2, **given)
        for given in ({}, option)
    )
    assert not states_equal(usual, other)


def test_the_weight_of_the_loss_counts_and_alone_it_is_the_task(student, net, data) -> None:
    settings = {"steps": 4, "loss": brier}
    light = finetune(student, data.train, net, loss_weight=0.01, **settings)
    heavy = finetune(student, data.train, net, loss_weight=10.0, **settings)
    assert not states_equal(light, heavy)
    entropy, own = (finetune(student, data.train, steps=4, loss=x) for x in (None, brier))
    assert not states_equal(entropy, own)


def test_epochs_are_passes_over_the_loader(student, net, data) -> None:
    steps = 2 * len(data.train)
    whole, same = (
        finetune(student, data.train, net, **length) for length in ({"steps": steps}, {"epochs": 2})
    )
    assert states_equal(whole, same)
    assert states_equal(student, finetune(student, data.train, net, epochs=0))
    assert not states_equal(student, finetune(student, data.train, net, epochs=1e-6))
    for wrong in (-3, -0.01, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"{wrong} epochs of training: 0 or more"):
            finetune(student, data.train, net, epochs=wrong)
    with pytest.raises(InputError, match="a loader with a length"):
        finetune(student, iter_only(data.train), net, epochs=1)


class iter_only:  # noqa: N801
    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_minutes_end_the_training_by_the_clock(student, net, data, tmp_path, monkeypatch) -> None:
    """With a clock on which each step takes 3 seconds, and asked for half a minute."""
    seen, path = [], tmp_path / "state"

    class Counted(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(1)
                yield batch

    train = Counted(data.train.inputs, data.train.targets, 16)
    settings = {"minutes": 0.5, "steps": 10_000, "checkpoint": path}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.Checkpoint, "seconds", lambda _: 3.0 * len(seen))
        tuned = finetune(student, train, net, **settings)
    assert 10 <= len(seen) <= 11  # one batch prepares the teacher
    assert not states_equal(tuned, student)
    stored = path.read_bytes()
    assert states_equal(tuned, finetune(student, train, net, **settings))  # its time is over
    assert path.read_bytes() == stored
    with pytest.raises(InputError, match="a time above 0"):
        finetune(student, train, net, minutes=0)


def test_the_average_is_that_of_the_weights_of_all_steps(student, net, data) -> None:
    """Against the weights that a part of its own saw."""

    class Recorded(Idle):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def bind(self, module: nn.Module) -> "Recorded":
            self.module = module
            return self

        def after_step(self, progress: float) -> None:
            self.weights.append(self.module.fc.weight.detach().clone())

    first = student.fc.weight.detach().clone()
    averaged, recorded = Averaged(student, 0.6), Recorded().bind(student)
    objective = Objective(student, net, torch.device("cpu"))
    settings = Settings(steps=7, learning_rate=1e-2)
    run_steps(student, objective, data.train, [averaged, recorded], settings)
    wanted = first
    for count, weight in enumerate(recorded.weights, 1):
        decay = min(0.6, (1 + count) / (10 + count))
        wanted = decay * wanted + (1 - decay) * weight
    torch.testing.assert_close(student.fc.weight.detach(), wanted)


def test_the_best_weights_on_held_out_data_are_kept(net, data) -> None:
    """Wrong targets are learned, so each judgement is worse than the one before."""
    events: list[dict] = []
    x, y = data.train.inputs, data.train.targets
    wrong, settings = Batches(x, (y + 1) % 4, 32), {"steps": 40, "learning_rate": 3e-3}
    last = finetune(net, wrong, **settings)
    best = finetune(
        net, wrong, validation=data.validation, patience=40, on_event=events.append, **settings
    )
    figures = [e["figure"] for e in events if e["event"] == "validation"]
    assert len(figures) == selection.JUDGEMENTS
    assert entropy(best, data.validation) == pytest.approx(min(figures), rel=1e-4)
    assert entropy(best, data.validation) < entropy(last, data.validation)


@torch.no_grad()
def entropy(model: nn.Module, split: Batches) -> float:
    return float(functional.cross_entropy(model(split.inputs), split.targets))


def test_patience_ends_a_training_that_gets_no_better(student, net, data) -> None:
    events: list[dict] = []
    settings = {"steps": 200, "learning_rate": 1e-12, "validation": data.validation}
    finetune(student, data.train, net, patience=2, on_event=events.append, **settings)
    judgements = [e for e in events if e["event"] == "validation"]
    assert len(judgements) < selection.JUDGEMENTS
    with pytest.raises(InputError, match="patience=0"):
        finetune(student, data.train, net, patience=0, **settings)


@pytest.mark.parametrize("stop_at", [5, 13])
def test_an_interrupted_run_with_all_options_ends_in_the_same_weights(
    student, net, data, tmp_path, monkeypatch, stop_at
) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)
    path = tmp_path / "state"
    settings = {"steps": 20, "learning_rate": 0.1, "ema": 0.7, "validation": data.validation}
    whole = finetune(student, data.train, net, **settings)

    class Interrupting(Idle):
        left = stop_at

        def after_step(self, progress: float) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(student, data.train, net, checkpoint=path, more=[Interrupting()], **settings)
    assert path.is_file()
    assert states_equal(whole, finetune(student, data.train, net, checkpoint=path, **settings))
    with pytest.raises(InputError, match="of another run"):
        finetune(student, data.train, net, checkpoint=path, **{**settings, "ema": 0.8})


def test_events_are_json_lines(student, net, data, tmp_path) -> None:
    log = tmp_path / "events.jsonl"
    finetune(student, data.train, net, steps=50, on_event=JsonLines(log))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[-1]["step"] == 50
    assert events[-1]["progress"] == 1
    assert {"time", "event", "loss", "learning_rate", "seconds"} <= set(events[-1])
    with pytest.raises(InputError, match="cannot be written"):
        JsonLines(tmp_path)({"event": "step"})


def test_wrong_options_are_named_before_any_step(student, net, data) -> None:
    with pytest.raises(InputError, match="'nowhere' fits no module"):
        finetune(student, data.train, net, match=["nowhere"])
    with pytest.raises(InputError, match=r"ema=1\.5"):
        finetune(student, data.train, net, ema=1.5)
    with pytest.raises(InputError, match="Learning rate -1"):
        finetune(student, data.train, net, learning_rate=-1)
    with pytest.raises(InputError, match="-3 steps"):
        finetune(student, data.train, net, steps=-3)
