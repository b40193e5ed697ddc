"""The stock side: the networks and samplers inside the installed ``modelscope``, put together to run.

As they ship they cannot be imported on today's packages (see ``docs/benchmarks.md``). Here stand-ins take
the place of what is missing while they are imported, and are taken away again. Their model classes import a
module that is not there, so that the few lines between networks and samplers are written here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, ContextManager, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.benchmark import timer

from modelscope_i2v.errors import MissingPackageError
from modelscope_i2v.models.attention import select_attention

from .cases import PUBLISHED_STEPS, Case
from .measuring import Enough
from .sides import SCALE_FACTOR, Side

_ROOT = "modelscope.models.multi_modal"
_PACKAGES = {1: f"{_ROOT}.image_to_video", 2: f"{_ROOT}.video_to_video"}
_UNET_ARGUMENTS = (
    "in_dim", "dim", "y_dim", "context_dim", "out_dim", "dim_mult", "num_heads", "head_dim",
    "num_res_blocks", "attn_scales",
)  # fmt: skip


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: None = None, op: None = None) -> Tensor:
    """What the stock networks ask xformers for: q, k, v [batch x heads, N, head_dim] -> [.., N, head_dim]."""
    # One head each: three dimensions would keep torch from its faster kernels.
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module


def _substitutes(device: torch.device) -> dict[str, ModuleType]:
    """Stand-ins by module name, for those packages that are missing or do not run here."""
    substitutes = {}
    try:
        select_attention("xformers", device)
    except MissingPackageError:
        operations = _module("xformers.ops", memory_efficient_attention=plain_attention)
        substitutes = {"xformers": _module("xformers", ops=operations), "xformers.ops": operations}
    if not importlib.util.find_spec("fairscale"):  # it wraps blocks for training
        checkpoint = _module("fairscale.nn.checkpoint", checkpoint_wrapper=lambda module: module)
        network = _module("fairscale.nn", checkpoint=checkpoint)
        substitutes["fairscale"] = _module("fairscale", nn=network)
        substitutes.update({"fairscale.nn": network, "fairscale.nn.checkpoint": checkpoint})
    if not importlib.util.find_spec("rotary_embedding_torch"):  # imported, and never used
        substitutes["rotary_embedding_torch"] = _module("rotary_embedding_torch", RotaryEmbedding=object)
    return substitutes


@contextmanager
def stand_ins(device: torch.device) -> Iterator[list[str]]:
    """Stand-ins for missing packages while the stock modules are imported; yields the packages' names.

    Afterwards ``sys.modules`` is as before: neither they nor stock modules that hold them are left there.
    """
    substitutes = _substitutes(device)
    before = dict(sys.modules)
    try:
        sys.modules.update(substitutes)
        yield sorted({name.partition(".")[0] for name in substitutes})
    finally:
        for name in list(sys.modules):
            if name in substitutes or name.startswith(tuple(_PACKAGES.values())):
                if name in before:
                    sys.modules[name] = before[name]
                else:
                    del sys.modules[name]


def import_stock(stage: int, device: torch.device) -> SimpleNamespace:
    """The stock classes of a stage. ``substituted`` names the packages that stand-ins were needed for.

    Raises:
        ImportError: if the installed modelscope does not have them, or needs more packages.
    """
    package = _PACKAGES[stage]
    with stand_ins(device) as substituted:
        modules = importlib.import_module(f"{package}.modules")
        found = SimpleNamespace(substituted=substituted, autoencoder=modules.AutoencoderKL)
        if stage == 1:
            found.unet, found.clip = modules.Img2VidSDUNet, modules.FrozenOpenCLIPVisualEmbedder
            found.diffusion = importlib.import_module(f"{package}.utils.diffusion").GaussianDiffusion
            try:  # the published file's name has changed, and its importers have not
                schedules = importlib.import_module(f"{package}.utils.schedule")
            except ImportError:
                schedules = importlib.import_module(f"{package}.utils.shedule")
            found.schedule = schedules.beta_schedule
        else:
            found.unet, found.clip = modules.Vid2VidSDUNet, modules.FrozenOpenCLIPEmbedder
            sampling = importlib.import_module(f"{package}.utils.diffusion_sdedit")
            found.diffusion = sampling.GaussianDiffusion_SDEdit
            found.schedule = importlib.import_module(f"{package}.utils.schedules_sdedit").noise_schedule
    return found


class Stock(Side):
    """One stage of the stock implementation, loaded from a folder the stock way.

    Each file is read whole, CLIP with both towers. On a CPU it computes in float32; on CUDA as published:
    under autocast to float16 but for stage one's decoding and stage two's encoding, stage two's UNet in half.
    """

    def __init__(self, folder: Path, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.precision = "fp16 autocast" if device.type == "cuda" else "fp32"
        self.classes = import_stock(case.stage, device)
        self.clip_encoder = self._load_clip(folder)
        self.generator = self._load_unet(folder / case.settings.ckpt_unet)
        self.autoencoder = self._load_autoencoder(folder / case.settings.ckpt_autoencoder)
        self.diffusion = self._diffusion()

    def _load_clip(self, folder: Path) -> nn.Module:
        import open_clip

        config, arguments = self.case.settings.clip, {}
        if config.model_cfg is not None:  # the stock classes know architectures by name only
            path = folder / "benchmark-clip.json"
            path.write_text(json.dumps(config.model_cfg), encoding="utf-8")
            open_clip.add_model_config(path)
            arguments["arch"] = path.stem
        pretrained = str(folder / self.case.settings.ckpt_clip)
        clip = self.classes.clip(pretrained=pretrained, device=self.device, layer=config.layer, **arguments)
        clip.model.to(self.device)
        return clip

    def _load_unet(self, path: Path) -> nn.Module:
        config = self.case.settings.unet
        arguments = {name: getattr(config, name) for name in _UNET_ARGUMENTS}
        arguments = {name: list(it) if isinstance(it, tuple) else it for name, it in arguments.items()}
        if self.case.stage == 1:
            arguments.update(num_tokens=config.num_tokens, default_fps=config.default_fps)
        unet = self.classes.unet(**arguments).to(self.device).eval()
        unet.load_state_dict(torch.load(path, map_location="cpu")["state_dict"], strict=True)
        return unet.half() if self.case.stage == 2 and self.device.type == "cuda" else unet

    def _load_autoencoder(self, path: Path) -> nn.Module:
        config = self.case.settings.autoencoder
        ddconfig = {
            "double_z": True, "z_channels": config.z_channels, "resolution": 256, "dropout": 0.0,
            "in_channels": config.in_channels, "out_ch": config.out_ch, "ch": config.ch,
            "ch_mult": list(config.ch_mult), "num_res_blocks": config.num_res_blocks, "attn_resolutions": [],
        }  # fmt: skip
        autoencoder = self.classes.autoencoder(ddconfig, config.embed_dim, pretrained=str(path)).eval()
        return autoencoder.requires_grad_(False).to(self.device)

    def _diffusion(self) -> Any:
        if self.case.stage == 1:
            betas = self.classes.schedule("linear_sd", 1000, init_beta=0.00085, last_beta=0.0120)
            return self.classes.diffusion(betas, mean_type="v", var_type="fixed_small")
        sigmas = self.classes.schedule(n=1000, zero_terminal_snr=True, scale_min=2.0, scale_max=4.0)
        return self.classes.diffusion(sigmas, prediction_type="v")

    def autocast(self) -> ContextManager:
        return torch.autocast("cuda", torch.float16) if self.device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def generate(self, steps: int, solver_mode: str = "fast", **settings: Any) -> Tensor:
        """The whole stage, in stage two with the prompts' embeddings given: a video [1, 3, F, H, W]."""
        latents = rearrange(self._denoise(self.generator, steps, solver_mode), "1 z f h w -> f z h w")
        chunks = (latents / SCALE_FACTOR).split(self.case.settings.decoder_bs)
        with self.autocast() if self.case.stage == 2 else nullcontext():
            decoded = torch.cat([self.autoencoder.decode(chunk) for chunk in chunks])
        return rearrange(decoded, "f c h w -> 1 c f h w").float().cpu()

    @torch.no_grad()
    def marks(self, mark: Callable[[], Any] = timer) -> list[Any]:
        """The stock samplers have no callback, but call the network twice a step: from the third call on."""
        calls, found = 0, []

        def counted(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in (3, 5):
                found.append(mark())
            if calls == 5:
                raise Enough
            return self.generator(x, t, **conditioning)

        with suppress(Enough):
            self._denoise(counted, PUBLISHED_STEPS[self.case.stage], "fast")
        return found

    def _denoise(self, network: Callable, steps: int, solver_mode: str) -> Tensor:
        case, settings = self.case, self.case.settings
        y = case.y if case.stage == 2 else self.clip_encoder(case.image)[:, None]
        negative_y = case.negative_y if case.stage == 2 else torch.zeros_like(y)
        conditioning = [self.conditioning(y), self.conditioning(negative_y)]
        noise, guide_scale = case.noise.to(self.device), settings.guide_scale
        if case.stage == 1:
            with self.autocast():
                return self.diffusion.ddim_sample_loop(
                    noise, network, conditioning, guide_scale=guide_scale, ddim_timesteps=steps
                )
        last = settings.total_noise_levels - 1
        latents = self._encoded_frames()
        with self.autocast():
            noised = self.diffusion.diffuse(latents, torch.tensor([last], device=self.device), noise)
            return self.diffusion.sample(
                noised,
                network,
                conditioning,
                guide_scale=guide_scale,
                guide_rescale=settings.guide_rescale,
                solver="dpmpp_2m_sde" if solver_mode == "fast" else "heun",
                steps=steps,
                t_max=last,
                t_min=0,
                discretization="trailing",
            )

    def _encoded_frames(self) -> Tensor:
        latents = []
        for frame, noise in zip(self.case.frames.split(1), self.case.posterior_noise.split(1)):
            posterior = self.autoencoder.encode(frame.to(self.device))
            latents.append(posterior.mean + posterior.std * noise.to(self.device))
        return SCALE_FACTOR * rearrange(torch.cat(latents), "f z h w -> 1 z f h w")
