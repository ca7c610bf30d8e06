"""The keyword networks of the benchmarks load, and their data fits them (no espeak-ng needed)."""

import runpy
from pathlib import Path

import pytest
import torch

from sft.core.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = runpy.run_path(str(BENCHMARKS / "keywords.py"))
NETWORKS = runpy.run_path(str(BENCHMARKS / "keyword_networks.py"))
SHAPES = {"waveform": (1, 8000), "spectrogram": (1, 40, 61)}


@pytest.mark.parametrize("name", SHAPES)
def test_stored_weights(name: str) -> None:
    network = NETWORKS["load_keyword_network"](name)
    assert not network.training
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
    assert NETWORKS["weights_of"](name).stat().st_size < 1_500_000
    logits = network(torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, len(WORDS["WORDS"]))
    assert torch.isfinite(logits).all()


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="waveform, spectrogram"):
        NETWORKS["load_keyword_network"]("image")
    with pytest.raises(InputError, match="waveform, spectrogram"):
        WORDS["keyword_data"](form="image")


def test_voices_are_disjoint() -> None:
    voices = [voice for voices in WORDS["VOICES"].values() for voice in voices.split()]
    assert len(voices) == len(set(voices))
    assert len(set(WORDS["WORDS"])) == NETWORKS["CLASSES"]


def test_missing_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt install espeak-ng"):
        WORDS["keyword_clips"](tmp_path)


def test_degrade_moves_speech_and_adds_the_wanted_noise() -> None:
    clean = torch.zeros(400, 1, 8000)
    clean[:, :, :1000] = 1000.0  # so loud that the noise cannot hide it
    heard = WORDS["degrade"](clean, torch.Generator().manual_seed(1))
    again = WORDS["degrade"](clean, torch.Generator().manual_seed(1))
    assert torch.equal(heard, again)
    loud = heard > 0.5 * heard.amax(2, keepdim=True)
    assert (loud.sum(2) == 1000).all()
    first = loud[:, 0].int().argmax(1)
    assert first.min() < 400
    assert first.max() > 6600
    silent = torch.zeros(400, 1, 8000)
    decibels = 10 * torch.log10(WORDS["degrade"](silent).square().mean((1, 2)))
    assert decibels.min() > -20 - 8 - 0.1
    assert decibels.max() < -2 + 8 + 0.1


@pytest.mark.parametrize("hertz", [250, 1000, 3000])
def test_log_mel_peaks_at_the_tone(hertz: int) -> None:
    tone = torch.sin(2 * torch.pi * hertz * torch.arange(8000) / 8000).reshape(1, 1, -1)
    picture = WORDS["log_mel"](tone)
    assert picture.shape == (1, *SHAPES["spectrogram"])

    def mel(f: float) -> float:
        return 1127 * float(torch.log1p(torch.tensor(f / 700)))

    wanted = (mel(hertz) - mel(60)) / (mel(4000) - mel(60)) * 41 - 1
    assert (picture[0, 0].argmax(0) - wanted).abs().max() <= 1
