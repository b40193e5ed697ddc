"""The small model's architecture: sizes of its videos, of its networks, and its ``configuration.json``."""

from __future__ import annotations

from typing import Any

from ...models.autoencoder import AutoencoderConfig
from ...models.unet import UNetConfig
from ...settings.stages import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_PROMPT
from ..scenes import all_captions

SIZE, LARGE_SIZE = (160, 96), (320, 192)  # of stage one and stage two, in pixels
FRAMES, FPS = 8, 8
LATENTS, DOWNSCALE = 12, 8
AUTOENCODER: dict[str, Any] = {
    "ch": 16, "ch_mult": [1, 2, 3, 4], "num_res_blocks": 1, "z_channels": LATENTS, "num_groups": 2,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
#: Stage one's context: a token for each position of the UNet's second level, (width, height), and each frame.
GRID = (SIZE[0] // DOWNSCALE // 2, SIZE[1] // DOWNSCALE // 2)
TOKENS = FRAMES * GRID[0] * GRID[1]
#: Of a token's channels, the first say where it stands, the others what is there: colours of 2x2 blocks.
PLACE, CONTENT = 4, 12
UNET: dict[str, Any] = {
    "in_dim": LATENTS, "out_dim": LATENTS, "dim": 32, "dim_mult": [1, 2, 2], "num_heads": 2, "head_dim": 32,
    "num_res_blocks": 1, "attn_scales": [0.5], "num_groups": 1,
}  # fmt: skip
STAGE_ONE = {"y_dim": CLIP["embed_dim"], "context_dim": PLACE + CONTENT, "num_tokens": TOKENS}
STAGE_TWO = {
    "y_dim": CLIP["text_cfg"]["width"], "context_dim": CLIP["text_cfg"]["width"],
    "dim_mult": [1, 1, 2], "num_heads": 1,
}  # fmt: skip
NOISE_LEVELS = 6  # hardly any noise: the enlarged clip tells all but the details
#: Texts whose tokens the text tower learns; it has zeros for all others.
ALL_TEXTS = [*all_captions(), DEFAULT_POSITIVE_PROMPT, DEFAULT_NEGATIVE_PROMPT, ""]


def autoencoder_config() -> AutoencoderConfig:
    return AutoencoderConfig(**{**AUTOENCODER, "ch_mult": tuple(AUTOENCODER["ch_mult"])}, embed_dim=LATENTS)


def unet_config(**of_stage: Any) -> UNetConfig:
    """The UNet's architecture, with what is the stage's own."""
    settings = {**UNET, **of_stage}
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return UNetConfig(**{**settings, **lists})


def configuration() -> dict[str, Any]:
    """``configuration.json`` of the model folder, for both stages."""
    shared = {
        "batch_size": 1, "target_fps": FPS, "max_frames": FRAMES,
        "auto_encoder": {"ddconfig": AUTOENCODER, "embed_dim": LATENTS}, "embedder": {"model_cfg": CLIP},
    }  # fmt: skip
    files = {"ckpt_clip": "clip.safetensors", "ckpt_autoencoder": "autoencoder.safetensors", "seed": 666}
    return {
        "framework": "pytorch",
        "task": "image-to-video",
        "model": {
            "type": "image-to-video-model",
            "model_args": {**files, "ckpt_unet": "image_to_video.safetensors"},
            "model_cfg": {
                **shared, "latent_wid": SIZE[0] // DOWNSCALE, "latent_hei": SIZE[1] // DOWNSCALE,
                "solver": "dpmpp", "steps": 2, "guide_scale": 1.0, "UNet": {**UNET, **STAGE_ONE},
            },
        },
        "video_to_video": {
            "type": "video-to-video-model",
            "model_args": {**files, "ckpt_unet": "video_to_video.safetensors", "solver_mode": "fast"},
            "model_cfg": {
                **shared, "latent_wid": LARGE_SIZE[0] // DOWNSCALE, "latent_hei": LARGE_SIZE[1] // DOWNSCALE,
                "steps": 1, "guide_scale": 1.0, "total_noise_levels": NOISE_LEVELS,
                "UNet": {**UNET, **STAGE_TWO},
            },
        },
        "pipeline": {"type": "image-to-video-task-pipeline"},
    }  # fmt: skip
