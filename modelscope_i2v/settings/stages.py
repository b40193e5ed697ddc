"""The settings of both stages, each declared once.

What ``configuration.json`` and calls may give, requests, records, command-line flags and the README's tables
are made from these declarations. Every setting has its reference value as default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar

from ..errors import ConfigurationError
from ..models.config import AutoencoderConfig, ClipConfig, UNetConfig
from .rules import Rule, boolean, choice, did_you_mean, integer, interval, number, optional, size, text

IMAGE_TO_VIDEO = "image-to-video"
VIDEO_TO_VIDEO = "video-to-video"

PRECISION_CHOICES = ("auto", "fp32", "fp16", "bf16")

DEFAULT_POSITIVE_PROMPT = (
    ", cinematic, High Contrast, highly detailed, unreal engine, taken using a Canon EOS R camera, "
    "hyper detailed photo - realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous "
    "detailing, skin pore detailing, hyper sharpness, perfect without deformations, "
    "Unreal Engine 5, 4k render"
)
DEFAULT_NEGATIVE_PROMPT = (
    "worst quality, normal quality, low quality, low res, blurry, text, watermark, logo, banner, "
    "extra digits, cropped, jpeg artifacts, signature, username, error, sketch ,duplicate, ugly, "
    "monochrome, horror, geometry, mutation, disgusting"
)


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting.

    Attributes:
        rule: what it may be.
        help: its meaning, for the command line and the README.
        name: in ``configuration.json`` and on the settings' object.
        in_call: whether a call may give it.
        keyword: under which a call gives it and a record names it, if that is not its name.
        request_field: of the request that computes with it, if that is not the keyword; None for what is
            not computed with and travels beside the request.
        both: whether a call for both stages gives it to both, and not to the first that has it.
        quiet: whether a request's keywords, and so a record, leave it out where it is the reference value.
        loading: whether it concerns how a stage is loaded.
        stage: the only stage that has it, for what only calls have.
        flag: on the command line, without dashes, if that is not the keyword.
        alias: another keyword for it, which callers know from elsewhere.
    """

    rule: Rule
    help: str
    name: str = ""
    in_call: bool = False
    keyword: str = ""
    request_field: str | None = ""
    both: bool = False
    quiet: bool = False
    loading: bool = False
    stage: str = ""
    flag: str = ""
    alias: str = ""

    def named(self, name: str) -> Setting:
        """Return the declaration with all its names filled in."""
        keyword = (self.keyword or name) if self.in_call else ""
        request_field = self.request_field if self.request_field is None else self.request_field or keyword
        flag = self.flag or (keyword or name).replace("_", "-")
        return dataclasses.replace(self, name=name, keyword=keyword, request_field=request_field, flag=flag)


def _setting(default: Any, rule: Rule, help: str, **declared: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(rule, help, **declared)})


_in_call = partial(_setting, in_call=True)


