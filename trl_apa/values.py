"""What others hand over: whether it can be read, and how a message shows it."""

from typing import Any

import torch
from torch import Tensor


def why_unreadable(tensor: Tensor) -> str | None:
    """What a tensor is whose values cannot be read one by one, for a message; None if they can."""
    if tensor.device.type == "meta":
        return "a meta tensor, which holds no values"
    if tensor.is_nested:
        return "a nested tensor, not a dense one"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}, not a dense one"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype}), not one of plain numbers"
    return None


def shown(value: Any) -> str:
    """`repr` in one line, if there is one, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of 5000 digits has none
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:80]}... ({type(value).__name__})"


def described_error(error: BaseException) -> str:
    """`Type: text`, also of an exception that has no text, or fails to give it."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
