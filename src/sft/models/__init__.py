"""Networks and data by reference, and what a network is made of.

Optional packages (timm, torchvision, Pillow) are imported only by the references that need them.
"""

from sft.models.data import load_data
from sft.models.inspect import check_model, inspect
from sft.models.load import load_model

__all__ = ["check_model", "inspect", "load_data", "load_model"]
