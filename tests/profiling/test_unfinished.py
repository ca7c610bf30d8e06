"""An interrupted profile goes on from what was finished, and from nothing else."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sft
from sft.core.data import Batches, Data
from sft.core.errors import InputError
from sft.core.records import Profile
from sft.profiling import profile as room
from sft.profiling.profile import profile
from sft.profiling.request import parts_of
from sft.profiling.unfinished import Unfinished

OPTIONS = {"schemes": ["channel_in"], "weight_bits": 8, "anchor_samples": 16}
PARTS = "weights:1 data:2 target:3 options:4 torch:5"
NAMES = ["weights", "network", "data", "target", "options", "sft", "torch"]


def quick(net: nn.Module, data: Data, resume: Path | None = None, **options: object) -> Profile:
    given = {**OPTIONS, "target": "onnxruntime-avx2", **options}
    return profile(net, data, resume=resume, **given)


@pytest.fixture(scope="module")
def whole(shared) -> Profile:
    return quick(*shared)


def same(first: Profile, second: Profile) -> bool:
    known = first.statistics.keys() == second.statistics.keys() and all(
        torch.equal(own.patch_mean, second.statistics[name].patch_mean)
        for name, own in first.statistics.items()
    )
    return first == second and known


class Stopping:
    """Counts the calls of a function, and interrupts one of them."""

    def __init__(self, work: Callable[..., object], at: int | None) -> None:
        self.work, self.at, self.calls = work, at, 0

    def __call__(self, *given: object, **named: object) -> object:
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.work(*given, **named)


@pytest.mark.parametrize("at", [0, 3])
def test_the_rest_is_measured_and_the_profile_is_that_of_one_go(
    net, data, whole, tmp_path, monkeypatch, at: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(room, "with_damage", Stopping(room.with_damage, at))
        with pytest.raises(KeyboardInterrupt):
            quick(net, data, tmp_path / "begun")
    measured = Stopping(room.with_damage, None)
    gathered = Stopping(room.gather_statistics, None)
    monkeypatch.setattr(room, "with_damage", measured)
    monkeypatch.setattr(room, "gather_statistics", gathered)
    resumed = quick(net, data, tmp_path / "begun")
    assert same(resumed, whole)
    assert (measured.calls, gathered.calls) == (4 - at, 0)
    assert same(quick(net, data, tmp_path / "begun"), whole)
    assert (measured.calls, gathered.calls) == (4 - at, 0)
    assert same(quick(net, data, tmp_path / "other"), whole)
    assert (measured.calls, gathered.calls) == (8 - at, 1)


def test_a_loader_that_breaks_off_leaves_no_half_statistics(net, data, whole, tmp_path) -> None:
    class Breaking:
        def __init__(self) -> None:
            self.thirds = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(data.calibration):
                self.thirds += index == 2
                if self.thirds == 2:  # not when it is hashed, but when statistics are gathered
                    raise ConnectionError("the cable was pulled")
                yield batch

    broken = dataclasses.replace(data, calibration=Breaking())
    with pytest.raises(ConnectionError, match="cable"):
        quick(net, broken, tmp_path / "begun")
    assert not (tmp_path / "begun" / "samples.json").exists()
    assert same(quick(net, data, tmp_path / "begun"), whole)


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.fc.bias[0] += 1e-3
    return net


def strided(net: nn.Module) -> nn.Module:
    net.down.stride = (1, 1)
    return net


def swished(net: nn.Module) -> nn.Module:
    """The same modules under the same names, run with another activation."""

    class SmallNet(type(net)):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.hardswish(self.stem_norm(self.stem(x)))
            x = torch.relu(self.body_norm(self.body(x)) + x)
            x = torch.relu(self.down(x))
            x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
            return self.fc(x)

    SmallNet.__qualname__ = type(net).__qualname__
    net.__class__ = SmallNet
    return net


def late(data: Data, held: bool) -> Data:
    """The same data but for its last batch; as a list it can be told only by reading it."""
    x = data.calibration.inputs.clone()
    x[-1] += 1
    batches = Batches(x, data.calibration.targets, data.calibration.batch_size)
    return dataclasses.replace(data, calibration=batches if held else list(batches))


@pytest.mark.parametrize("held", [True, False])
def test_a_change_of_the_last_batch_alone_is_refused(net, data, tmp_path, held) -> None:
    begun = data if held else dataclasses.replace(data, calibration=list(data.calibration))
    quick(net, begun, tmp_path)
    with pytest.raises(InputError, match="data"):
        quick(net, late(data, held), tmp_path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("network", lambda net, data: ((strided(net), data), {})),
        ("network", lambda net, data: ((swished(net), data), {})),
        ("weights", lambda net, data: ((moved(net), data), {})),
        ("data", lambda net, data: ((net, dataclasses.replace(data, calibration=data.test)), {})),
        ("target", lambda net, data: ((net, data), {"target": "onnxruntime-vnni"})),
        ("options", lambda net, data: ((net, data), {"schemes": ["channel_out"]})),
        ("options", lambda net, data: ((net, data), {"weight_bits": 4})),
        ("options", lambda net, data: ((net, data), {"anchor_samples": 24})),
        ("options", lambda net, data: ((net, data), {"loss_aware": True})),
        ("options", lambda net, data: ((net, data), {"seed": 1})),
    ],
)
def test_what_was_begun_for_another_request_is_refused(net, data, tmp_path, part, change) -> None:
    Unfinished(tmp_path, room.fingerprint(net, data, room.find_target("onnxruntime-avx2"), _how()))
    given, options = change(net, data)
    with pytest.raises(InputError, match=f"begun for another request; different now: {part}\\."):
        quick(*given, tmp_path, **options)


def _how(**changes: object) -> room.Measuring:
    usual = room.Measuring(("channel_in",), (8,), anchor_samples=16)
    return dataclasses.replace(usual, **changes)


def test_the_same_request_is_taken_and_the_name_of_the_model_is_none_of_it(
    net, data, tmp_path
) -> None:
    Unfinished(tmp_path, room.fingerprint(net, data, room.find_target("onnxruntime-avx2"), _how()))
    assert quick(net, data, tmp_path, name="other").model == "other"


def test_versions_and_modules_count_and_addresses_do_not(net, data) -> None:
    class Printed(nn.Sequential):
        def extra_repr(self) -> str:
            return repr(object())

    def parts(*activation: nn.Module) -> dict[str, str]:
        model = Printed(net, *activation)
        return parts_of(room.fingerprint(model, data, room.find_target("onnxruntime"), _how()))

    plain, again, other = parts(nn.ReLU()), parts(nn.ReLU()), parts(nn.Hardswish())
    assert plain == again
    assert list(plain) == NAMES
    assert [part for part in NAMES if plain[part] != other[part]] == ["network"]
    assert (plain["sft"], plain["torch"]) == (sft.__version__, torch.__version__)


def test_a_loader_that_shuffles_gives_the_profile_of_one_go(net, data, whole, tmp_path) -> None:
    shuffled = dataclasses.replace(
        data, calibration=Batches(data.calibration.inputs, None, 16, shuffle=True)
    )
    measured = quick(net, shuffled, tmp_path / "begun")
    layers = sorted((tmp_path / "begun" / "layers").iterdir())
    for layer in layers[1:]:
        layer.unlink()
    torch.manual_seed(5)
    resumed = quick(net, shuffled, tmp_path / "begun")
    assert same(resumed, measured)
    anchors = [[a.damage for e in p.layers for a in e.anchors] for p in (measured, whole)]
    assert anchors[0] != anchors[1]


def test_a_file_where_the_folder_should_be_is_refused_before_anything_is_measured(
    net, data, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(room, "gather_statistics", None)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"'{place}' cannot be written"):
            quick(net, data, place)
    assert (tmp_path / "file").read_text() == "mine"


def test_all_that_differs_is_named(tmp_path) -> None:
    Unfinished(tmp_path, PARTS)
    Unfinished(tmp_path, PARTS)
    with pytest.raises(InputError, match="different now: weights, torch\\. Delete the folder"):
        Unfinished(tmp_path, PARTS.replace("1", "x").replace("5", "y"))
    Unfinished(tmp_path, PARTS)  # a refusal leaves the folder as it was


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"other": 1}'])
def test_a_folder_of_something_else_is_refused(tmp_path, content: str) -> None:
    (tmp_path / "request.json").write_text(content)
    with pytest.raises(InputError, match="not written by an unfinished profile"):
        Unfinished(tmp_path, PARTS)


def test_without_a_folder_nothing_is_written(net, data, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick(net, data)
    assert not list(tmp_path.iterdir())
