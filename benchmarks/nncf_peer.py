"""NNCF's post-training quantisation, of an ONNX file for ONNX Runtime and of OpenVINO's own format.

Source: https://docs.openvino.ai, "Basic Quantization Flow", and NNCF 3.4's `nncf.quantize`: the
preset is left at its default (performance: symmetric) unless activations are other than ReLU, for
which MIXED is advised; the calibration set is used whole; `fast_bias_correction=False` is said to
be slower and more accurate; `overflow_fix` is for processors without VNNI. Everything else is at
its default. This module does not load torch (NNCF may).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]
NEEDED = "pip install nncf openvino onnx"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is said to `nncf.quantize`; None leaves its default."""

    backend: str  # "onnx" or "openvino": the form of the network that is quantised
    preset: str | None = None
    fast_bias_correction: bool = True
    overflow_fix: str | None = None


SETTINGS = {
    "nncf-onnx": Setting("onnx"),
    "nncf-onnx-mixed": Setting("onnx", preset="MIXED"),
    "nncf-onnx-accurate": Setting("onnx", fast_bias_correction=False),
    "nncf-openvino": Setting("openvino"),
    "nncf-openvino-mixed": Setting("openvino", preset="MIXED"),
    "nncf-openvino-accurate": Setting("openvino", fast_bias_correction=False),
    "nncf-openvino-overflow-fix": Setting("openvino", overflow_fix="ENABLE"),
}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
SUFFIX = {name: SUFFIXES[setting.backend] for name, setting in SETTINGS.items()}


def require() -> Any:
    """The package `nncf`; a `SystemExit` says what to install without it or OpenVINO."""
    try:
        import nncf
        import onnx  # noqa: F401
        import openvino  # noqa: F401
    except ImportError:
        raise SystemExit(f"This comparison needs: {NEEDED}") from None
    return nncf


def quantize(name: str, float_path: Path, images: Images, path: Path) -> None:
    """Write the quantised file of one setting (OpenVINO: an XML file with a .bin beside it).

    name : one of `SETTINGS`. float_path : ONNX in fp32 with one input of batch 1.
    images : ``(N, 3, H, W)``, given one by one in their order.
    """
    nncf, setting = require(), SETTINGS[name]
    network, feed, save = BACKENDS[setting.backend](float_path)
    options: dict[str, Any] = {}
    if setting.preset is not None:
        options["preset"] = nncf.QuantizationPreset[setting.preset]
    if setting.overflow_fix is not None:
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix[setting.overflow_fix]
        )
    items = [images[index : index + 1] for index in range(len(images))]
    quantized = nncf.quantize(
        network,
        nncf.Dataset(items, feed),
        subset_size=len(items),
        fast_bias_correction=setting.fast_bias_correction,
        **options,
    )
    save(quantized, str(path))


class OpenVinoFile:
    """A network compiled by OpenVINO on one thread; float parts compute in float32.

    Without that last setting OpenVINO computes them in bfloat16 where the processor can.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        require()
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._request = (
            openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
        )
        self._last: Images | None = None

    def run(self, x: Images) -> Images:
        """The first output for each sample, ``(N, ...) -> (N, ...)``."""
        self._last = x[:1]
        outputs = [self._request.infer([x[i : i + 1]])[0].copy() for i in range(len(x))]
        return np.concatenate(outputs)

    def time(self, count: int) -> list[float]:
        """Seconds of each of `count` runs, on the first sample given last or on fixed noise."""
        if self._last is None:
            shape = tuple(self._request.model_inputs[0].shape)
            self._last = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._request.infer([self._last])
            seconds.append(time.perf_counter() - started)
        return seconds


def _onnx(float_path: Path) -> tuple[Any, Any, Any]:
    import onnx

    network = onnx.load(float_path)
    input_name = network.graph.input[0].name
    return network, lambda image: {input_name: image}, onnx.save


def _openvino(float_path: Path) -> tuple[Any, Any, Any]:
    import openvino

    return openvino.convert_model(str(float_path)), lambda image: image, openvino.save_model


BACKENDS = {"onnx": _onnx, "openvino": _openvino}
