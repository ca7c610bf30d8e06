"""Spoken keywords, synthesised by espeak-ng: data with exact truth for the audio benchmarks.

16 words, said by many voice variants in several accents, at random speed and pitch; 1 s of 8 kHz
sound each. The voices of train, validation and test are disjoint. The clips are synthesised once
(in 1-2 minutes), the same ones for the same seed and version of espeak-ng, and kept as one .npz.

Every clip is heard at a random moment, loudness and noise level. Validation and test clips are
degraded once and stay; train clips anew in each pass. A clip is given as `(1, 8000)` waveform or
as `(1, 40, 61)` log-mel spectrogram.
"""

import hashlib
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal import resample_poly

from sft.core.data import Batches, Data
from sft.core.errors import InputError

WORDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off"),
    *("stop", "go", "start", "back", "open", "close", "play", "pause"),
)
# "en" is British English; by its other name, en-gb, espeak-ng ignores the voice variant.
ACCENTS = ("en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd")
# Variants of espeak-ng, by their file names. Strongly distorted ones, on which trial networks did
# badly (Alicia, Andy, anika, norbert, shelby, travis, zac), serve training only.
VOICES = {
    "train": "m1 m2 m3 m5 m7 f1 f2 f4 Alex Alicia Andy Annie Denis Gene Gene2 Henrique Hugo Lee "
    "Marco adam anika antonio belinda benjamin boris david ed edward edward2 grandma klatt2 klatt3 "
    "linda marcelo max norbert pablo paul quincy robert shelby steph steph2 steph3 travis victor "
    "zac",
    "validation": "m6 f5 Jacky john miguel sandro",
    "test": "m4 m8 f3 Andrea Diogo Michael Mike grandpa michel pedro rob",
}
COUNTS = {"train": 6000, "validation": 1000, "test": 2000}
FORMS = ("waveform", "spectrogram")

HERTZ, SAMPLES = 8000, 8000
WINDOW, HOP, MELS = 256, 128, 40
SIGNAL_TO_NOISE = (2.0, 20.0)  # decibels
GAIN = (-8.0, 8.0)  # decibels
LOG_MEL_MEAN, LOG_MEL_STD = 2.9, 2.3

Clips = npt.NDArray[np.int16]
Labels = npt.NDArray[np.int64]