@dataclass
class StageSettings:
    """The settings that both stages have. Assigning one checks it; one object belongs to one model."""

    stage: ClassVar[str]

    ckpt_unet: str = _setting("", text(non_empty=True), "the UNet's file")
    ckpt_clip: str = _setting("open_clip_pytorch_model.bin", text(non_empty=True), "CLIP's file")
    ckpt_autoencoder: str = _setting(
        "v2-1_512-ema-pruned.ckpt", text(non_empty=True), "the file with the autoencoder"
    )
    seed: int | None = _in_call(
        None, optional(integer(0, 2**63 - 1)), "seed of all random draws: the same one gives the same video",
        both=True,
    )  # fmt: skip
    steps: int | None = _in_call(
        None, optional(integer(1, 1000)), "denoising steps; by default the solver's own number"
    )
    batch_size: int = _setting(
        1, integer(1, 1024), "accepted, as the published files have it; without effect"
    )
    target_fps: int | str = _in_call(
        8, integer(1, 240), "frames per second, of the file and as stage one's condition",
        keyword="fps", both=True,
    )  # fmt: skip
    max_frames: int = _in_call(
        32, integer(1, 100_000),
        "stage one: frames of the video; stage two: frames that go through the network at a time",
        request_field="frames", flag="frames",
    )  # fmt: skip
    latent_wid: int = _setting(56, integer(1, 1024), "width of the video in units of 8 pixels")
    latent_hei: int = _setting(32, integer(1, 1024), "height of the video in units of 8 pixels")
    resolution: tuple[int, int] | None = _in_call(
        None, optional(size(8, 8192)), "size of the video in pixels, instead of the latent's; any size",
        request_field="size", flag="size",
    )  # fmt: skip
    guide_scale: float = _in_call(
        3.0, number(0, 100), "strength of guidance: how closely to follow the image or the text"
    )
    decoder_bs: int = _setting(8, integer(1, 4096), "frames decoded at a time")
    precision: str = _setting(
        "auto", choice(*PRECISION_CHOICES),
        "auto is fp16 on CUDA, bf16 on a CPU that has it in hardware (AMX, AVX512-BF16), else fp32",
        loading=True,
    )  # fmt: skip
    attention: str = _setting(
        "auto", choice("auto", "sdpa", "xformers"), "sdpa is torch's own, which auto takes", loading=True
    )
    low_memory: bool | str = _setting(
        "auto", boolean("auto"),
        "true: each network is on the GPU only while it works, and works in smaller parts; false: all stay "
        "there; auto: as needed for what is free",
        loading=True,
    )  # fmt: skip
    compile: bool = _setting(
        False, boolean(), "compile the UNet's transformer blocks (torch.compile) when they first meet a size",
        loading=True,
    )  # fmt: skip
    lora: str | tuple[str, ...] | None = _in_call(
        None, Rule("paths", optional=True),
        "LoRA adapters to merge into the UNet's weights: a file or its folder, or a list of them",
        alias="lora_dir", quiet=True,
    )  # fmt: skip
    lora_scale: float | tuple[float, ...] = _in_call(
        1.0, Rule("numbers", -10, 10), "strength of the adapters: one number for all, or a list", quiet=True
    )
    # Approximations: by default there are none.
    guidance_interval: tuple[int, int] | None = _in_call(
        None, optional(interval(0, 999)),
        "approximate: timesteps at which there is guidance; at the others half the work is saved",
    )  # fmt: skip
    reuse_interval: int = _in_call(
        1, integer(1, 100),
        "approximate: compute the UNet's deep features at every Nth call, and use them again at the others",
    )  # fmt: skip
    # What a call may ask for at most, so that a slip of a digit is an error and not a full memory.
    limit_pixels: int = _setting(
        4096 * 2304, integer(64, 8192 * 8192), "the most pixels that a call may ask for"
    )
    limit_frames: int = _setting(1024, integer(1, 100_000), "the most frames that a call may ask for")
    limit_steps: int = _setting(1000, integer(1, 1000), "the most steps that a call may ask for")
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.declared():
            value = self.declared()[name].rule.check(name, value, ConfigurationError)
        elif name not in ("unet", "autoencoder", "clip"):
            raise ConfigurationError(
                f"{self.stage} has no setting {name!r}{did_you_mean(name, self.names())}"
            )
        super().__setattr__(name, value)

    @classmethod
    @lru_cache(maxsize=None)
    def declared(cls) -> dict[str, Setting]:
        """Declarations of the settings by name, architectures left out."""
        # A stage that has another default of a common setting declares nothing but that.
        common = {each.name: each.metadata for each in dataclasses.fields(StageSettings)}
        metadata = {each.name: each.metadata or common[each.name] for each in dataclasses.fields(cls)}
        return {name: each["setting"].named(name) for name, each in metadata.items() if each}

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings that a file or a keyword may give, architectures left out."""
        return list(cls.declared())

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels: ``resolution``, or what the latent's size comes to."""
        scale = self.autoencoder.downscale
        return self.resolution or (self.latent_wid * scale, self.latent_hei * scale)


@dataclass
class ImageToVideoSettings(StageSettings):
    """The settings of stage one."""

    stage: ClassVar[str] = IMAGE_TO_VIDEO

    ckpt_unet: str = "base_03_alldata_fps_v_80g_0789000.pth"
    noise_strength: float = _in_call(0.1, number(0, 10), "strength of the offset noise")
    solver: str = _in_call(
        "ddim", choice("ddim", "dpmpp"), "approximate: dpmpp, DPM-Solver++(2M), in half as many steps",
    )  # fmt: skip


