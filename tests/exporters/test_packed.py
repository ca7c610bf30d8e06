"""Packed integers: the bits themselves, and a network stored and restored."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import Option
from sft.exporters import load, save_packed
from sft.exporters.streams import DEFLATE, decode, encode, pack_bits, unpack_bits
from sft.planning.allocate import plan as make_plan
from sft.profiling.profile import profile
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply

TARGET = "onnxruntime-avx2"


@given(bits=st.integers(2, 8), count=st.integers(0, 70), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_packing_is_exact_and_dense(bits: int, count: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = np.random.default_rng(seed).integers(low, high, count).astype(np.int8)
    stream = pack_bits(values, bits)
    assert len(stream) == -(-count * bits // 8)
    assert np.array_equal(unpack_bits(stream, bits, count), values)


@pytest.fixture
def rounded(profiled, net, data):
    plan = make_plan(profiled, Budget())
    plan = plan.replace("body", Option("channel_in", (8,), 4))
    return quantize(apply(net, plan), plan, find_target(TARGET), data.calibration)


def test_a_restored_network_gives_the_same_outputs(rounded, net, data, tmp_path) -> None:
    size = save_packed(rounded, tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    restored = load(tmp_path / "m.safetensors", net)
    x = data.test.inputs
    torch.testing.assert_close(restored(x), rounded(x), rtol=0, atol=0)
    torch.testing.assert_close(restored.convert()(x), rounded.convert()(x), rtol=0, atol=0)


@given(bits=st.integers(2, 8), count=st.integers(0, 300), spread=st.floats(0.1, 100.0))
@settings(max_examples=60, deadline=None)
def test_the_shorter_stream_is_taken_and_decoding_is_exact(bits, count, spread) -> None:
    top = 2 ** (bits - 1) - 1
    drawn = np.random.default_rng(count).normal(0, spread, count).round()
    values = drawn.clip(-top, top).astype(np.int8)
    stream, coding = encode(values, bits)
    assert len(stream) <= len(pack_bits(values, bits))
    assert np.array_equal(decode(stream, bits, count, coding), values)


def test_crowded_weights_take_about_their_entropy() -> None:
    values = np.random.default_rng(0).normal(0, 1.2, 20_000).round().clip(-7, 7).astype(np.int8)
    counts = np.unique(values, return_counts=True)[1] / len(values)
    entropy = float(-(counts * np.log2(counts)).sum()) * len(values) / 8
    stream, coding = encode(values, 4)
    assert coding == DEFLATE
    assert entropy <= len(stream) < 1.05 * entropy
    assert len(stream) < 0.65 * len(pack_bits(values, 4))


def test_a_damaged_stream_is_refused() -> None:
    stream, coding = encode(np.zeros(500, np.int8), 4)
    for broken, count in ((stream[:1], 500), (stream, 499), (stream, 501)):
        with pytest.raises(ValueError, match=r"numbers where|damaged"):
            decode(broken, 4, count, coding)
    with pytest.raises(ValueError, match="unknown coding"):
        decode(stream, 4, 500, "rot13")


def test_packed_weights_take_at_most_the_bits_of_their_range(rounded, tmp_path) -> None:
    from safetensors import safe_open

    save_packed(rounded, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as stored:
        packed = stored.get_tensor("packed:down.weight")
        four = stored.get_tensor("packed:body.second.weight")
    assert packed.numel() <= 32 * 16 * 9
    assert four.numel() <= 16 * 8 * 9 * 4 / 8


def test_another_model_and_a_damaged_file_are_refused(rounded, tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    save_packed(rounded, path)
    with pytest.raises(InputError):
        load(path, torch.nn.Conv2d(1, 3, 3))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a packed model"):
        load(path)


@pytest.mark.parametrize(("keep", "scheme"), [(("3",), "keep"), ((), "stored")])
def test_a_network_without_biases_and_a_layer_without_integer_kernels(
    data, tmp_path, keep, scheme
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, bias=False),
        torch.nn.ConvTranspose2d(16, 4, 2, stride=2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    ).eval()
    measured = profile(model, data, TARGET)
    plan = make_plan(measured, Budget(macs=0.8), keep=keep)
    assert plan.option("2").rank
    assert plan.option("3").scheme == scheme
    small = quantize(apply(model, plan), plan, TARGET, data.calibration)
    assert ("3.weight" in small.weights()) == (scheme == "stored")
    assert plan.cost.params == sum(p.numel() for p in small.parameters())
    save_packed(small, tmp_path / "m.safetensors")
    x = data.test.inputs
    restored = load(tmp_path / "m.safetensors", model)
    torch.testing.assert_close(restored(x), small(x), rtol=0, atol=0)
