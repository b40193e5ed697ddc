"""A GPU that is not there: tensors say that they are on it, and are computed by the CPU.

Where a real one refuses, because an operation's tensors are on two devices, this one does. So a test sees on
any machine that everything is where it has to be; of a GPU's kernels and of its memory it sees nothing.
"""

from __future__ import annotations

import types
from contextlib import contextmanager, nullcontext
from typing import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

aten = torch.ops.aten
#: What takes tensors of two devices: copies, and indices on the CPU.
_MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


class _OnGpu(torch.Tensor):
    """A tensor of the CPU's under another device's name."""

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, data.shape, device=GPU, **layout)
        tensor.of_cpu = data
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Also what makes tensors without taking any."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _compute(function, args, kwargs):
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    on_gpu = [each for each in tensors if isinstance(each, _OnGpu)]
    # A number in a tensor may come from the CPU.
    on_cpu = [each for each in tensors if not isinstance(each, _OnGpu) and each.ndim]
    if on_gpu and on_cpu and function not in _MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
    asked = kwargs.get("device")
    target = GPU if on_gpu else None
    if asked is not None:
        target, kwargs = torch.device(asked), {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda each: each.of_cpu if isinstance(each, _OnGpu) else each, (args, kwargs))
    result = function(*args, **kwargs)
    if function._schema.is_mutable:
        return tensors[0]
    if target is None or target.type != "cuda":
        return result
    return tree_map(lambda each: _OnGpu(each) if isinstance(each, torch.Tensor) else each, result)


@contextmanager
def pretended_gpu(free: int = 2**37) -> Iterator[torch.device]:
    """A CUDA device for the block, with so many bytes free."""
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "mem_get_info": lambda device=None: (free, 2**37),
        "memory_reserved": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
        "manual_seed_all": lambda seed: None,
        "device": lambda device: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: types.SimpleNamespace(multi_processor_count=132),
    }
    torch._C._ensureCUDADeviceGuardSet()
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # for Module.to
    try:
        with pytest.MonkeyPatch.context() as patch, _Factories():
            for name, stand_in in stand_ins.items():
                patch.setattr(torch.cuda, name, stand_in)
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(replaced)
