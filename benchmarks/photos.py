"""Photos that come inside packages, for calibration and agreement.

Debian's `gcompris-qt-data` (pictures inside its resource files), `tuxpaint-stamps-default` (cut-out
photos, put on a plain background), and the samples of PyPI's `scikit-image` and `foolbox`. They are
read where they are installed and never copied. The splits hold different pictures: which split a
picture belongs to is drawn from a hash of its coarse pixels; doubles count once.

Such a set serves for differences between two networks. It says nothing about ImageNet accuracy.
"""

import hashlib
import importlib.util
import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RESOURCES = Path("/usr/share/gcompris-qt/rcc")
STAMPS = Path("/usr/share/tuxpaint/stamps")
ACTIVITIES = (  # those of gcompris that show photos; the others draw or paint
    "categorization",
    "clickgame",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
SUBJECTS = (  # those of tuxpaint that are mostly photos
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "medical",
    "plants",
    "sports",
    "town",
    "vehicles",
)
DRAWN = ("cartoon", "flags", "roadsigns")
NEEDED = "Debian's gcompris-qt-data and tuxpaint-stamps-default"
SMALLEST = 100  # pixels of the shorter side
SHARES = {"calibration": 0.5, "validation": 0.2, "test": 0.3}


def load_photos(split: str, size: int = 224, crops: int = 1, seed: int = 0) -> torch.Tensor:
    """Pictures of one split as ``(N, 3, size, size)``, values ``(pixel - 127) / 128``.

    crops : 1 takes the centre; more take that many random crops and flips of each picture.
    Raises `SystemExit` that names the packages when there are no pictures here.
    """
    generator = np.random.default_rng(seed)
    distinct = {_fingerprint(p): p for p in _pictures()}
    pictures = [p for key, p in distinct.items() if _split_of(key) == split]
    if len(pictures) < 50:
        raise SystemExit(f"Too few photos on this machine ({len(pictures)}). Install {NEEDED}.")
    prepared = [
        _crop(picture, size, None if crops == 1 else generator)
        for picture in pictures
        for _ in range(crops)
    ]
    order = generator.permutation(len(prepared))
    pixels = torch.from_numpy(np.stack([prepared[i] for i in order]))
    return ((pixels.float() - 127) / 128).permute(0, 3, 1, 2).contiguous()


def load_other_pictures(size: int = 224) -> torch.Tensor:
    """The paintings and drawings of the same packages, none of them in a split, the centre of each.

    ``(N, 3, size, size)`` as `load_photos` gives: more to calibrate on, never to judge with.
    """
    photos = {_fingerprint(p) for p in _pictures()}
    others = {_fingerprint(p): p for p in _all_pictures()}
    generator = np.random.default_rng(0)
    prepared = [_crop(p, size, None) for key, p in others.items() if key not in photos]
    order = generator.permutation(len(prepared))
    pixels = torch.from_numpy(np.stack([prepared[i] for i in order]))
    return ((pixels.float() - 127) / 128).permute(0, 3, 1, 2).contiguous()


def _all_pictures() -> Iterator[Image.Image]:
    for path in sorted(RESOURCES.glob("*.rcc")):
        yield from _inside(path)
    for path in sorted(STAMPS.rglob("*.png")):
        yield from _opened(path.read_bytes())


def _pictures() -> Iterator[Image.Image]:
    for activity in ACTIVITIES:
        if (path := RESOURCES / f"{activity}.rcc").is_file():
            yield from _inside(path)
    for subject in SUBJECTS:
        for path in sorted((STAMPS / subject).rglob("*.png")):
            if not any(word in path.parts for word in DRAWN):
                yield from _opened(path.read_bytes())
    for package, pattern in (("skimage", "data/*.*"), ("foolbox", "data/imagenet*.*")):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            for path in sorted(Path(found.origin).parent.glob(pattern)):
                if path.suffix in (".png", ".jpg", ".jpeg"):
                    yield from _opened(path.read_bytes())


def _inside(path: Path) -> Iterator[Image.Image]:
    """The WebP pictures in a Qt resource file, found by their header."""
    content, start = path.read_bytes(), 0
    while (start := content.find(b"RIFF", start)) >= 0:
        length = 8
        if content[start + 8 : start + 12] == b"WEBP":
            length += struct.unpack("<I", content[start + 4 : start + 8])[0]
            yield from _opened(content[start : start + length])
        start += length


def _opened(content: bytes) -> Iterator[Image.Image]:
    """One RGB picture, or none where it is too small or no picture."""
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, ValueError):
        return
    if min(picture.size) < SMALLEST:
        return
    if picture.mode != "RGB":
        cut_out = picture.convert("RGBA")
        shade = 96 + int.from_bytes(hashlib.sha256(content).digest()[:1], "big") // 2
        ground = Image.new("RGBA", cut_out.size, (shade, shade, shade, 255))
        picture = Image.alpha_composite(ground, cut_out).convert("RGB")
    yield picture


def _fingerprint(picture: Image.Image) -> bytes:
    """The same for doubles of one picture in different sizes."""
    return hashlib.sha256(bytes(v // 32 for v in picture.resize((8, 8)).tobytes())).digest()


def _split_of(fingerprint: bytes) -> str:
    place = int.from_bytes(fingerprint[:4], "big") / 2**32
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "test"


def _crop(picture: Image.Image, size: int, generator: np.random.Generator | None) -> np.ndarray:
    """The centre seven eighths, or a random crop of half to all of the shorter side."""
    width, height = picture.size
    side = min(width, height)
    side = int(side * (0.875 if generator is None else generator.uniform(0.5, 1.0)))
    left, top = (width - side) // 2, (height - side) // 2
    flip = False
    if generator is not None:
        left = int(generator.integers(0, width - side + 1))
        top = int(generator.integers(0, height - side + 1))
        flip = bool(generator.integers(0, 2))
    box = (left, top, left + side, top + side)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels.copy()
