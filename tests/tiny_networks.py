"""UNets as small as the architecture allows, with the fixtures' random weights, and inputs for them."""

from __future__ import annotations

import torch
from make_small_model import random_state_dict
from torch import nn

from modelscope_i2v.models.layers import in_channels_last
from modelscope_i2v.models.unet import UNet, UNetConfig

STAGE_TWO = {"image_conditioned": False, "row_padding": 2}
STAGES = {"unet_i2v": {}, "unet_v2v": STAGE_TWO}

TINY = {
    "dim": 32, "y_dim": 24, "context_dim": 24, "dim_mult": (1, 1, 2, 2), "num_heads": 2, "head_dim": 16,
    "num_res_blocks": 1, "num_tokens": 2,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    module.load_state_dict(random_state_dict(module, seed))
    return module.eval()


def channels_last(network: nn.Module) -> nn.Module:
    """With its weights as they are loaded."""
    for parameter in network.parameters():
        parameter.data = in_channels_last(parameter.data)
    return network


def built(config: UNetConfig, seed: int = 0, **arguments) -> UNet:
    with torch.device("meta"):
        unet = UNet(config, **arguments)
    unet.load_state_dict(random_state_dict(unet, seed), assign=True)
    return unet.eval()


def inputs_of(unet: UNet, batch: int, frames: int, height: int, width: int) -> dict[str, torch.Tensor]:
    config = unet.config
    inputs = {
        "x": normal(batch, config.in_dim, frames, height, width, seed=1),
        "t": torch.tensor([7, 640, 999][:batch]),
        "y": normal(batch, 1 if config.image_conditioned else 9, config.y_dim, seed=2),
    }
    if config.image_conditioned:
        inputs["fps"] = torch.tensor([8, 16, 24][:batch])
    return inputs
