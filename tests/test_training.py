"""The training loop: losses by hand, resuming to the bit, overfitting, and where training starts."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from modelscope_i2v.errors import NumericalError
from modelscope_i2v.models.autoencoder import SCALE_FACTOR, Autoencoder, AutoencoderConfig
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.samplers.ddim import sample_ddim
from modelscope_i2v.samplers.guidance import denoiser
from modelscope_i2v.samplers.schedules import ddim_levels, stable_diffusion_schedule
from modelscope_i2v.training import losses
from modelscope_i2v.training.initialisation import start_as_resampling, start_unet
from modelscope_i2v.training.loop import Schedule, Training, train
from modelscope_i2v.training.scenes import draw


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_unet(**others):
    config = {
        "in_dim": 4, "out_dim": 4, "dim": 16, "dim_mult": (1, 2), "num_heads": 2, "head_dim": 8, "y_dim": 8,
        "context_dim": 8, "num_res_blocks": 1, "attn_scales": (0.5,), "num_groups": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return UNet(UNetConfig(**{**config, **others}))


def clip_latents():
    """[1, 4, 2, 6, 8]: a scene's colours, small, and a constant."""
    frames, _ = draw(3, 2, (8, 6))
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    return torch.cat([video, torch.zeros_like(video[:1])])[None]


def test_velocity_by_hand():
    x0, noise = torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    alpha, sigma = torch.tensor([0.8, 0.0]), torch.tensor([0.6, 1.0])
    target = losses.velocity_target(x0, noise, alpha, sigma)
    assert target.flatten().tolist() == pytest.approx([0.8 * 1 - 0.6 * 2, -1])
    assert losses.velocity_loss(target + 2, target).item() == pytest.approx(4)
    weighted = losses.velocity_loss(target + torch.tensor([[1.0], [3.0]]), target, torch.tensor([2.0, 1.0]))
    assert weighted.item() == pytest.approx((2 * 1 + 1 * 9) / 2)


def test_autoencoder_losses_by_hand():
    target = torch.zeros(1, 3, 2, 2)
    red = torch.tensor([0.3, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = 0.09 / 3 + 0.3 * (0.09 + 0.0225) / 2 + 0.05 * 0.1
    assert losses.reconstruction_loss(red, target).item() == pytest.approx(expected)
    assert losses.kl_divergence(torch.zeros(2), torch.zeros(2)).item() == 0
    kl = losses.kl_divergence(torch.tensor([1.0]), torch.tensor([math.log(4.0)])).item()
    assert kl == pytest.approx((1 + 4 - 1 - math.log(4)) / 2)
    white = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]]).view(1, 2, 2, 2)
    assert losses.second_moment_penalty(white, torch.ones(2)).item() == 0
    assert losses.second_moment_penalty(2 * white, torch.ones(2)).item() == pytest.approx(9)


def test_the_rate_rises_and_falls():
    schedule = Schedule(steps=100, rate=1.0, warmup=10, floor=0.1)
    assert schedule.at(4) == pytest.approx(0.5, rel=0.01)
    assert schedule.at(50) == pytest.approx(0.55)
    assert schedule.at(100) == schedule.at(200) == pytest.approx(0.1)
    assert Schedule(100, 1.0, warmup=0, floor=0.1, shape="linear").at(75) == pytest.approx(0.325)
    assert Schedule(100, 1.0, warmup=0, shape="constant").at(99) == 1


def unet_training(steps=6, batch=2):
    network = tiny_unet()
    start_unet(network)
    training = Training(network, Schedule(steps, 4e-3, warmup=2), seed=3, rate_factors={"out.": 0.5})
    x0, y = clip_latents().repeat(batch, 1, 1, 1, 1), torch.ones(batch, 1, 8)
    schedule = stable_diffusion_schedule()

    def loss(generator, step):
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        alpha, sigma = schedule.alphas[t].float(), schedule.sigmas[t].float()
        xt = alpha.view(-1, 1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1, 1) * noise
        v = network(xt, t, y)
        return losses.velocity_loss(v, losses.velocity_target(x0, noise, alpha, sigma)), {}

    return training, loss


