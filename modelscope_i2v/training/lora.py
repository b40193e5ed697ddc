"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) of a UNet's projections, by ``peft``."""

from __future__ import annotations

import json
import os
from typing import Any, Mapping, Sequence

import torch
from torch import nn

from .. import __version__
from ..errors import InvalidInputError, MissingPackageError
from ..media.files import atomic_file

#: The projections of all attentions, over pixels and over frames, by the ends of their names.
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

#: What peft puts before the names of a network's parameters.
_PREFIX = "base_model.model."


def add_lora(
    unet: nn.Module,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put adapters into a UNet, in place, and return it: W x becomes W x + alpha / rank B A x.

    Only A and B can be trained then; they are float32, whatever the UNet's type. B is zero: until it is
    trained the UNet computes what it did.

    Args:
        unet: is changed.
        rank: rows of A and columns of B.
        alpha: the adapter's strength; by default ``rank``.
        target_modules: the ends of the names of the linear layers that get one.
        generator: draws A; by default one with seed 0.

    Raises:
        InvalidInputError: for a rank below 1, or targets that are no linear layers of the network.
        MissingPackageError: if peft is not installed.
    """
    if rank < 1:
        raise InvalidInputError(f"rank: got {rank}, allowed is 1 or more")
    targets = [name for name, _ in unet.named_modules() if _ends_with(name, target_modules)]
    wrong = [name for name in targets if not isinstance(unet.get_submodule(name), nn.Linear)]
    if wrong or not targets:
        found = f"{wrong[0]} is no linear layer" if wrong else "the network has no such layer"
        raise InvalidInputError(f"target_modules: got {', '.join(target_modules)}: {found}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackageError(
            f"LoRA needs the peft package, which cannot be imported ({error}). "
            "Install it with: pip install 'modelscope_i2v[train]'"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets)
    with torch.random.fork_rng():  # A comes from our generator, and nothing from the global one
        inject_adapter_in_model(config, unet)
    generator = generator or torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.data.copy_((2 * drawn - 1) / parameter.shape[1] ** 0.5)
    return unet


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def adapter_state(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapters' tensors of a UNet by peft's names of them, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, save_embedding_layers=False)
    return {_PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}


def save_adapter(unet: nn.Module, path: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a UNet's adapters into a safetensors file, which appears when it is complete.

    Args:
        unet: as ``add_lora`` returned it.
        path: of the file.
        metadata: what it was made of, such as ``stage``, ``base_model`` and ``steps``; rank, alpha and
            targets are added. What is no string is written as JSON.

    Raises:
        OutputError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    config: Any = next(iter(unet.peft_config.values()))  # type: ignore[union-attr, operator]
    ends = sorted({_end(name) for name in config.target_modules})
    entries = {
        "format": "pt",
        "made_with": f"modelscope_i2v {__version__}",
        **(metadata or {}),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": ends,
    }
    texts = {key: each if isinstance(each, str) else json.dumps(each) for key, each in entries.items()}
    with atomic_file(path) as temporary:
        save_file(adapter_state(unet), temporary, metadata=texts)


def _end(name: str) -> str:
    """The end of a layer's name that tells which of a block's layers it is: ``to_q``, ``to_out.0``."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
