"""What a job hands on to its trainings."""

from types import SimpleNamespace

import pytest

from sft import job as room
from sft.core.errors import InputError
from sft.job import Job, Training
from sft.runtimes.targets import find_target


def tuned(net, data, training: Training, monkeypatch) -> dict:
    """The arguments with which a job trains for 30 steps."""
    given: dict = {}
    monkeypatch.setattr(room, "finetune", lambda module, *_, **named: given.update(named) or module)
    job = Job(net, data, find_target("onnxruntime-avx2"), training, None, "net", 0, 1, print)
    job.original = net
    job.work = SimpleNamespace(trained=lambda _, network, run: run(network, None))
    assert job._tune("stage", net, 30, 1e-3) is net
    return given


def test_options_of_training_reach_it(net, data, monkeypatch) -> None:
    usual = tuned(net, data, Training(30, 10), monkeypatch)
    assert usual["minutes"] is None
    assert usual["validation"] is None
    assert usual["ema"] == 0
    assert usual["on_event"] is print
    asked = Training(30, 10, minutes=8, ema=0.9, patience=3, save_every=2.0)
    given = tuned(net, data, asked, monkeypatch)
    assert given["minutes"] == pytest.approx(6)  # its share of the steps
    assert given["validation"] is data.validation
    assert (given["patience"], given["ema"], given["save_every"]) == (3, 0.9, 2.0)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"ema": 1.0}, {"patience": 0}, {"steps": -1}])
def test_impossible_trainings_are_refused(wrong) -> None:
    with pytest.raises(InputError):
        Training(**wrong)
