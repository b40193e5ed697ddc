"""Low-rank adapters: training them by peft."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny_networks import STAGES, TINY, built, inputs_of, normal
from torch import nn

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.models.transformers import Attention
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.training.lora import add_lora, save_adapter

CONFIG = {**TINY, "dim": 16, "num_groups": 8}


def tiny_unet(stage: str = "unet_i2v") -> UNet:
    return built(UNetConfig(**{**CONFIG, **STAGES[stage]}))


def trained(unet: nn.Module, rank: int = 3, seed: int = 0, **arguments) -> nn.Module:
    """With adapters whose B is no longer zero."""
    add_lora(unet, rank, generator=torch.Generator().manual_seed(seed), **arguments)
    for number, parameter in enumerate(p for p in unet.parameters() if p.requires_grad):
        parameter.data = 0.3 * normal(*parameter.shape, seed=1000 * seed + number)
    return unet


@pytest.mark.parametrize("stage", STAGES)
def test_new_adapters_change_nothing_and_are_all_that_trains(stage):
    unet = tiny_unet(stage)
    inputs = inputs_of(unet, 1, 3, 10, 8)
    expected = unet(**inputs)
    attentions = [each for each in unet.modules() if isinstance(each, Attention)]
    state = torch.random.get_rng_state()
    assert add_lora(unet, 2) is unet
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(unet(**inputs), expected) and unet.dtype == torch.float32
    trainable = {name: each for name, each in unet.named_parameters() if each.requires_grad}
    assert all(".lora_" in name for name in trainable)
    assert len(trainable) == 2 * 4 * len(attentions)
    unet(**inputs).square().mean().backward()
    assert all(each.grad.any() for name, each in trainable.items() if "lora_B" in name)


def test_adapters_of_a_half_precision_unet_are_float32():
    unet = trained(tiny_unet().bfloat16())
    assert {each.dtype for each in unet.parameters() if each.requires_grad} == {torch.float32}
    output = unet(**inputs_of(unet, 1, 2, 8, 8))
    assert output.dtype == unet.dtype == torch.bfloat16
    output.float().square().mean().backward()


def test_a_draw_is_its_generators():
    first, second, third = (add_lora(tiny_unet(), 2), add_lora(tiny_unet(), 2), trained(tiny_unet(), 2, 1))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters())]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters()))


def test_a_file_has_pefts_names_and_its_origin(tmp_path):
    unet = trained(tiny_unet(), rank=3, alpha=6)
    save_adapter(unet, tmp_path / "adapter.safetensors", {"stage": "image-to-video", "steps": 7})
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
        key = "base_model.model.middle_block.1.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
        assert file.get_tensor(key).shape == (3, 32)
    assert (metadata["rank"], metadata["alpha"], metadata["steps"]) == ("3", "6", "7")
    assert metadata["stage"] == "image-to-video"
    assert json.loads(metadata["target_modules"]) == ["to_k", "to_out.0", "to_q", "to_v"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank: got 0, allowed is 1 or more"),
        ({"rank": 2, "target_modules": ["to_z"]}, "got to_z: the network has no such layer"),
        ({"rank": 2, "target_modules": ["conv"]}, "is no linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments, words):
    unet = tiny_unet()
    with pytest.raises(InvalidInputError, match=words):
        add_lora(unet, **arguments)
    assert not any("lora" in name for name, _ in unet.named_parameters())
