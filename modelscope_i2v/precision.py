"""Which floating-point type a device computes in."""

from __future__ import annotations

import torch

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def select_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type for one of ``auto``, ``fp32``, ``fp16``, ``bf16``: auto is half precision on CUDA only."""
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def precision_name(dtype: torch.dtype) -> str:
    """The setting that gives a type."""
    return next((name for name, each in _DTYPES.items() if each == dtype), str(dtype))
