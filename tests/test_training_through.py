"""The networks can be trained: gradients reach every parameter, and every layer can be wrapped."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import STAGES, TINY, inputs_of, normal, with_random_weights
from torch import nn

from modelscope_i2v.models.autoencoder import Autoencoder, AutoencoderConfig
from modelscope_i2v.models.unet import UNet, UNetConfig

NARROW = {**TINY, "dim": 16, "num_groups": 8}


class CountingWrapper(nn.Module):
    """A stand-in for an adapter such as LoRA: it has the layer inside, and none of its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)


def wrap_projections(network: nn.Module) -> dict[str, CountingWrapper]:
    wrappers = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            parent, _, attribute = name.rpartition(".")
            wrappers[name] = CountingWrapper(layer)
            setattr(network.get_submodule(parent), attribute, wrappers[name])
    return wrappers


def unet_case(stage: str, **changes):
    """A UNet, and a function of it whose result depends on every parameter."""
    unet = with_random_weights(UNet(UNetConfig(**{**NARROW, **STAGES[stage], **changes}))).requires_grad_()
    inputs = inputs_of(unet, 2, 3, 10, 8)
    return unet, lambda: unet(**inputs)


def autoencoder_case():
    config = AutoencoderConfig(ch=16, ch_mult=(1, 2), num_res_blocks=1, num_groups=8)
    autoencoder = with_random_weights(Autoencoder(config)).requires_grad_()
    x, noise = normal(2, 3, 8, 12), normal(2, 4, 4, 6, seed=1)
    return autoencoder, lambda: autoencoder.decode(autoencoder.encode(x).sample(noise))


CASES = {**{stage: lambda stage=stage: unet_case(stage) for stage in STAGES}, "autoencoder": autoencoder_case}


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * normal(*output.shape, seed=3).to(output)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name, dtype):
    network, run = CASES[name]()
    network.to(dtype)
    loss_of(run()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes_of_the_output(name):
    """In the direction of the gradient, by a central difference in float64."""
    network, run = CASES[name]()
    network.double()
    loss_of(run()).backward()
    parameters = [each for each in network.parameters() if each.ndim > 1]
    gradients = [each.grad.clone() for each in parameters]
    slope = sum(gradient.square().sum() for gradient in gradients)
    step = 1e-5 / slope.sqrt()

    def moved(sign: int) -> torch.Tensor:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter += sign * step * gradient
            loss = loss_of(run())
            for parameter, gradient in zip(parameters, gradients):
                parameter -= sign * step * gradient
        return loss

    assert (moved(1) - moved(-1)) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_projection_is_called_as_a_module(name):
    """So an adapter in a projection's place takes effect."""
    network, run = CASES[name]()
    expected = run()
    wrappers = wrap_projections(network)
    assert torch.equal(run(), expected)
    assert [key for key, wrapper in wrappers.items() if not wrapper.calls] == []
