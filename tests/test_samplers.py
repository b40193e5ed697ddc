"""The samplers: the published results, and cases whose exact results are known.

The closed forms use two kinds of data. Data at a point c: the denoiser always says c. Standard normal data:
the best denoiser of x = x0 + s n is x / (1 + s^2), and the best velocity of a variance-preserving x is 0.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torchsde
from conftest import load_fixture, load_json, relative_error
from make_small_model import random_state_dict

from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.samplers.ddim import sample_ddim
from modelscope_i2v.samplers.dpmpp import BrownianNoise, sample_dpmpp_2m_sde
from modelscope_i2v.samplers.guidance import denoiser, guided, guided_within
from modelscope_i2v.samplers.heun import sample_heun
from modelscope_i2v.samplers.schedules import (
    NoiseLevel,
    NoiseSchedule,
    ddim_levels,
    dpmpp_2m_sde_levels,
    heun_levels,
    sdedit_schedule,
    stable_diffusion_schedule,
)
from modelscope_i2v.samplers.windows import tiled, window_starts, windowed

pytestmark = pytest.mark.usefixtures("without_gradients")

SHAPE = (1, 4, 3, 5, 6)
DIVISORS = [steps for steps in range(1, 1000) if 1000 % steps == 0]


@pytest.fixture(scope="module")
def ddim() -> NoiseSchedule:
    return stable_diffusion_schedule()


@pytest.fixture(scope="module")
def sdedit() -> NoiseSchedule:
    return sdedit_schedule()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def alpha_sigma(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    level = schedule.level(t)
    return level.alpha, level.sigma


def at(s) -> list[NoiseLevel]:
    """Levels of given s, which need no schedule."""
    return [NoiseLevel(0, 1 / math.sqrt(1 + each**2), each / math.sqrt(1 + each**2), each) for each in s]


def exploding(denoise):
    """A denoiser of x = x0 + s n, a function of (x, s), as the samplers call it."""
    return lambda x, level: denoise(x * math.sqrt(1 + level.s**2), level.s)


def no_noise(s: float, s_next: float) -> float:
    return 0.0


class Recorder:
    """A callback that keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, step, level, x):
        self.calls.append((step, level, x.clone()))

    @property
    def states(self):
        return [x for _, _, x in self.calls]


def both(conditional, unconditional):
    """Two velocities as the one that guidance takes."""
    return lambda x, level: torch.stack([conditional(x, level), unconditional(x, level)])


# The published results


def velocity_of(name: str, **differences):
    """The fixtures' UNet as a function that makes velocities of its conditioning."""
    meta = load_json("meta")
    names = [field.name for field in dataclasses.fields(UNetConfig) if field.name in meta[name]]
    architecture = {key: tuple(v) if isinstance(v := meta[name][key], list) else v for key in names}
    with torch.device("meta"):
        unet = UNet(UNetConfig(**architecture, **differences))
    unet.load_state_dict(random_state_dict(unet, meta["seed"]), assign=True)

    def conditioned(y, record=None):
        def velocity(x, level):
            if record is not None:
                record.append(level.t)
            return unet(x, torch.full((x.shape[0],), level.t), torch.as_tensor(y))

        return velocity

    return conditioned


@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_is_the_published_one(ddim, steps):
    fixture, conditioned, seen = load_fixture("ddim"), velocity_of("unet_i2v"), []
    velocity = guided(both(conditioned(fixture["y"], seen), conditioned(np.zeros_like(fixture["y"]))), 3.0)
    noise = torch.from_numpy(fixture["noise"])
    result = sample_ddim(denoiser(velocity), noise, ddim_levels(ddim, steps))
    assert seen == fixture[f"timesteps_{steps}"].tolist()
    assert result.dtype == torch.float32
    assert relative_error(result, fixture[f"out_{steps}"]) < 1e-4


def test_ddim_noise_levels_are_the_published_ones(ddim):
    published = load_fixture("ddim")["alphas_cumprod"]
    np.testing.assert_allclose((ddim.alphas**2).numpy(), published, rtol=1e-12)
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(published, np.cumprod(1 - betas), rtol=1e-12)


def test_sdedit_noise_levels_are_the_published_ones(sdedit):
    assert sdedit.sigmas.dtype == torch.float32
    assert np.array_equal(sdedit.sigmas.numpy(), load_fixture("sdedit")["sigmas"])


