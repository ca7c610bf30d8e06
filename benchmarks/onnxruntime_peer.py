"""ONNX Runtime's own post-training quantiser, set up as its documentation advises.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html and the
docstring of `quantize_static` (1.32): shapes are inferred and the graph optimised first, QDQ
format, weights per channel; unsigned activations with signed weights on x86, with `reduce_range`
where the processor has no VNNI. Everything else is at its default. This module does not load torch.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Integer types of activations and weights ("QUInt8" or "QInt8") and the way of calibrating."""

    activations: str
    weights: str
    reduce_range: bool = False
    calibration: str = "MinMax"
    per_channel: bool = True


LAYOUTS = {
    "ort-u8s8": Layout("QUInt8", "QInt8"),
    "ort-u8s8-7bit": Layout("QUInt8", "QInt8", reduce_range=True),
    "ort-u8u8": Layout("QUInt8", "QUInt8"),
    "ort-s8s8": Layout("QInt8", "QInt8"),
    "ort-u8s8-per-tensor": Layout("QUInt8", "QInt8", per_channel=False),
    "ort-u8s8-percentile": Layout("QUInt8", "QInt8", calibration="Percentile"),
    "ort-u8s8-entropy": Layout("QUInt8", "QInt8", calibration="Entropy"),
}
SUFFIX = {name: ".onnx" for name in LAYOUTS}
KEEPS_ACTIVATIONS = ("ort-u8s8-percentile", "ort-u8s8-entropy")  # of all images, in memory


def require() -> Any:
    """The module `onnxruntime.quantization`; a `SystemExit` says what to install without it."""
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference  # noqa: F401
    except ImportError:
        raise SystemExit("This comparison needs: pip install onnxruntime onnx sympy") from None
    logging.getLogger().setLevel(logging.ERROR)  # it advises what is done already
    return quantization


def quantize(name: str, float_path: Path, images: Images, path: Path) -> None:
    """Write the quantised ONNX file of one layout.

    name : one of `LAYOUTS`. float_path : ONNX in fp32 with one input of batch 1.
    images : ``(N, 3, H, W)``, given one by one in their order.
    """
    quantization, layout = require(), LAYOUTS[name]
    prepared = path.with_suffix(".prepared.onnx")
    quantization.shape_inference.quant_pre_process(str(float_path), str(prepared))
    try:
        quantization.quantize_static(
            str(prepared),
            str(path),
            _reader(quantization, _input_name(prepared), images),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType[layout.activations],
            weight_type=quantization.QuantType[layout.weights],
            per_channel=layout.per_channel,
            reduce_range=layout.reduce_range,
            calibrate_method=quantization.CalibrationMethod[layout.calibration],
        )
    finally:
        prepared.unlink(missing_ok=True)


def _reader(quantization: Any, input_name: str, images: Images) -> Any:
    """A calibration reader of batch 1."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, Images]] = (
                {input_name: images[index : index + 1]} for index in range(len(images))
            )

        def get_next(self) -> dict[str, Images] | None:
            return next(self._left, None)

    return Reader()


def _input_name(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)
