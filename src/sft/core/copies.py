"""Independent copies of modules."""

import copy
import warnings
from typing import TypeVar

from torch import nn

from sft.core.errors import InputError

M = TypeVar("M", bound=nn.Module)


def copy_module(module: M) -> M:
    """A deep copy in eval mode; the module itself is not touched.

    Raises `InputError` if Python cannot copy it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captured graphs hold deprecated tree records
            copied = copy.deepcopy(module)
    except Exception as error:
        raise InputError(
            f"The model ({type(module).__name__}) cannot be copied: {error}. "
            "copy.deepcopy(model) must work; detach tensors that it keeps as attributes."
        ) from error
    copied.eval()
    return copied
