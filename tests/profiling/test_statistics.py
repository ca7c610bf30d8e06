"""Streaming statistics against a brute-force im2col."""

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.core.statistics import load_statistics, save_statistics
from sft.profiling.statistics import gather_statistics


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_equal_to_brute_force(mode: str, tmp_path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=1, padding_mode=mode).double()
    x = torch.randn(6, 3, 9, 8, dtype=torch.float64) + 1
    found, samples = gather_statistics(nn.Sequential(conv), ["0"], [x[:4], x[4:]])
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    patches = nn.functional.unfold(padded, 3, stride=2).transpose(0, 1).flatten(1)
    outputs = conv.weight.detach().flatten(1) @ patches
    pixels = x.transpose(0, 1).flatten(1)
    s = found["0"]
    assert samples == 6
    assert s.count == outputs.shape[1]
    torch.testing.assert_close(s.output_mean, outputs.mean(1))
    torch.testing.assert_close(s.output_covariance, torch.cov(outputs, correction=0))
    torch.testing.assert_close(s.patch_mean, patches.mean(1))
    torch.testing.assert_close(s.input_covariance, torch.cov(pixels, correction=0))
    save_statistics(found, tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")["0"]
    assert torch.equal(again.output_covariance, s.output_covariance)
    assert again.count == s.count


def test_hooks_are_removed_even_on_failure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    with pytest.raises(InputError, match="NaN"):
        gather_statistics(model, ["0"], [torch.full((1, 3, 5, 5), float("nan"))])
    assert not model[0]._forward_hooks


def test_empty_data_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        gather_statistics(nn.Sequential(nn.Conv2d(3, 5, 3)), ["0"], [])


def test_a_damaged_file_is_refused(tmp_path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(InputError, match="does not hold layer statistics"):
        load_statistics(tmp_path / "s.safetensors")
