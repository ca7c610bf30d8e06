"""Imports timm, also beside a torch without GPU.

The torchvision wheel of PyPI is built for a GPU. Beside a CPU-only torch its extension does not
load, and torchvision, which timm needs, then fails to import: "operator torchvision::nms does not
exist". Declaring the schemas of those operators first is enough; no classifier calls them.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

BOXES = "Tensor dets, Tensor scores, float iou_threshold"
POOLED = (
    "float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, bool aligned"
)
POINTS = "float input_scale, int input_zero_point, float rois_scale, int rois_zero_point"
SCHEMAS = {
    "nms": f"({BOXES}) -> Tensor",
    "qnms": f"({BOXES}) -> Tensor",
    "roi_align": f"(Tensor input, Tensor rois, {POOLED}) -> Tensor",
    "qroi_align": f"(Tensor input, Tensor rois, {POINTS}, {POOLED}) -> Tensor",
}
DECLARED: list[torch.library.Library] = []  # a schema lives as long as its library


def import_timm() -> ModuleType | None:
    """The package timm, or None where it or torchvision is not installed."""
    found = importlib.util.find_spec("torchvision")
    if found is None or importlib.util.find_spec("timm") is None:
        return None
    if not _extension_loads(Path(str(found.origin)).parent):
        declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("timm")


def declare_operators() -> None:
    """Declare what torchvision cannot be imported without; nothing where that is done already."""
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + SCHEMAS[name])
        DECLARED.append(library)


def _extension_loads(folder: Path) -> bool:
    """Whether the operators that come with torchvision fit the torch that is installed."""
    for path in sorted(folder.glob("_C.*")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            return False
    return True