def test_resumed_training_ends_with_the_same_weights_to_the_bit(tmp_path):
    whole, loss = unet_training()
    states = list(train(whole, loss))
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6]
    assert states[0].gradient > 0 and states[0].rate == pytest.approx(2e-3)

    first, loss = unet_training()
    for state in train(first, loss):
        if state.step == 3:
            break
    first.save(tmp_path / "checkpoint")
    second, loss = unet_training()
    second.load(tmp_path / "checkpoint")
    assert [state.step for state in train(second, loss)] == [4, 5, 6]
    for ours, theirs in ((second.network, whole.network), (second.average, whole.average)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert not torch.equal(whole.network.out[2].weight, whole.average.out[2].weight)


def test_a_failed_save_leaves_the_checkpoint_whole(tmp_path, monkeypatch):
    training, loss = unet_training(steps=1)
    training.save(tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint").read_bytes()
    list(train(training, loss))

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        training.save(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_words():
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    training = Training(network, Schedule(3, 1.0))
    with pytest.raises(NumericalError, match="step 0 is nan: lower the learning rate"):
        list(train(training, lambda generator, step: (network.weight.sum() * float("nan"), {})))
    assert torch.equal(network.weight, before)


def test_accumulated_losses_are_their_mean():
    whole, loss = unet_training(steps=1)
    parts, loss_of_parts = unet_training(steps=1)
    parts.accumulate = 2
    factors = iter([0.5, 1.5])  # whose mean is 1

    def factored(generator, step):
        return next(factors) * loss_of_parts(generator.manual_seed(3), step)[0], {}

    [once], [accumulated] = list(train(whole, loss)), list(train(parts, factored))
    assert accumulated.loss == pytest.approx(once.loss)
    for name, value in parts.network.state_dict().items():
        assert torch.allclose(value, whole.network.state_dict()[name], atol=1e-6), name


def test_every_parameter_gets_a_gradient():
    training, loss = unet_training()
    for _, parameter in training.network.named_parameters():  # silent branches pass nothing back at first
        nn.init.normal_(parameter, std=0.1)
    loss(training.generator, 0)[0].backward()
    for name, parameter in training.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_one_clip_is_learned_by_heart():
    training, loss = unet_training(steps=30)
    list(train(training, loss))
    x0, levels = clip_latents(), ddim_levels(stable_diffusion_schedule(), 10)

    def distance(network):
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
        y = torch.ones(1, 1, 8)
        with torch.no_grad():
            velocity = lambda x, level: network(x, torch.tensor([level.t]), y)  # noqa: E731
            sample = sample_ddim(denoiser(velocity), noise, levels)
        return (sample - x0).square().mean().item()

    untrained = tiny_unet()
    start_unet(untrained)
    assert distance(training.network) < 0.75 * distance(untrained)


def test_an_autoencoder_starts_as_pooling_and_interpolation():
    torch.manual_seed(0)
    config = AutoencoderConfig(
        ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=8, embed_dim=8, num_groups=2
    )
    autoencoder = Autoencoder(config)
    frames = torch.cat([torch.from_numpy(draw(seed, 1)[0]) for seed in range(24)])
    images = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    start_as_resampling(autoencoder, images)
    with torch.no_grad():
        latents = autoencoder.encode(images).mode() * SCALE_FACTOR
        decoded = autoencoder.decode(latents / SCALE_FACTOR)
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))  # convolutions see zeros at the edges
    pooled = nn.functional.avg_pool2d(images, 4)
    for _ in range(2):
        pooled = nn.functional.interpolate(pooled, scale_factor=2, mode="bilinear")
    assert (decoded - pooled)[inside].abs().max() < 0.03
    deviations = latents.transpose(0, 1).flatten(1).std(1).tolist()
    assert deviations == pytest.approx([1] * 3 + [0.5] * 5, rel=0.02)
