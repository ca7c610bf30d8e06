"""Fine-tuning: it learns, it is repeatable, it goes on after an interruption."""

import pytest
import torch

from sft.core.data import Batches
from sft.core.errors import InputError
from sft.layers import Conv2dSFT
from sft.training import checkpoint as checkpoint_file
from sft.training.finetune import finetune


@pytest.fixture
def student(net):
    from sft.decompositions import factorize

    small = type(net)()
    small.load_state_dict(net.state_dict())
    small.down = factorize(net.down, "channel_out", 3)
    assert isinstance(small.down, Conv2dSFT)
    return small.eval()


def states_equal(a, b) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_the_student_comes_closer_to_the_teacher(net, data) -> None:
    torch.manual_seed(0)
    student = type(net)().eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    x = data.validation.inputs
    tuned = finetune(student, data.train, net, steps=40, learning_rate=1e-2)
    with torch.no_grad():
        wanted = net(x).log_softmax(1)
        far, near = (
            float((wanted.exp() * (wanted - m(x).log_softmax(1))).sum(1).mean())
            for m in (student, tuned)
        )
    assert near < 0.5 * far
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_without_a_teacher_the_targets_are_learned(net, data) -> None:
    torch.manual_seed(0)
    fresh = type(net)()
    tuned = finetune(fresh, data.train, steps=40, learning_rate=1e-2)
    x, y = data.train.inputs, data.train.targets
    assert (tuned(x).argmax(1) == y).float().mean() > (
        fresh.eval()(x).argmax(1) == y
    ).float().mean()


def test_batch_norm_statistics_stay(student, net, data) -> None:
    tuned = finetune(student, data.train, net, steps=3)
    assert torch.equal(tuned.stem_norm.running_mean, net.stem_norm.running_mean)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(student, net, data) -> None:
    first = finetune(student, data.train, net, steps=6, seed=1)
    torch.manual_seed(99)
    again = finetune(student, data.train, net, steps=6, seed=1)
    other = finetune(student, data.train, net, steps=6, seed=2)
    assert states_equal(first, again)
    assert not states_equal(first, other)


def test_the_global_generator_is_left_as_it_was(student, net, data) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    finetune(student, data.train, net, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop_at", [2, 7, 11])
def test_an_interrupted_run_ends_in_the_same_weights(
    student, net, data, tmp_path, monkeypatch, stop_at
) -> None:
    monkeypatch.setattr(checkpoint_file, "SAVE_SECONDS", 0.0)
    whole = finetune(student, data.train, net, steps=12)
    path = tmp_path / "state"

    class Interrupting(Batches):
        given = 0

        def __iter__(self):
            for batch in super().__iter__():
                type(self).given += 1
                if type(self).given == stop_at + 1:
                    raise KeyboardInterrupt
                yield batch

    x, y = data.train.inputs, data.train.targets
    with pytest.raises(KeyboardInterrupt):
        finetune(student, Interrupting(x, y, 32, True), net, steps=12, checkpoint=path)
    assert path.is_file()
    resumed = finetune(student, data.train, net, steps=12, checkpoint=path)
    assert states_equal(whole, resumed)
    assert states_equal(whole, finetune(student, data.train, net, steps=12, checkpoint=path))
    with pytest.raises(InputError, match="of another run"):
        finetune(student, data.train, net, steps=13, checkpoint=path)


def test_more_steps_and_the_rate_change_the_result(student, net, data) -> None:
    a = finetune(student, data.train, net, steps=3)
    b = finetune(student, data.train, net, steps=4)
    c = finetune(student, data.train, net, steps=3, learning_rate=1e-4)
    assert not states_equal(a, b)
    assert not states_equal(a, c)


def test_empty_data_missing_targets_and_divergence_are_named(student, net, data) -> None:
    with pytest.raises(InputError, match="empty"):
        finetune(student, [], net, steps=1)
    with pytest.raises(InputError, match="needs loaders of"):
        finetune(student, [data.train.inputs[:8]], steps=1)
    with pytest.raises(InputError, match="train data holds NaN or infinite"):
        finetune(student, [torch.full((2, 1, 12, 12), float("inf"))], net, steps=1)
    with pytest.raises(InputError, match="diverged at step"):
        finetune(student, data.train, net, steps=60, learning_rate=1e30)


def test_outputs_that_are_no_logits_are_matched_too(data) -> None:
    from torch import nn

    torch.manual_seed(0)
    teacher, pupil = (nn.Conv2d(1, 3, 3) for _ in range(2))
    x = data.train.inputs
    tuned = finetune(pupil, data.train, teacher, steps=40, learning_rate=3e-2)
    with torch.no_grad():
        far, near = (float((m(x) - teacher(x)).square().mean()) for m in (pupil, tuned))
    assert near < 0.5 * far
