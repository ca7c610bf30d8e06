"""Fine-tuning: it learns, it is repeatable, it goes on after an interruption."""

import copy

import pytest
import torch
from torch import nn

from sft.core.data import Batches
from sft.core.errors import InputError
from sft.decompositions import factorize
from sft.layers import Conv2dSFT
from sft.training import checkpoint as checkpoint_file
from sft.training.finetune import finetune
from sft.training.loop import Idle


@pytest.fixture
def student(net):
    small = type(net)()
    small.load_state_dict(net.state_dict())
    small.down = factorize(net.down, "channel_out", 3)
    assert isinstance(small.down, Conv2dSFT)
    return small.eval()


class Stop(Idle):
    """Interrupts a training at a step, before its state is stored."""

    def __init__(self, step: int) -> None:
        self.left = step

    def after_step(self, progress: float) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def nudged(net: nn.Module, name: str = "fc.bias") -> nn.Module:
    """A copy of which one number is another."""
    other = copy.deepcopy(net)
    other.state_dict()[name][0] += 1e-3
    return other


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
    with pytest.raises(KeyboardInterrupt):
        finetune(student, data.train, net, steps=12, checkpoint=path, more=[Stop(stop_at)])
    assert path.is_file()
    resumed = finetune(student, data.train, net, steps=12, checkpoint=path)
    assert states_equal(whole, resumed)
    assert states_equal(whole, finetune(student, data.train, net, steps=12, checkpoint=path))
    with pytest.raises(InputError, match="of another run"):
        finetune(student, data.train, net, steps=13, checkpoint=path)


def test_a_state_of_another_network_teacher_or_data_is_refused(
    student, net, data, tmp_path
) -> None:
    x, y = data.train.inputs, data.train.targets
    shorter = type(net)().eval()
    shorter.load_state_dict(net.state_dict())
    shorter.down = factorize(net.down, "channel_out", 2)
    unlabelled = {"model": student, "train": data.train, "teacher": net, "validation": None}
    labelled = {"model": net, "train": Batches(x, y, 32, True), "validation": data.validation}
    cases = {
        "student": (unlabelled, {"model": shorter}),
        "weights": (unlabelled, {"model": nudged(student)}),
        "statistics": (unlabelled, {"model": nudged(student, "stem_norm.running_var")}),
        "teacher": (unlabelled, {"teacher": nudged(net)}),
        "train": (unlabelled, {"train": Batches(x.flip(0), y, 32, True)}),
        "length": (unlabelled, {"train": [(x[:32], y[:32]), (x[32:64], y[32:64])] * 2}),
        "held out": (unlabelled, {"validation": data.validation}),
        "targets": (labelled, {"train": Batches(x, (y + 1) % 4, 32, True)}),
        "held-out targets": (labelled, {"validation": Batches(data.validation.inputs, y[1:65])}),
    }
    for name, (call, changed) in cases.items():
        path = tmp_path / name
        tuned = finetune(**call, steps=2, checkpoint=path)
        stored = path.read_bytes()
        with pytest.raises(InputError, match=r"of another run .*Delete it to start anew"):
            finetune(**call | changed, steps=2, checkpoint=path)
        assert states_equal(tuned, finetune(**call, steps=2, checkpoint=path))
        assert path.read_bytes() == stored


def test_what_does_not_count_is_not_compared(student, net, data, tmp_path) -> None:
    """Targets that nothing uses, the caller's generator, and data that is never the same."""
    path, x = tmp_path / "state", data.train.inputs
    torch.manual_seed(1)
    state = torch.get_rng_state()
    tuned = finetune(student, data.train, net, steps=2, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    unlabelled = Batches(x, None, 32, True)
    assert states_equal(tuned, finetune(student, unlabelled, net, steps=2, checkpoint=path))
    own = torch.Generator().manual_seed(0)
    noisy = Batches(x, None, 32, True, lambda x: x + torch.rand(x.shape, generator=own))
    other = tmp_path / "other"
    tuned = finetune(student, noisy, net, steps=2, checkpoint=other)
    assert states_equal(tuned, finetune(student, noisy, net, steps=2, checkpoint=other))


def test_what_process_0_was_given_counts_for_all(student, net, data, tmp_path, monkeypatch) -> None:
    """This process stands for one whose own share of the data is another."""
    from sft.training import finetune as room

    said, path = [], tmp_path / "state"

    def from_first(work):
        said.append(work())
        return said[0]

    monkeypatch.setattr(room, "from_first", from_first)
    tuned = finetune(student, data.train, net, steps=2, checkpoint=path)
    share = Batches(data.validation.inputs, None, 32, True)
    assert states_equal(tuned, finetune(student, share, net, steps=2, checkpoint=path))
    assert said[0] != said[1]


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
    torch.manual_seed(0)
    teacher, pupil = (nn.Conv2d(1, 3, 3) for _ in range(2))
    x = data.train.inputs
    tuned = finetune(pupil, data.train, teacher, steps=40, learning_rate=3e-2)
    with torch.no_grad():
        far, near = (float((m(x) - teacher(x)).square().mean()) for m in (pupil, tuned))
    assert near < 0.5 * far