def keyword_data(
    folder: str | Path | None = None, form: str = "waveform", seed: int = 0, batch_size: int = 100
) -> Data:
    """Calibration (500 degraded train clips), train, validation and test as `sft.Data`.

    folder : where the synthesised clips are kept; the user's cache directory by default.
    form : "waveform", samples `(1, 8000)`, or "spectrogram", samples `(1, 40, 61)`.

    The train loader is shuffled and degrades with torch's global generator: seed it for a
    repeatable pass. Raises `InputError` where espeak-ng is needed and missing.
    """
    if form not in FORMS:
        raise InputError(f"There is no form '{form}' of the keywords. Known: {', '.join(FORMS)}.")
    clips = {name: _tensors(*pair) for name, pair in keyword_clips(folder, seed).items()}

    def heard(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        x = degrade(x, generator)
        return log_mel(x) if form == "spectrogram" else x

    def fixed(split: str, number: int, count: int | None = None) -> Batches:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        x, labels = (tensor[:count] for tensor in clips[split])
        return Batches(
            torch.cat([heard(part, generator) for part in x.split(500)]), labels, batch_size
        )

    return Data(
        calibration=fixed("train", 1, 500),
        train=Batches(*clips["train"], batch_size, shuffle=True, transform=heard),
        validation=fixed("validation", 2),
        test=fixed("test", 3),
        name=f"spoken keywords ({form})",
    )


def keyword_clips(
    folder: str | Path | None = None, seed: int = 0, threads: int = 2
) -> dict[str, tuple[Clips, Labels]]:
    """Clean speech `(N, 8000)`, from its first sound on, and labels `(N,)` of each split.

    Read from `folder` where it has them, else synthesised and written there.
    """
    folder = _cache() if folder is None else Path(folder)
    recipe = repr((WORDS, ACCENTS, VOICES, COUNTS, seed))
    path = folder / f"keywords-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.npz"
    if not path.is_file():
        program = _espeak()
        stored: dict[str, npt.NDArray[np.generic]] = {}
        for number, split in enumerate(COUNTS):
            stored[split], stored[f"{split}_labels"] = _synthesise(
                program, split, (seed, number), threads
            )
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(unfinished, **stored)
        unfinished.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return {split: (stored[split], stored[f"{split}_labels"]) for split in COUNTS}


def degrade(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Clean clips `(N, 1, 8000)` at a random moment, loudness and level of coloured noise.

    The noise is Gaussian with power spectrum f^-a, a between 0 (white) and 2 (brown), flat
    below 40 Hz. Random numbers come from `generator`, or from torch's global one.
    """
    count = len(x)
    moment, level, loudness, colour = torch.rand(4, count, 1, generator=generator)
    time = torch.arange(SAMPLES)
    length = ((x[:, 0] != 0) * (time + 1)).amax(1, keepdim=True)
    start = (moment * (SAMPLES - length + 1)).long()
    speech = x[:, 0].gather(1, (time - start) % SAMPLES)
    spectrum = torch.fft.rfft(torch.randn(count, SAMPLES, generator=generator))
    tone = torch.arange(spectrum.shape[1]).clamp(min=40).float()
    noise = torch.fft.irfft(spectrum * tone**-colour, n=SAMPLES)
    noise = noise / noise.square().mean(1, keepdim=True).sqrt()
    low, high = SIGNAL_TO_NOISE
    noise = noise * 10 ** (-(low + (high - low) * level) / 20)
    low, high = GAIN
    return ((speech + noise) * 10 ** ((low + (high - low) * loudness) / 20))[:, None]


def log_mel(x: torch.Tensor) -> torch.Tensor:
    """Waveforms `(N, 1, 8000)` to log-mel spectrograms `(N, 1, 40, 61)`, about unit variance.

    Frames of 32 ms each 16 ms, Hann window, triangular filters of equal width in mel.
    """
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(x[:, 0], WINDOW, HOP, window=window, center=False, return_complex=True)
    energy = _mel_filters() @ spectrum.abs().square()
    return ((torch.log(energy + 1e-2) - LOG_MEL_MEAN) / LOG_MEL_STD)[:, None]


def _mel_filters() -> torch.Tensor:
    """Triangles `(40, 129)` from 60 Hz to 4 kHz. Source: O'Shaughnessy 1987 (the mel formula)."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (60, HERTZ / 2))
    corners = 700 * (10 ** (torch.linspace(low, high, MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, HERTZ / 2, WINDOW // 2 + 1)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def _tensors(clips: Clips, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips `(N, 1, 8000)` whose speech has unit power, and labels."""
    x = torch.from_numpy(clips.astype(np.float32))[:, None]
    power = x.square().sum(2, keepdim=True) / (x != 0).sum(2, keepdim=True)
    return x / power.sqrt(), torch.from_numpy(labels)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-keywords"


def _espeak() -> str:
    """The path of espeak-ng. Raises `InputError` if it, or a voice, is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise InputError(
            "The spoken keywords are synthesised by espeak-ng, which is not installed. Install the "
            "package 'espeak-ng' (Debian, Ubuntu: apt install espeak-ng; macOS: brew install "
            "espeak-ng), or give the folder of an earlier synthesis."
        )
    listed = subprocess.run([program, "--voices=variant"], capture_output=True, check=True).stdout
    known = {word.removeprefix("!v/") for word in listed.decode().split()}
    missing = [
        voice for voices in VOICES.values() for voice in voices.split() if voice not in known
    ]
    if missing:
        raise InputError(
            f"This espeak-ng lacks the voices {', '.join(missing)}: install 1.51 or later."
        )
    return program


def _synthesise(
    program: str, split: str, seed: tuple[int, int], threads: int
) -> tuple[Clips, Labels]:
    count, voices = COUNTS[split], VOICES[split].split()
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % len(WORDS)).astype(np.int64)
    commands = [
        [
            program,
            *("-v", f"{random.choice(ACCENTS)}+{random.choice(voices)}"),
            *("-s", str(random.integers(120, 221)), "-p", str(random.integers(20, 81))),
            *("--stdout", WORDS[label]),
        ]
        for label in labels
    ]
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(_speak, commands))), labels


def _speak(command: list[str]) -> Clips:
    """What espeak-ng says, at 8 kHz, silence before it cut off, `(8000,)`."""
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    head = spoken.index(b"data") + 8  # the sizes in a piped header are not filled in
    hertz = int.from_bytes(spoken[24:28], "little")
    sound = np.frombuffer(spoken[head : len(spoken) // 2 * 2], "<i2").astype(np.float64)
    divisor = math.gcd(HERTZ, hertz)
    sound = resample_poly(sound, HERTZ // divisor, hertz // divisor)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1][:SAMPLES]
    clip = np.zeros(SAMPLES, np.int16)
    clip[: len(sound)] = np.round(sound * (30000 / np.abs(sound).max()))
    return clip