@dataclass
class VideoToVideoSettings(StageSettings):
    """The settings of stage two."""

    stage: ClassVar[str] = VIDEO_TO_VIDEO

    ckpt_unet: str = "non_ema_0035000.pth"
    target_fps: int | str = _in_call(
        8, integer(1, 240, "source"),
        "frames per second, of the file and as stage one's condition; stage two: source keeps the source's",
        keyword="fps", both=True,
    )  # fmt: skip
    latent_hei: int = 90
    latent_wid: int = 160
    guide_scale: float = 7.5
    guide_rescale: float = _in_call(
        0.2, number(0, 1), "how far guidance keeps the contrast of the unguided prediction"
    )
    total_noise_levels: int = _in_call(600, integer(1, 999), "how much noise is put on the video, of 1000")
    solver_mode: str = _in_call(
        "fast", choice("fast", "normal"), "DPM-Solver++(2M) SDE in 30 steps, or Heun in 50"
    )
    positive_prompt: str = _in_call(
        DEFAULT_POSITIVE_PROMPT, text(), "put behind every text, instead of the published one"
    )
    negative_prompt: str = _in_call(
        DEFAULT_NEGATIVE_PROMPT, text(), "what to avoid, instead of the published one"
    )
    decoder_bs: int = 2
    scale: float | None = _in_call(
        None, optional(number(0.1, 16)), "size of the video as so many times its source's", quiet=True,
    )  # fmt: skip
    scene_cuts: bool = _in_call(
        False, boolean(), "generate each scene by itself, so that no window reaches across a cut",
        quiet=True,
    )  # fmt: skip
    tile_size: int | None = _in_call(
        None, optional(integer(64, 8192)),
        "side in pixels of the tiles in which a large frame goes through the networks; by default whole "
        "frames, or tiles that fit where those do not",
        quiet=True,
    )  # fmt: skip
    tile_overlap: int | None = _in_call(
        None, optional(integer(0, 4096)), "pixels that two tiles share; by default a quarter of a tile",
        quiet=True,
    )  # fmt: skip
    colour: str = _in_call(
        "model", choice("model", "source"), "source: keep the low frequencies of the source's colours",
        quiet=True,
    )  # fmt: skip
    keep_audio: bool = _in_call(
        False, boolean(), "give the file the source's sound, cut to the video", quiet=True
    )
    codec: str = _in_call("h264", choice("h264", "hevc", "vp9", "prores"), "codec of the file", quiet=True)
    crf: int | None = _in_call(
        None, optional(integer(0, 63)),
        "the encoder's constant rate factor: less is better and larger; by default 17, or what is like it",
        quiet=True,
    )  # fmt: skip
    pix_fmt: str | None = _in_call(
        None, optional(text(non_empty=True)),
        "pixel format of the file, as ffmpeg names it; by default yuv420p, or the codec's own",
        quiet=True,
    )  # fmt: skip
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(image_conditioned=False, row_padding=2))


SETTINGS_OF_STAGE: dict[str, type[StageSettings]] = {
    settings.stage: settings for settings in (ImageToVideoSettings, VideoToVideoSettings)
}

#: What travels beside the request, as nothing is computed with it.
_BESIDE_REQUEST: dict[str, Any] = {"request_field": None, "both": True}

#: What only calls have, no file.
CALL_ONLY: dict[str, Setting] = {
    name: Setting(rule, help, in_call=True, **declared).named(name)
    for name, rule, help, declared in (
        ("text", text(), "what the video shows, in English", {"stage": VIDEO_TO_VIDEO}),
        ("chunk_size", integer(1, 100_000),
         "frames of each window in which a long video goes through the network", {"request_field": "window"}),
        ("overlap_size", integer(0, 100_000),
         "frames that two windows share; by default a quarter of a window", {"request_field": "overlap"}),
        ("generator", Rule("generator"), "draws the seed, if none is given", _BESIDE_REQUEST),
        ("callback", Rule("function"),
         "called after each step with the step, the timestep or noise level, and the latents; may raise "
         "StopIteration to end the call", _BESIDE_REQUEST),
        ("progress", boolean(),
         "show progress bars, or none; by default only on a terminal and in a notebook", _BESIDE_REQUEST),
    )
}  # fmt: skip


def call_settings(stage: str) -> dict[str, Setting]:
    """Return the declarations of what a call of a stage may give, by the setting's name."""
    call_only = {name: each for name, each in CALL_ONLY.items() if each.stage in ("", stage)}
    declared = {**SETTINGS_OF_STAGE[stage].declared(), **call_only}
    return {name: each for name, each in declared.items() if each.in_call}


def loading_settings() -> dict[str, Setting]:
    """Return the declarations of what concerns how a stage is loaded, by the setting's name."""
    return {name: each for name, each in StageSettings.declared().items() if each.loading}
