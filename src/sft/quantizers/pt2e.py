"""The parts of torchao's PT2E that SFT builds on, imported without torchao's start-up noise.

`torch.ao.quantization` is being removed from PyTorch; torchao is where PT2E lives on. Importing it
warns about accelerator libraries that a machine does not have.
"""

import logging
import warnings

_logger = logging.getLogger("torchao")
_pytree = logging.getLogger("torch.utils._pytree")
_levels = (_logger.level, _pytree.level)
_logger.setLevel(logging.ERROR)
_pytree.setLevel(logging.ERROR)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e import FakeQuantizeBase
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import (
            QuantizationAnnotation,
            QuantizationSpec,
            QuantizationSpecBase,
            Quantizer,
            SharedQuantizationSpec,
        )
finally:
    _logger.setLevel(_levels[0])
    _pytree.setLevel(_levels[1])

__all__ = [
    "FakeQuantizeBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "prepare_qat_pt2e",
]