def test_sdedit_noise_levels_follow_their_formula(sdedit):
    start, end = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))  # of log-SNR 15 and -15
    noised = np.linspace(0, 1, 1000)
    log_snr = -2 * np.log(np.tan(start + noised * (end - start)))
    at_scale = {scale: log_snr + 2 * math.log(1 / scale) for scale in (2, 4)}
    log_snr = (1 - noised) * at_scale[2] + noised * at_scale[4]
    sigmas = np.sqrt(1 / (1 + np.exp(log_snr)))
    sigmas /= sigmas[-1]
    np.testing.assert_allclose(sdedit.sigmas.numpy(), sigmas, atol=1e-6)
    assert sdedit.sigmas[-1] == 1
    assert (sdedit.sigmas.diff() > 0).all()


def test_sdedit_noising_is_the_published_one(sdedit):
    fixture = load_fixture("sdedit")
    x0, noise = torch.from_numpy(fixture["x0"]), torch.from_numpy(fixture["noise"])
    assert relative_error(sdedit.add_noise(x0, noise, 599), fixture["noised"]) < 1e-6


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "heun"])
def test_sdedit_is_the_published_one(sdedit, solver):
    fixture, seen = load_fixture("sdedit"), []
    conditioned = velocity_of("unet_v2v", image_conditioned=False, row_padding=2)
    velocity = guided(both(conditioned(fixture["y"], seen), conditioned(fixture["negative_y"])), 7.5, 0.2)
    denoise, noised = denoiser(velocity), torch.from_numpy(fixture["noised"])
    if solver == "heun":
        levels = heun_levels(sdedit, 3, 600)
        result = sample_heun(denoise, noised * levels[0].s, levels)
    else:
        levels = dpmpp_2m_sde_levels(sdedit, 4, 600)
        noise = BrownianNoise(noised, levels, [int(fixture["brownian_entropy"])])
        result = sample_dpmpp_2m_sde(denoise, noised * levels[0].s, levels, noise)
    assert seen == fixture[f"{solver}_timesteps"].tolist()
    assert result.dtype == torch.float32
    assert relative_error(result, fixture[solver]) < 1e-4


@pytest.mark.parametrize("solver, steps", [("dpmpp_2m_sde", 30), ("heun", 50)])
def test_sdedit_calls_the_network_at_the_published_timesteps(sdedit, solver, steps):
    seen, x = [], torch.ones(1, 4, 1, 1, 1)

    def velocity(x, level):
        seen.append(level.t)
        return torch.zeros_like(x)

    if solver == "heun":
        sample_heun(denoiser(velocity), x, heun_levels(sdedit, steps, 600))
    else:
        levels = dpmpp_2m_sde_levels(sdedit, steps, 600)
        sample_dpmpp_2m_sde(denoiser(velocity), x, levels, no_noise)
    assert seen == load_fixture("sdedit")[f"{solver}_timesteps_{steps}"].tolist()


# DDIM


def timesteps_of(ddim: NoiseSchedule, steps: int) -> list[int]:
    """Where the network is called."""
    levels = ddim_levels(ddim, steps)
    assert [level.number for level in levels] == list(range(len(levels))) and levels[-1].t == 0
    return [level.t for level in levels[:-1]]


