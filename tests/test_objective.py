"""What the UNet learns: the loss, the noise and the conditions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from modelscope_i2v.models.autoencoder import SCALE_FACTOR
from modelscope_i2v.samplers.schedules import sdedit_schedule, stable_diffusion_schedule
from modelscope_i2v.training.objective import Batch, Objective


class Recorder:
    """A network that remembers what it was given, and predicts a constant."""

    def __init__(self, value=0.0):
        self.value, self.calls = value, []

    def __call__(self, x, t, y, **more):
        self.calls.append((x, t, y, more))
        return torch.full_like(x, self.value)


def objective(**changes):
    schedule = changes.pop("schedule", stable_diffusion_schedule())
    defaults = {
        "levels": 1000,
        "offset": 0.0,
        "drop": 0.0,
        "unconditional": torch.zeros(1, 3),
        "takes_fps": True,
    }
    return Objective(schedule=schedule, **{**defaults, **changes})


def batch_of(count=1, value=2.0, logvar=-60.0, shape=(4, 2, 3, 5)):
    mean = torch.full((count, *shape), value / SCALE_FACTOR)
    return Batch(mean, torch.full_like(mean, logvar), torch.ones(count, 1, 3), torch.full((count,), 8))


def test_the_loss_is_that_of_the_velocity_by_hand():
    """x0 is 2 everywhere and n is known from x: v = alpha n - sigma x0."""
    predict, batch = Recorder(0.5), batch_of()
    loss = objective().loss(predict, batch, torch.Generator().manual_seed(1))
    [(x, t, y, more)] = predict.calls
    table = stable_diffusion_schedule()
    alpha, sigma = table.alphas[t.item()].item(), table.sigmas[t.item()].item()
    noise = (x.double() - alpha * 2) / sigma
    assert noise.mean().abs() < 0.5 and noise.std() == pytest.approx(1, abs=0.2)
    expected = (0.5 - (alpha * noise - sigma * 2)).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(y, batch.y) and more["fps"].tolist() == [8]


def test_noise_has_the_offset_that_sampling_adds():
    predict = Recorder()
    network = objective(offset=3.0, levels=1000)
    network.loss(predict, batch_of(16, value=0.0, shape=(4, 2, 8, 8)), torch.Generator().manual_seed(1))
    [(x, t, _, _)] = predict.calls
    noise = x / stable_diffusion_schedule().sigmas[t].float().view(-1, 1, 1, 1, 1)
    assert noise.mean((3, 4)).std().item() == pytest.approx(3, rel=0.25)  # of each frame's channel
    assert (noise - noise.mean((3, 4), keepdim=True)).std().item() == pytest.approx(1, rel=0.05)


def test_the_condition_is_dropped_with_its_probability_to_the_unconditional_one():
    predict, unconditional = Recorder(), torch.tensor([[7.0, 8.0, 9.0]])
    network = objective(drop=0.25, unconditional=unconditional)
    network.loss(predict, batch_of(2000, shape=(1, 1, 1, 1)), torch.Generator().manual_seed(0))
    y = predict.calls[0][2]
    dropped = (y == unconditional).all(2).squeeze(1)
    assert (y[~dropped] == 1).all() and dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_timesteps_are_those_that_sampling_begins_below():
    predict = Recorder()
    network = objective(schedule=sdedit_schedule(), levels=600, takes_fps=False)
    network.loss(predict, batch_of(4000, shape=(1, 1, 1, 1)), torch.Generator().manual_seed(0))
    _, t, _, more = predict.calls[0]
    assert t.min() < 10 and 590 < t.max() < 600 and more == {}


def test_the_start_is_learned_from_noise_alone():
    predict = Recorder()
    network = objective(start=0.5)
    network.loss(predict, batch_of(400, value=1e4, shape=(1, 1, 1, 1)), torch.Generator().manual_seed(0))
    x, t, _, _ = predict.calls[0]
    blind = x.flatten().abs() < 10  # the others see the clip's 10,000
    assert (t[blind] == 999).all() and blind.float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_latents_are_drawn_from_the_posterior():
    predict = Recorder()
    batch = batch_of(1, value=0.0, logvar=2 * math.log(2 / SCALE_FACTOR), shape=(4, 8, 16, 16))
    objective(levels=1).loss(predict, batch, torch.Generator().manual_seed(0))  # t = 0: hardly any noise
    assert predict.calls[0][0].std().item() == pytest.approx(2, rel=0.05)
