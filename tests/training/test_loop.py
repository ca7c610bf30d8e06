"""The loop: what is read again after an interruption, and what the clock counts."""

import copy

import pytest
import torch

from sft.core.data import Batches
from sft.training import checkpoint as checkpoint_file
from sft.training.loop import Idle, Settings, run_steps
from sft.training.objective import Objective


@pytest.fixture(autouse=True)
def _every_step_is_stored(monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)


class Counting(Batches):
    """Counts what is read, and stops at a batch."""

    read, stop = 0, 10**9

    def __iter__(self):
        for batch in super().__iter__():
            self.read += 1
            if self.read == self.stop:
                raise KeyboardInterrupt
            yield batch


def test_a_resumed_run_reads_again_only_the_pass_that_it_stopped_in(net, data, tmp_path) -> None:
    x, y = data.train.inputs[:96], data.train.targets[:96]  # 3 batches a pass

    def trained(stop: int, state=None):
        loader, student = Counting(x, y, 32, True), copy.deepcopy(net).eval()
        loader.stop = stop
        objective = Objective(student, None, torch.device("cpu"))
        run_steps(student, objective, loader, [], Settings(14, learning_rate=1e-3), state)
        return loader.read, torch.cat([p.detach().flatten() for p in student.parameters()])

    _, undisturbed = trained(10**9)
    with pytest.raises(KeyboardInterrupt):
        trained(12, tmp_path / "state")  # in the fourth pass, of which two batches are done
    read, resumed = trained(10**9, tmp_path / "state")
    assert read == 2 + (14 - 11)
    assert torch.equal(resumed, undisturbed)


def test_reading_again_is_not_counted_as_training(net, data, tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint_file.time, "monotonic", lambda: now[0])

    class Slow(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1.0
                yield batch

    class Stopping(Idle):
        steps, last = 0, 10**9

        def after_step(self, progress):
            self.steps += 1
            now[0] += 1.0
            if self.steps == self.last:
                raise KeyboardInterrupt

    def steps_of(state, last: int) -> int:
        part, student = Stopping(), copy.deepcopy(net).eval()
        part.last = last
        objective = Objective(student, net, torch.device("cpu"))
        slow = Slow(data.train.inputs[:256], None, 16)  # 16 batches a pass
        try:
            run_steps(student, objective, slow, [part], Settings(minutes=1.0), state)
        except KeyboardInterrupt:
            assert part.steps == last
        return part.steps

    undisturbed = steps_of(tmp_path / "whole", 10**9)
    in_two = steps_of(tmp_path / "two", 12) + steps_of(tmp_path / "two", 10**9)
    assert undisturbed == pytest.approx(30, abs=2)
    assert in_two == pytest.approx(undisturbed, abs=2)  # it was 12 seconds, 6 steps, fewer