@pytest.mark.parametrize("steps", DIVISORS)
def test_ddim_timesteps_are_the_published_where_steps_divide(ddim, steps):
    assert timesteps_of(ddim, steps) == list(range(1, 1000, 1000 // steps))[::-1]


def test_ddim_takes_every_timestep_but_the_first_at_most(ddim):
    assert timesteps_of(ddim, 1000) == list(range(999, 0, -1))


def test_ddim_timesteps_descend_evenly_within_the_schedule(ddim):
    for steps in range(1, 1001):
        timesteps = timesteps_of(ddim, steps)
        strides = {before - after for before, after in zip(timesteps, timesteps[1:])}
        assert timesteps[-1] == 1
        assert timesteps[0] <= 999
        assert strides <= {1000 // steps, 1000 // steps + 1}, steps
        assert all(type(t) is int for t in timesteps)


def test_ddim_has_exactly_as_many_timesteps_as_steps(ddim):
    assert [steps for steps in range(1, 1000) if len(timesteps_of(ddim, steps)) != steps] == []


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_keeps_the_noise_of_data_at_a_point(ddim, steps):
    """x_t = alpha_t c + sigma_t n, the same n for all t."""
    c, noise, levels = normal(*SHAPE), normal(*SHAPE, seed=1), ddim_levels(ddim, steps)
    recorder = Recorder()
    result = sample_ddim(lambda x, level: c, levels[0].alpha * c + levels[0].sigma * noise, levels, recorder)
    for (step, t, x), level, following in zip(recorder.calls, levels, levels[1:]):
        assert t == level.t
        assert relative_error(x, following.alpha * c + following.sigma * noise) < 1e-9, step
    assert torch.equal(recorder.states[-1], result)
    assert len(recorder.calls) == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_scales_normal_data_by_the_cosines_of_its_steps(ddim, steps):
    """With alpha = cos and sigma = sin of an angle, a step scales x by the cosine of its angle."""
    x, levels = normal(*SHAPE), ddim_levels(ddim, steps)
    angles = [math.atan2(level.sigma, level.alpha) for level in levels]
    expected = math.prod(math.cos(a - b) for a, b in zip(angles, angles[1:])) * x
    result = sample_ddim(denoiser(lambda x, level: torch.zeros_like(x)), x, levels)
    assert relative_error(result, expected) < 1e-9


def test_ddim_level_is_variance_preserving(ddim):
    for t in (0, 1, 500, 999):
        alpha, sigma = alpha_sigma(ddim, t)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
        assert ddim.level(t).s == pytest.approx(sigma / alpha) == pytest.approx(ddim.log_s[t].exp().item())


# SDEdit's noise levels


def test_timestep_is_the_inverse_of_levels(sdedit):
    timesteps = torch.arange(999, dtype=torch.float32)
    levels = sdedit.s_at(timesteps)
    assert [sdedit.nearest(s) for s in levels.tolist()] == list(range(999))
    s = (sdedit.sigmas.double() / (1 - sdedit.sigmas.double() ** 2).sqrt())[:999]
    np.testing.assert_allclose(levels.numpy(), s.numpy(), rtol=1e-4)


@pytest.mark.parametrize("t", [0, 3, 250, 598, 900])
def test_timestep_is_the_nearest_in_log_s(sdedit, t):
    low, high = sdedit.s_at(torch.tensor([float(t), float(t + 1)])).double().log().tolist()
    for weight in (0.1, 0.4, 0.6, 0.9):
        s = math.exp((1 - weight) * low + weight * high)
        assert sdedit.nearest(s) == (t if weight < 0.5 else t + 1)
        assert sdedit.s_at(torch.tensor([t + weight])).item() == pytest.approx(s, rel=1e-4)


def test_timestep_of_a_level_below_all_is_the_first(sdedit):
    assert sdedit.nearest(1e-9) == 0


@pytest.mark.parametrize("steps, noise_levels", [(1, 600), (4, 600), (30, 600), (50, 600), (7, 999), (5, 40)])
def test_levels_trail_from_the_start_to_zero(sdedit, steps, noise_levels):
    timesteps = [noise_levels - 1 - i * noise_levels / steps for i in range(steps)]
    levels = heun_levels(sdedit, steps, noise_levels)
    s = [level.s for level in levels]
    assert len(levels) == steps + 1
    assert s[-1] == 0
    assert s == sorted(set(s), reverse=True)
    assert [level.number for level in levels] == list(range(steps + 1))
    np.testing.assert_allclose(s[:-1], sdedit.s_at(torch.tensor(timesteps).clamp(min=0)).numpy(), rtol=1e-3)
    assert levels[0].t == noise_levels - 1
    assert all(level.t == sdedit.nearest(level.s) for level in levels[:-1])
    dpmpp = dpmpp_2m_sde_levels(sdedit, steps, noise_levels)
    assert dpmpp[:-1] == heun_levels(sdedit, steps + 1, noise_levels)[:steps]
    assert dpmpp[-1] == levels[-1]


def test_noising_keeps_the_variance(sdedit):
    x0, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    for t in (0, 300, 599, 999):
        sigma = sdedit.sigmas[t].item()
        expected = math.sqrt(1 - sigma**2) * x0 + sigma * noise
        assert relative_error(sdedit.add_noise(x0, noise, t), expected) < 1e-5


# Heun


def normal_data(x, s):
    return x / (1 + s**2)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_heun_is_exact_for_data_at_a_point(steps):
    """x = c + s n, the same n for all s."""
    c, noise, levels = normal(*SHAPE), normal(*SHAPE, seed=1), at(np.linspace(8, 0, steps + 1))
    recorder = Recorder()
    result = sample_heun(lambda x, s: c, c + 8 * noise, levels, recorder)
    for (step, s, x), level, following in zip(recorder.calls, levels, levels[1:]):
        assert s == level.s
        assert relative_error(x, c + following.s * noise) < 1e-9, step
    assert relative_error(result, c) < 1e-9
    assert [step for step, _, _ in recorder.calls] == list(range(steps))


def test_heun_of_one_step_is_the_denoisers_answer():
    x = normal(*SHAPE)
    assert relative_error(sample_heun(exploding(normal_data), x, at([3.0, 0.0])), x / 10) < 1e-12


def test_heun_of_two_steps():
    x, (s, s_next) = normal(*SHAPE), (3.0, 1.0)
    slope = x * s / (1 + s**2)  # of normal data
    euler = x + (s_next - s) * slope
    heun = x + (s_next - s) * (slope + euler * s_next / (1 + s_next**2)) / 2
    result = sample_heun(exploding(normal_data), x, at([s, s_next, 0.0]))
    assert relative_error(result, heun / (1 + s_next**2)) < 1e-12


def convergence(sample, exact, steps=(40, 80, 160)) -> list[float]:
    """How much smaller the error gets as the steps double."""
    errors = [abs(sample(count) / exact - 1) for count in steps]
    return [coarse / fine for coarse, fine in zip(errors, errors[1:])]


def test_heun_converges_at_second_order_for_normal_data():
    """dx/ds = x s / (1 + s^2), so x(0) = x(4) / sqrt(17): halving the steps quarters the error."""

    def sample(steps):
        x = torch.ones(1, dtype=torch.float64)
        return sample_heun(exploding(normal_data), x, at(np.linspace(4, 0, steps + 1))).item()

    assert all(3.6 < ratio < 4.4 for ratio in convergence(sample, 1 / math.sqrt(17)))


# DPM-Solver++(2M) SDE


def test_dpmpp_of_one_step_is_the_denoisers_answer():
    x = normal(*SHAPE)

    def noise(s, s_next):
        raise AssertionError("the last step has no noise")

    result = sample_dpmpp_2m_sde(exploding(normal_data), x, at([3.0, 0.0]), noise)
    assert relative_error(result, x / 10) < 1e-12


def test_dpmpp_mean_and_noise_for_data_at_a_point():
    """A step takes c + s n to c + s' (r n + sqrt(1 - r^2) n'), r = s'/s: old noise fades, new noise comes."""
    c, x = normal(*SHAPE), normal(*SHAPE, seed=1)
    levels = at([9.0, 4.0, 1.0, 0.5, 0.0])
    draws, asked, recorder = [normal(*SHAPE, seed=seed) for seed in (2, 3, 4)], [], Recorder()

    def noise(s, s_next):
        asked.append((s, s_next))
        return draws[len(asked) - 1]

    result = sample_dpmpp_2m_sde(lambda x, s: c, c + 9 * x, levels, noise, recorder)
    total = x
    for step, (s, s_next) in enumerate([(9.0, 4.0), (4.0, 1.0), (1.0, 0.5)]):
        ratio = s_next / s
        total = ratio * total + math.sqrt(1 - ratio**2) * draws[step]
        assert relative_error(recorder.states[step], c + s_next * total) < 1e-9
    assert asked == [(9.0, 4.0), (4.0, 1.0), (1.0, 0.5)]
    assert torch.equal(result, c)
    assert [call[:2] for call in recorder.calls] == [(0, 9.0), (1, 4.0), (2, 1.0), (3, 0.5)]
    assert torch.equal(recorder.states[-1], result)


def test_dpmpp_extrapolates_to_the_midpoint_of_each_step():
    """For x0 that is linear in log s the second-order formula is the first-order one at the midpoint."""
    a, b = normal(*SHAPE), normal(*SHAPE, seed=1)
    levels, recorder, x = [9.0, 5.0, 1.5, 0.2, 0.0], Recorder(), normal(*SHAPE, seed=2)

    def denoise(x, s):
        return a + b * math.log(s)

    sample_dpmpp_2m_sde(exploding(denoise), x, at(levels), no_noise, recorder)
    for step, (s, s_next) in enumerate(zip(levels[:3], levels[1:4])):
        middle = s if step == 0 else math.sqrt(s * s_next)  # the first step has nothing to extrapolate from
        decay = (s_next / s) ** 2
        x = decay * x + (1 - decay) * denoise(x, middle)
        assert relative_error(recorder.states[step], x) < 1e-9


def noiseless_dpmpp(denoise, x: float, levels: torch.Tensor) -> float:
    """The mean at the last of the levels."""
    recorder = Recorder()
    start = torch.full((1,), x, dtype=torch.float64)
    sample_dpmpp_2m_sde(exploding(denoise), start, at([*levels.tolist(), 0.0]), no_noise, recorder)
    return recorder.states[len(levels) - 2].item()


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_dpmpp_mean_is_exact_for_normal_data(steps):
    """Without noise dx/ds = 2 (x - x0) / s, here with the solution 1 + s^2, along which x0 stays 1."""
    levels = torch.logspace(math.log10(4), -1, steps + 1, dtype=torch.float64)
    assert noiseless_dpmpp(normal_data, 17.0, levels) == pytest.approx(1.01, rel=1e-9)


def test_dpmpp_mean_converges_at_second_order():
    """With x0 = x s / (1 + s) the solution is (s / (1 + s))^2: halving the steps quarters the error."""

    def sample(steps):
        levels = torch.logspace(math.log10(4), -1, steps + 1, dtype=torch.float64)
        return noiseless_dpmpp(lambda x, s: x * s / (1 + s), 0.64, levels)

    assert all(3.6 < ratio < 4.4 for ratio in convergence(sample, (0.1 / 1.1) ** 2))


def test_dpmpp_samples_have_the_datas_distribution():
    """Normal data at s has variance 1 + s^2; data at a point s^2, with any number of steps."""
    x = normal(1, 4, 10, 100, 50) * math.sqrt(1 + 20**2)
    draws = torch.Generator().manual_seed(9)

    def noise(s, s_next):
        return torch.randn(x.shape, generator=draws, dtype=x.dtype)

    recorder, levels = Recorder(), torch.logspace(math.log10(20), -1.5, 40, dtype=torch.float64)
    sample_dpmpp_2m_sde(exploding(normal_data), x, at([*levels.tolist(), 0.0]), noise, recorder)
    for s, state in zip(levels[1:].tolist(), recorder.states):
        assert state.var().item() == pytest.approx(1 + s**2, rel=0.03)


@pytest.mark.parametrize("noise_levels", [1, 2, 10, 29])
def test_dpmpp_of_more_steps_than_noise_levels_gives_numbers(sdedit, noise_levels):
    """Both settings are allowed: the timesteps that would lie below 0 must not become steps of no length."""
    x = normal(*SHAPE, dtype=torch.float32)
    levels = dpmpp_2m_sde_levels(sdedit, 30, noise_levels)
    result = sample_dpmpp_2m_sde(exploding(normal_data), x, levels, BrownianNoise(x, levels, [1]))
    assert result.isfinite().all()


# Brownian noise

LEVELS = at([40.0, 9.0, 2.5, 0.7, 0.05, 0.0])


def test_brownian_noise_is_normal_and_independent_from_step_to_step():
    x = torch.zeros(1, 4, 10, 40, 25)
    noise = BrownianNoise(x, LEVELS, [7])
    positive = [level.s for level in LEVELS[:-1]]
    steps = [noise(s, s_next) for s, s_next in zip(positive, positive[1:])]
    for draw in steps:
        assert draw.shape == x.shape
        assert draw.dtype == torch.float32
        assert draw.mean().item() == pytest.approx(0, abs=0.02)
        assert draw.std().item() == pytest.approx(1, abs=0.02)
        assert (draw.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    correlations = torch.corrcoef(torch.stack(steps).flatten(1)) - torch.eye(len(steps))
    assert correlations.abs().max() < 0.02


def test_brownian_noise_is_the_same_path_whatever_the_steps():
    x = torch.zeros(*SHAPE)
    coarse, fine = BrownianNoise(x, LEVELS, [7]), BrownianNoise(x, LEVELS, [7])
    inner = [9.0, 5.0, 2.5, 1.0, 0.7]
    parts = [fine(s, s_next) * math.sqrt(s - s_next) for s, s_next in zip(inner, inner[1:])]
    whole = coarse(9.0, 0.7) * math.sqrt(9.0 - 0.7)
    assert relative_error(torch.stack(parts).sum(0), whole) < 1e-4


def test_brownian_noise_is_the_trees_increment_towards_less_noise():
    tree = torchsde.BrownianTree(0.05, torch.zeros(*SHAPE), 40.0, entropy=7)
    expected = -tree(2.5, 9.0) / math.sqrt(9.0 - 2.5)  # the tree's W(9) - W(2.5)
    assert relative_error(BrownianNoise(torch.zeros(*SHAPE), LEVELS, [7])(9.0, 2.5), expected) < 1e-4


def test_brownian_noise_is_its_entropys():
    x = torch.zeros(*SHAPE)
    one, again, other = (BrownianNoise(x, LEVELS, [entropy]) for entropy in (7, 7, 8))
    assert torch.equal(one(40.0, 9.0), again(40.0, 9.0))
    again(0.7, 0.05)  # what was asked before does not matter
    assert torch.equal(one(9.0, 2.5), again(9.0, 2.5))
    assert relative_error(one(9.0, 2.5), other(9.0, 2.5)) > 0.5


def test_brownian_noise_of_two_samples_is_that_of_each():
    both = BrownianNoise(torch.zeros(2, *SHAPE[1:]), LEVELS, [7, 8])(9.0, 2.5)
    singles = [BrownianNoise(torch.zeros(*SHAPE), LEVELS, [entropy])(9.0, 2.5) for entropy in (7, 8)]
    assert torch.equal(both, torch.cat(singles))


@pytest.mark.parametrize("steps, noise_levels", [(1, 600), (2, 600), (30, 600), (100, 600), (30, 999)])
def test_brownian_noise_covers_the_levels_without_a_warning(sdedit, steps, noise_levels):
    levels, x = dpmpp_2m_sde_levels(sdedit, steps, noise_levels), torch.zeros(1, 4, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = BrownianNoise(x, levels, [3])
        result = sample_dpmpp_2m_sde(lambda x, s: torch.zeros_like(x), x, levels, noise)
    assert torch.equal(result, x)


# Random state


def test_samplers_leave_the_global_random_state_alone(ddim, sdedit):
    x, levels = torch.ones(*SHAPE), dpmpp_2m_sde_levels(sdedit, 4, 600)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def velocity(x, level, start=0):
        return 0.1 * x

    first = sample_dpmpp_2m_sde(denoiser(velocity), x, levels, BrownianNoise(x, levels, [1]))
    sample_heun(denoiser(velocity), x, levels)
    branches = windowed(lambda x, level, start: both(velocity, velocity)(x, level), 2, 1)
    sample_ddim(denoiser(guided(branches, 3.0, 0.5)), x, ddim_levels(ddim, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1]))
    assert random.getstate() == before[2]
    torch.manual_seed(99)
    np.random.seed(99)
    second = sample_dpmpp_2m_sde(denoiser(velocity), x, levels, BrownianNoise(x, levels, [1]))
    assert torch.equal(first, second)


def test_samplers_do_not_change_the_state_they_are_given(ddim, sdedit):
    x = normal(*SHAPE)
    given, levels = x.clone(), heun_levels(sdedit, 3, 600)
    sample_ddim(lambda x, level: x, x, ddim_levels(ddim, 3))
    sample_heun(exploding(normal_data), x, levels)
    sample_dpmpp_2m_sde(exploding(normal_data), x, levels, no_noise)
    assert torch.equal(x, given)


# Guidance


def constant(value: torch.Tensor, calls: list | None = None):
    def velocity(x, t):
        if calls is not None:
            calls.append(t)
        return value

    return velocity


def test_denoiser_inverts_the_velocity():
    x0, noise, level = normal(*SHAPE), normal(*SHAPE, seed=1), NoiseLevel(5, 0.8, 0.6, 0.75)
    v = 0.8 * noise - 0.6 * x0
    assert relative_error(denoiser(constant(v))(0.8 * x0 + 0.6 * noise, level), x0) < 1e-12


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional(scale):
    v_c, v_u = normal(2, *SHAPE[1:]), normal(2, *SHAPE[1:], seed=1)
    v = guided(both(constant(v_c), constant(v_u)), scale)(torch.zeros_like(v_c), 5)
    assert relative_error(v, scale * v_c + (1 - scale) * v_u) < 1e-12


def test_guidance_asks_both_branches_at_the_same_state_and_timestep():
    seen, x = [], normal(*SHAPE)

    def branch(state, t):
        seen.append((state, t))
        return state

    guided(both(branch, branch), 2.0)(x, 17)
    assert len(seen) == 2
    assert all(state is x and t == 17 for state, t in seen)


def test_guidance_within_an_interval_computes_both_branches_there_only():
    asked = []
    guided_one = constant(normal(*SHAPE), asked)
    conditional = constant(normal(*SHAPE, seed=1))
    velocity = guided_within((200, 800), guided_one, conditional)
    x = torch.zeros(SHAPE)
    for t in (999, 801, 800, 500, 200, 199, 1):
        expected = guided_one if 200 <= t <= 800 else conditional
        level = NoiseLevel(t, 0.6, 0.8, 4 / 3)
        assert torch.equal(velocity(x, level), expected(x, level))
    assert len(asked) == 2 * 3


@pytest.mark.parametrize("rescale", [0.2, 0.7, 1.0])
def test_guidance_rescales_each_samples_deviation(rescale):
    v_c, v_u = normal(2, *SHAPE[1:]), normal(2, *SHAPE[1:], seed=1)
    v_c[1] *= 5
    v = guided(both(constant(v_c), constant(v_u)), 7.5, rescale)(torch.zeros_like(v_c), 5)
    for index in range(2):
        plain = 7.5 * v_c[index] - 6.5 * v_u[index]
        # numpy's ddof=1 is the unbiased deviation
        ratio = np.std(v_c[index].numpy(), ddof=1) / np.std(plain.numpy(), ddof=1)
        assert relative_error(v[index], plain * (rescale * ratio + 1 - rescale)) < 1e-12
    if rescale == 1.0:
        assert torch.allclose(v.flatten(1).std(1), v_c.flatten(1).std(1))


def test_guidance_of_nothing_is_nothing():
    zero = torch.zeros(*SHAPE)
    assert torch.equal(guided(both(constant(zero), constant(zero)), 7.5, 0.2)(zero, 5), zero)


# Windows

WINDOWS = [(33, 32, 8), (40, 32, 8), (64, 32, 8), (100, 24, 8), (7, 3, 2), (9, 4, 0), (5, 2, 1), (57, 32, 31)]


@pytest.mark.parametrize("frames, size, overlap", [*WINDOWS, (3, 4, 1), (4, 4, 1), (1, 1, 0), (5, 1, 0)])
def test_windows_cover_all_frames_with_the_overlap_asked_for(frames, size, overlap):
    starts = window_starts(frames, size, overlap)
    assert starts[0] == 0
    assert starts[-1] + size >= frames
    assert starts == sorted(set(starts))
    if frames > size:
        assert starts[-1] + size == frames
        assert all(after - before <= size - overlap for before, after in zip(starts, starts[1:]))
        assert len(starts) == 1 + math.ceil((frames - size) / (size - overlap))  # and no more than needed
    else:
        assert starts == [0]


@pytest.mark.parametrize("frames, size, overlap", WINDOWS)
def test_windows_of_a_framewise_velocity_are_invisible(frames, size, overlap):
    x, sizes = normal(2, 4, frames, 2, 3), []

    def velocity(x, level, start):
        sizes.append((x.shape[2], level, start))
        return torch.tanh(x) * level

    assert relative_error(windowed(velocity, size, overlap)(x, 7), torch.tanh(x) * 7) < 1e-12
    assert sizes == [(size, 7, start) for start in window_starts(frames, size, overlap)]


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_a_video_within_one_window_is_one_call(frames):
    x, seen = normal(1, 4, frames, 2, 3), []

    def velocity(x, level, start):
        seen.append(x)
        return 2 * x

    assert torch.equal(windowed(velocity, 8, 2)(x, 3), 2 * x)
    assert len(seen) == 1
    assert seen[0] is x


@pytest.mark.parametrize(
    "frames, size, overlap, shares",
    [
        (12, 8, 4, [0, 0, 0, 0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1, 1]),
        # Where windows share more than was asked for, the ramps stay as long: weights 1 2 3 3 3 3 2 1.
        (9, 8, 2, [0, 1 / 3, 2 / 5, 1 / 2, 1 / 2, 1 / 2, 3 / 5, 2 / 3, 1]),
    ],
)
def test_windows_are_blended_by_ramps_as_long_as_the_overlap(frames, size, overlap, shares):
    calls = []

    def velocity(x, level, start):
        calls.append(x)
        return torch.full_like(x, float(len(calls) - 1))  # the window's number, so the second one's share

    v = windowed(velocity, size, overlap)(normal(1, 4, frames, 2, 3), 5)[0, 0, :, 0, 0].tolist()
    assert v == pytest.approx(shares)


@pytest.mark.parametrize("frames, size, overlap", WINDOWS)
def test_blended_windows_lie_between_what_they_blend(frames, size, overlap):
    """The weights are positive and sum to one: every frame is a mean of the windows that hold it."""
    starts, calls = window_starts(frames, size, overlap), []

    def velocity(x, level, start):
        calls.append(x)
        return torch.full_like(x, 10.0 ** len(calls))

    blended = windowed(velocity, size, overlap)(torch.zeros(1, 1, frames, 1, 1, dtype=torch.float64), 5)
    for frame, value in enumerate(blended.flatten().tolist()):
        holding = [10.0 ** (i + 1) for i, start in enumerate(starts) if start <= frame < start + size]
        assert min(holding) * (1 - 1e-9) <= value <= max(holding) * (1 + 1e-9)
        if len(holding) > 1:
            assert min(holding) < value < max(holding)


# Tiles


@pytest.mark.parametrize("height, width", [(4, 4), (9, 4), (4, 13), (10, 17)])
def test_tiles_of_a_pointwise_velocity_are_invisible(height, width):
    places = []

    def velocity(x, level, origin):
        places.append((origin, tuple(x.shape[3:])))
        return torch.tanh(x) * level

    x = normal(1, 4, 3, height, width)
    v = tiled(velocity, (4, 6), (1, 2))(x, 7, 5)
    assert relative_error(v, torch.tanh(x) * 7) < 1e-12
    rows, columns = window_starts(height, 4, 1), window_starts(width, 6, 2)
    tile = (4, min(width, 6))
    origins = [(5, row, column) for row in rows for column in columns]
    assert places == [(origin, tile) for origin in origins]


def test_tiles_are_weighted_by_both_axes_ramps():
    """Four constant tiles of 3 with one row and column in common: halves there, and a mean of all four."""
    calls = []

    def velocity(x, level, origin):
        calls.append(origin)
        return torch.full_like(x, float(len(calls)))

    v = tiled(velocity, (3, 3), (1, 1))(torch.zeros(1, 1, 1, 5, 5, dtype=torch.float64), 0, 0)[0, 0, 0]
    assert v[0].tolist() == [1, 1, 1.5, 2, 2] and v[:, 0].tolist() == [1, 1, 2, 3, 3]
    assert v[2, 2].item() == pytest.approx(2.5)


@pytest.mark.parametrize("overlap", [2, 4, 8])
def test_tiles_that_disagree_leave_no_step(overlap):
    """Each tile has a level of its own, from 0 to 1: the largest step is that of a ramp over the overlap."""
    draws = torch.Generator().manual_seed(0)

    def velocity(x, level, origin):
        return torch.full_like(x, torch.rand((), generator=draws).item())

    v = tiled(velocity, (16, 16), (overlap, overlap))(torch.zeros(1, 1, 1, 50, 70), 0, 0)[0, 0, 0]
    step = max(v.diff(dim=0).abs().max(), v.diff(dim=1).abs().max()).item()
    assert step < 2 / (overlap + 1)


def test_tiles_within_windows():
    x = normal(1, 4, 9, 8, 8)
    v = windowed(tiled(lambda x, level, origin: 2 * x, (4, 4), (1, 1)), 4, 1)(x, 3)
    assert relative_error(v, 2 * x) < 1e-12


# Going on from a saved state


@pytest.mark.parametrize("after", [0, 1, 3, 4])
@pytest.mark.parametrize("solver", ["fast", "normal"])
def test_a_saved_state_leads_to_the_same_numbers(solver, after):
    x, states = normal(1, 4, 3, 5, 5, dtype=torch.float32), []
    levels = at([9.0, 4.0, 1.5, 0.3, 0.0])

    def denoise(x, s):
        return torch.tanh(x) / (1 + s)

    def sample(start, save=None):
        if solver == "normal":
            return sample_heun(exploding(denoise), start, levels, None, save)
        noise = BrownianNoise(x, levels, [5])
        return sample_dpmpp_2m_sde(exploding(denoise), start, levels, noise, None, save)

    result = sample(x, states.append)
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert torch.equal(sample(x if not after else states[after - 1]), result)
