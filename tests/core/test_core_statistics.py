"""Statistics merged, derived and stored."""

import dataclasses
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.statistics import Statistics, load_statistics, save_statistics
from sft.profiling.statistics import gather_statistics

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "narrow": nn.Conv1d(1, 9, 5, stride=2, padding=2),
    "pointwise": nn.Conv2d(4, 6, 1, stride=2),
    "shrinking": nn.Conv2d(6, 4, 1),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "linear": nn.Linear(5, 7),
}


def fields_of(s: Statistics) -> dict[str, Tensor]:
    found = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
    return {k: torch.as_tensor(v).double() for k, v in found.items() if v is not None}


def assert_equal(found: Statistics, wanted: Statistics) -> None:
    assert fields_of(found).keys() == fields_of(wanted).keys()
    for name, value in fields_of(wanted).items():
        torch.testing.assert_close(fields_of(found)[name], value, rtol=1e-11, atol=1e-12)


def parts_and_whole(name: str) -> tuple[list[Statistics], Statistics]:
    """Statistics of three parts of unequal size and mean, and of all of them."""
    torch.manual_seed(0)
    layer = LAYERS[name].double()
    axes = {"Conv1d": (9,), "Linear": ()}.get(type(layer).__name__, (6, 5))
    channels = layer.weight.shape[0] if name == "transposed" else layer.weight.shape[1]
    channels *= getattr(layer, "groups", 1)
    x = torch.randn(9, channels, *axes, dtype=torch.float64)
    data = [x[:2] + 3, x[2:5] * 2, x[5:] - 1]

    def gather(batches: list[Tensor]) -> Statistics:
        return gather_statistics(nn.Sequential(layer), ["0"], batches, patch_covariances=["0"])[0][
            "0"
        ]

    return [gather([part]) for part in data], gather(data)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_parts_equal_the_whole(name: str) -> None:
    parts, whole = parts_and_whole(name)
    assert_equal(reduce(Statistics.merge, parts), whole)
    assert_equal(parts[0].merge(parts[1].merge(parts[2])), whole)
    assert_equal(parts[2].merge(parts[0]).merge(parts[1]), whole)


def test_merged_gradients_are_weighted_by_positions() -> None:
    (first, second, _), _ = parts_and_whole("conv")
    one, two = torch.eye(3).double().expand(2, 3, 3), 4 * torch.eye(3).double().expand(2, 3, 3)
    merged = dataclasses.replace(first, gradient_covariance=one).merge(
        dataclasses.replace(second, gradient_covariance=two)
    )
    wanted = (first.count * one + second.count * two) / (first.count + second.count)
    torch.testing.assert_close(merged.gradient_covariance, wanted)


def test_what_only_one_side_knows_is_left_out() -> None:
    (first, second, _), _ = parts_and_whole("conv")
    merged = first.merge(dataclasses.replace(second, patch_covariance=None))
    assert merged.patch_covariance is None
    assert merged.output_covariance is not None
    assert merged.merge(first).patch_covariance is None


def test_statistics_of_different_layers_are_not_merged() -> None:
    conv, linear = parts_and_whole("conv")[1], parts_and_whole("linear")[1]
    with pytest.raises(InputError, match=r"same layer.*\(2, 18\) and \(1, 5\)"):
        conv.merge(linear)


def test_outputs_need_some_covariance() -> None:
    _, whole = parts_and_whole("conv")
    bare = dataclasses.replace(whole, patch_covariance=None, output_covariance=None)
    assert bare.full_covariance() is None
    with pytest.raises(InputError, match=r"\(2, 3, 2, 9\)"):
        bare.covariance_of_outputs(torch.zeros(2, 3, 2, 9))


def test_taps_that_never_vary() -> None:
    layer = nn.Conv1d(2, 3, 3)
    found = gather_statistics(nn.Sequential(layer), ["0"], [torch.ones(2, 2, 8)])[0]["0"]
    assert torch.equal(found.tap_covariance, torch.eye(3).double())
    assert found.tap_variance == 0
    varied = gather_statistics(nn.Sequential(layer), ["0"], [torch.randn(2, 2, 8)])[0]["0"]
    merged = found.merge(varied)
    assert float(merged.tap_covariance.diagonal().mean()) == pytest.approx(1)


def test_stored_and_read_again(tmp_path: Path) -> None:
    kept = {name: parts_and_whole(name)[1] for name in LAYERS}
    kept["a.b:c"] = kept["conv"]
    save_statistics(kept, tmp_path / "one.safetensors")
    again = load_statistics(tmp_path / "one.safetensors")
    assert list(again) == list(kept)
    for name, wanted in kept.items():
        assert fields_of(again[name]).keys() == fields_of(wanted).keys()
        assert again[name].count == wanted.count
        assert again[name].tap_variance == wanted.tap_variance
        for field, value in fields_of(wanted).items():
            assert torch.equal(fields_of(again[name])[field], value)
    save_statistics(again, tmp_path / "two.safetensors")
    first, second = (tmp_path / f"{n}.safetensors" for n in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert b"gradient_covariance" not in first.read_bytes()


@pytest.mark.parametrize("content", [b"no safetensors file", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="does not hold layer statistics"):
        load_statistics(tmp_path / "s.safetensors")
