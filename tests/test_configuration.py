"""Settings: the hub's own files, every setting in every place, and a message for every wrong one."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import load_json

from modelscope_i2v.errors import ConfigurationError, MissingFileError
from modelscope_i2v.models.autoencoder import AutoencoderConfig
from modelscope_i2v.models.clip import ClipConfig
from modelscope_i2v.models.unet import UNetConfig
from modelscope_i2v.settings.configuration import load_settings, read_configuration, stages_in
from modelscope_i2v.settings.stages import (
    DEFAULT_NEGATIVE_PROMPT,
    DEFAULT_POSITIVE_PROMPT,
    ImageToVideoSettings,
    VideoToVideoSettings,
)

ONE, TWO = "image-to-video", "video-to-video"
SETTINGS = {ONE: ImageToVideoSettings, TWO: VideoToVideoSettings}


def hub(stage: str, ckpt_unet: str, latent_hei: int, latent_wid: int, **more: Any) -> dict[str, Any]:
    """What the hub's folder of a stage holds."""
    files = {"ckpt_clip": "open_clip_pytorch_model.bin", "ckpt_autoencoder": "v2-1_512-ema-pruned.ckpt"}
    sizes = {"latent_hei": latent_hei, "latent_wid": latent_wid}
    return {
        "framework": "pytorch",
        "task": stage,
        "model": {
            "type": f"{stage}-model",
            "model_args": {**files, "ckpt_unet": ckpt_unet, "seed": 666, **more},
            "model_cfg": {"batch_size": 1, "target_fps": 8, "max_frames": 32, **sizes},
        },
        "pipeline": {"type": "image-to-video-task-pipeline" if stage == ONE else "video-to-video-pipeline"},
    }


HUB = {
    ONE: hub(ONE, "base_03_alldata_fps_v_80g_0789000.pth", 32, 56),
    TWO: hub(TWO, "non_ema_0035000.pth", 90, 160, solver_mode="fast"),
}

#: The reference's settings.
COMMON = {
    "ckpt_clip": "open_clip_pytorch_model.bin", "ckpt_autoencoder": "v2-1_512-ema-pruned.ckpt", "seed": 666,
    "steps": None, "batch_size": 1, "target_fps": 8, "max_frames": 32, "resolution": None,
    "guidance_interval": None, "reuse_interval": 1, "precision": "auto", "attention": "auto",
    "low_memory": "auto", "compile": False,
}  # fmt: skip
EXPECTED = {
    ONE: {
        **COMMON, "ckpt_unet": "base_03_alldata_fps_v_80g_0789000.pth", "latent_hei": 32, "latent_wid": 56,
        "guide_scale": 3.0, "noise_strength": 0.1, "solver": "ddim", "frame_size": (448, 256),
    },
    TWO: {
        **COMMON, "ckpt_unet": "non_ema_0035000.pth", "latent_hei": 90, "latent_wid": 160, "guide_scale": 7.5,
        "guide_rescale": 0.2, "total_noise_levels": 600, "solver_mode": "fast", "frame_size": (1280, 720),
        "positive_prompt": DEFAULT_POSITIVE_PROMPT, "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
    },
}  # fmt: skip

_TEXT = "a text that is not empty"
_ANY_TEXT = "a text"
#: By setting: values that are taken (given and read), values that are not, and what is allowed, in words.
TABLE: dict[str, tuple[list[tuple[Any, Any]], list[Any], str]] = {
    **dict.fromkeys(
        ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder"),
        ([("weights.pth", "weights.pth"), ("a b/\u00e9", "a b/\u00e9")], ["", "  ", 3, None, ["x"]], _TEXT),
    ),
    "seed": (
        [(0, 0), (2**63 - 1, 2**63 - 1), (None, None)],
        [-1, 2**63, 1.5, 1.0, "666", True, [1]],
        f"a whole number from 0 to {2**63 - 1}, or none",
    ),
    "steps": (
        [(1, 1), (1000, 1000), (None, None)],
        [0, 1001, -5, 2.5, "50", False],
        "a whole number from 1 to 1000, or none",
    ),
    "batch_size": ([(1, 1), (1024, 1024)], [0, 1025, None, "1", 1.0], "a whole number from 1 to 1024"),
    "target_fps": ([(1, 1), (240, 240)], [0, 241, None, "8", 7.5],
                   "a whole number from 1 to 240 or source"),
    "max_frames": ([(1, 1), (10_000, 10_000)], [0, 100_001, None, "32"], "a whole number from 1 to 100000"),
    "latent_hei": ([(1, 1), (1024, 1024)], [0, 1025, None, "32", 32.0], "a whole number from 1 to 1024"),
    "latent_wid": ([(1, 1), (1024, 1024)], [0, 1025, None, "56", [56]], "a whole number from 1 to 1024"),
    "resolution": (
        [([8, 8192], (8, 8192)), ([448, 256], (448, 256)), (None, None)],
        [[7, 256], [448, 8193], [448], [448, 256, 3], 448, "448x256", [448, "256"], [448.0, 256], {"8": 8}],
        "[width, height], each a whole number from 8 to 8192, or none",
    ),
    "guide_scale": ([(0, 0.0), (1, 1.0), (7.5, 7.5), (100, 100.0)],
                    [-0.1, 100.5, None, "3", True, math.nan, math.inf], "a number from 0 to 100"),
    "guide_rescale": ([(0, 0.0), (0.5, 0.5), (1, 1.0)], [-0.1, 1.1, None, "0.2"], "a number from 0 to 1"),
    "noise_strength": ([(0, 0.0), (10, 10.0)], [-0.1, 10.1, None, "0.1", math.nan], "a number from 0 to 10"),
    "total_noise_levels": ([(1, 1), (999, 999)], [0, 1000, None, 600.0], "a whole number from 1 to 999"),
    "solver_mode": ([("fast", "fast"), ("normal", "normal")], ["Fast", "", None, ["fast"]],
                    "one of fast, normal"),
    "solver": ([("ddim", "ddim"), ("dpmpp", "dpmpp")], ["DDIM", "", None, ["ddim"]], "one of ddim, dpmpp"),
    "guidance_interval": ([([0, 999], (0, 999)), ([200, 800], (200, 800)), ([5, 5], (5, 5)), (None, None)],
                          [[800, 200], [-1, 5], [0, 1000], [1], "all", 5, [0.5, 3]],
                          "[first, last], each a whole number from 0 to 999, in order, or none"),
    "reuse_interval": ([(1, 1), (100, 100)], [0, 101, None, "2", True], "a whole number from 1 to 100"),
    "compile": ([(True, True), (False, False)], ["yes", 1, None, "auto"], "true or false"),
    "lora": ([("a b", "a b"), (["a", "b"], ("a", "b")), ([], ()), (None, None)], ["", 3, [None], {"a": 1}],
             "a path, or a list of paths, or none"),
    "lora_scale": ([(-10, -10.0), (10, 10.0), ([1, 0.5], (1.0, 0.5))], [11, "1", None, [True], math.nan],
                   "a number from -10 to 10, or a list of such"),
    "positive_prompt": ([("", ""), ("4k", "4k")], [None, 3, ["4k"]], _ANY_TEXT),
    "negative_prompt": ([("", ""), ("ugly", "ugly")], [None, 3, ["ugly"]], _ANY_TEXT),
    "decoder_bs": ([(1, 1), (4096, 4096)], [0, 4097, None, "8"], "a whole number from 1 to 4096"),
    "precision": ([(name, name) for name in ("auto", "fp32", "fp16", "bf16")], ["float16", "FP16", None, 16],
                  "one of auto, fp32, fp16, bf16"),
    "low_memory": ([(value, value) for value in (True, False, "auto")], ["on", 1, None],
        "true, false or auto"),
    "attention": ([(name, name) for name in ("auto", "sdpa", "xformers")], ["flash", "", None, True],
                  "one of auto, sdpa, xformers"),
    "limit_pixels": ([(64, 64), (8192**2, 8192**2)], [63, 8192**2 + 1, None, 1e6],
                     "a whole number from 64 to 67108864"),
    "limit_frames": ([(1, 1), (100_000, 100_000)], [0, 100_001, None, "32"],
                     "a whole number from 1 to 100000"),
    "scale": ([(2, 2.0), (0.1, 0.1), (16, 16.0), (None, None)], [0, 17, "2", True],
              "a number from 0.1 to 16, or none"),
    "scene_cuts": ([(True, True), (False, False)], ["yes", 1, None], "true or false"),
    "keep_audio": ([(True, True), (False, False)], ["yes", 1, None], "true or false"),
    "tile_size": ([(64, 64), (8192, 8192), (None, None)], [63, 8193, "512", 512.0],
                  "a whole number from 64 to 8192, or none"),
    "tile_overlap": ([(0, 0), (4096, 4096), (None, None)], [-1, 4097, "64"],
                     "a whole number from 0 to 4096, or none"),
    "colour": ([("model", "model"), ("source", "source")], ["Source", None, True], "one of model, source"),
    "codec": ([("h264", "h264"), ("hevc", "hevc")], ["libx264", None, 5], "one of h264, hevc, vp9, prores"),
    "crf": ([(0, 0), (63, 63), (None, None)], [-1, 64, "17"], "a whole number from 0 to 63, or none"),
    "pix_fmt": ([("yuv420p10le", "yuv420p10le"), (None, None)], ["", 3], "a text that is not empty, or none"),
    "limit_steps": ([(1, 1), (1000, 1000)], [0, 1001, None, "50"], "a whole number from 1 to 1000"),
}  # fmt: skip

STAGES_OF = {name: [stage for stage in SETTINGS if name in SETTINGS[stage].names()] for name in TABLE}
GOOD = [
    (stage, name, given, read)
    for name, (good, _, _) in TABLE.items()
    for stage in STAGES_OF[name]
    for given, read in good
]
BAD = [
    (STAGES_OF[name][-1], name, value, allowed) for name, (_, bad, allowed) in TABLE.items() for value in bad
]

#: Small parts that fit each other.
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 56, "layers": 1, "width": 32, "head_width": 16, "patch_size": 28},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
SMALL = {
    "UNet": {"dim": 32, "y_dim": 16, "context_dim": 16, "num_heads": 2, "head_dim": 16},
    "auto_encoder": {"ddconfig": {"ch": 32}, "embed_dim": 4},
    "embedder": {"model_cfg": CLIP},
}


def written(folder: Path, contents: Any) -> Path:
    text = contents if isinstance(contents, (str, bytes)) else json.dumps(contents)
    (folder / "configuration.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def of_stage(stage: str, model_args: Any = None, model_cfg: Any = None) -> dict[str, Any]:
    """A file of nothing but its task and these settings."""
    model = {"model_args": {} if model_args is None else model_args}
    model["model_cfg"] = {} if model_cfg is None else model_cfg
    return {"task": stage, "model": model}


def refusal_of(folder: Path, stage: str = ONE) -> str:
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(folder, stage)
    return str(refusal.value)


@pytest.fixture
def warnings_of(caplog):
    """The warnings of a load."""

    def load(folder: Path, stage: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="modelscope_i2v.settings.configuration"):
            load_settings(folder, stage)
        return [record.getMessage() for record in caplog.records]

    return load


# The hub's files


@pytest.mark.parametrize("stage", [ONE, TWO])
@pytest.mark.parametrize("bare", [False, True])
def test_the_hubs_own_file_gives_the_reference_settings(tmp_path, warnings_of, stage, bare):
    folder = written(tmp_path, {"task": stage} if bare else HUB[stage])
    settings = load_settings(folder, stage)
    assert type(settings) is SETTINGS[stage]
    expected = {**EXPECTED[stage], "seed": None if bare else 666}
    assert {name: getattr(settings, name) for name in expected} == expected
    stage_two = {"image_conditioned": False, "row_padding": 2} if stage == TWO else {}
    assert settings.unet == UNetConfig(**stage_two)
    assert settings.autoencoder == AutoencoderConfig()
    assert settings.clip == ClipConfig("ViT-H-14", None, "penultimate")
    assert warnings_of(folder, stage) == []


def test_reference_architectures_and_prompts():
    assert dataclasses.asdict(UNetConfig()) == {
        "image_conditioned": True, "row_padding": 1, "in_dim": 4, "dim": 320, "y_dim": 1024,
        "context_dim": 1024, "out_dim": 4, "dim_mult": (1, 2, 4, 4), "num_heads": 8, "head_dim": 64,
        "num_res_blocks": 2, "attn_scales": (1.0, 0.5, 0.25), "num_tokens": 4, "default_fps": 8,
        "num_groups": 32,
    }  # fmt: skip
    assert dataclasses.asdict(AutoencoderConfig()) == {
        "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2,
        "z_channels": 4, "embed_dim": 4, "num_groups": 32,
    }  # fmt: skip
    prompts = load_json("prompts")
    assert prompts["positive_prompt"] == DEFAULT_POSITIVE_PROMPT
    assert prompts["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT


# Every setting


def test_the_table_has_every_setting():
    named = {field.name for settings in SETTINGS.values() for field in dataclasses.fields(settings)}
    assert named == {*TABLE, "unet", "autoencoder", "clip"}
    assert all(STAGES_OF.values())


@pytest.mark.parametrize("part", ["model_args", "model_cfg"])
@pytest.mark.parametrize("stage, name, given, read", GOOD)
def test_every_setting_is_read_from_either_part(tmp_path, stage, name, given, read, part):
    settings = load_settings(written(tmp_path, of_stage(stage, **{part: {name: given}})), stage)
    value = getattr(settings, name)
    assert value == read
    assert type(value) is type(read)
    for other in SETTINGS[stage].names():
        if other != name:
            assert getattr(settings, other) == getattr(SETTINGS[stage](), other)


@pytest.mark.parametrize("stage, name, value, allowed", BAD)
def test_every_wrong_value_is_named_with_what_is_allowed(tmp_path, stage, name, value, allowed):
    folder = written(tmp_path, of_stage(stage, model_cfg={name: value}))
    message = f"{name}: got {value!r}, allowed is {allowed}"
    assert refusal_of(folder, stage) == f"{folder / 'configuration.json'}: {message}"
    settings = SETTINGS[stage]()
    before = getattr(settings, name)
    with pytest.raises(ConfigurationError) as refusal:
        setattr(settings, name, value)
    assert str(refusal.value) == message
    assert getattr(settings, name) == before


def test_seed_may_be_spelt_with_a_capital(tmp_path, warnings_of):
    folder = written(tmp_path, of_stage(ONE, {"Seed": 42}))
    assert load_settings(folder, ONE).seed == 42
    assert warnings_of(folder, ONE) == []
    assert "seed: got -1, allowed is " in refusal_of(written(tmp_path, of_stage(ONE, {"Seed": -1})))


@pytest.mark.parametrize(
    "model_args, model_cfg, message",
    [
        ({"steps": 10}, {"steps": 20}, "model: steps is given twice, as 10 and as 20"),
        ({"seed": 1, "Seed": 2}, {}, "model: seed is given twice, as 1 and as 2"),
        ({"Seed": 1}, {"seed": 2}, "model: seed is given twice, as 1 and as 2"),
        ({"UNet": {}}, {"UNet": {"dim": 64}}, "model: UNet is given twice, as {} and as {'dim': 64}"),
    ],
)
def test_setting_given_twice_is_refused(tmp_path, model_args, model_cfg, message):
    alike = written(tmp_path, of_stage(ONE, {"steps": 10, "Seed": 3}, {"steps": 10, "seed": 3}))
    assert (load_settings(alike, ONE).steps, load_settings(alike, ONE).seed) == (10, 3)
    folder = written(tmp_path, of_stage(ONE, model_args, model_cfg))
    assert refusal_of(folder) == f"{folder / 'configuration.json'}: {message}"


def test_resolution_goes_before_the_latents_size(tmp_path):
    given = {"resolution": [640, 352], "latent_wid": 40, "latent_hei": 24}
    settings = load_settings(written(tmp_path, of_stage(ONE, {}, given)), ONE)
    assert settings.frame_size == (640, 352)
    settings.resolution = None
    assert settings.frame_size == (320, 192)
    cfg = {"auto_encoder": {"ddconfig": {"ch_mult": [1, 2]}}, "latent_wid": 40, "latent_hei": 24}
    assert load_settings(written(tmp_path, of_stage(ONE, {}, cfg)), ONE).frame_size == (80, 48)


# Unknown settings


@pytest.mark.parametrize(
    "stage, cfg, name, hint",
    [
        (ONE, {"guide_scal": 1}, "guide_scal", "; did you mean 'guide_scale'?"),
        (ONE, {"max_frame": 1}, "max_frame", "; did you mean 'max_frames'?"),
        (ONE, {"unet": 1}, "unet", "; did you mean"),
        (TWO, {"total_noise_level": 1}, "total_noise_level", "; did you mean 'total_noise_levels'?"),
        (TWO, {"noise_strength": 1}, "noise_strength", ""),  # stage one's
        (
            ONE,
            {"xyzzy": 1},
            "xyzzy",
            "; known are UNet, attention, auto_encoder, batch_size, ckpt_autoencoder, ",
        ),
        (ONE, {"UNet": {"num_head": 1}}, "num_head", "; did you mean 'num_heads'? Known are "),
        (ONE, {"auto_encoder": {"z_channel": 1}}, "z_channel", "; did you mean 'z_channels'? Known are "),
        (
            ONE,
            {"embedder": {"layers": 1}},
            "layers",
            "; did you mean 'layer'? Known are arch, layer, model_cfg",
        ),
    ],
)
def test_unknown_setting_warns_with_the_nearest_known_one(tmp_path, warnings_of, stage, cfg, name, hint):
    folder = written(tmp_path, of_stage(stage, {}, cfg))
    [message] = warnings_of(folder, stage)
    section = "" if name in cfg else f"{next(iter(cfg))}: "
    words = f"{folder / 'configuration.json'}: {section}unknown setting {name!r} is ignored{hint}"
    assert message.startswith(words)


def test_published_settings_without_effect_are_known(tmp_path, warnings_of):
    given = {
        "UNet": {"type": "UNetSD", "input_dim": 1024, "dropout": 0.1, "use_checkpoint": False, "dim": 320},
        "auto_encoder": {
            "type": "AutoencoderKL", "pretrained": "x.ckpt", "embed_dim": 4,
            "ddconfig": {"double_z": True, "resolution": 256, "attn_resolutions": [], "dropout": 0.0},
        },
        "embedder": {"type": "FrozenOpenCLIPEmbedder", "pretrained": "x.bin", "vit_resolution": [224, 224]},
    }  # fmt: skip
    folder = written(tmp_path, of_stage(ONE, {}, given))
    assert warnings_of(folder, ONE) == []
    assert load_settings(folder, ONE) == ImageToVideoSettings()


# The file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_is_skipped(tmp_path, encoding):
    contents = of_stage(TWO, {"positive_prompt": "\u6f02\u4eae \u00e9"})
    (tmp_path / "configuration.json").write_bytes(json.dumps(contents, ensure_ascii=False).encode(encoding))
    assert load_settings(tmp_path, TWO).positive_prompt == "\u6f02\u4eae \u00e9"


@pytest.mark.parametrize(
    "text, line, columns",
    [
        ('{\n  // stage one\n  "task": "image-to-video"\n}', 2, [3]),
        # Since Python 3.13 the comma's column, before that the next one.
        ('{\n  "task": "image-to-video",}', 2, [27, 28]),
        ("{'task': 1}", 1, [2]),
        ("", 1, [1]),
        ('{"task": "image-to-video"', 1, [26]),
    ],
)
def test_text_that_is_no_json_is_located(tmp_path, text, line, columns):
    message = refusal_of(written(tmp_path, text))
    assert message.startswith(
        tuple(f"{tmp_path / 'configuration.json'}: line {line}, column {column}: " for column in columns)
    )
    assert message.endswith("(JSON has no comments and no comma after the last entry)")


@pytest.mark.parametrize("stage, contents, message", [
    (ONE, '{"task": "\u00e9"}'.encode("latin-1"), "is not UTF-8 text: "),
    (ONE, '{"task": 1, "task": 2}', "is no configuration: the key 'task' stands twice in one object"),
    (ONE, '{"model": {"model_cfg": {"UNet": {"dim": 320, "dim": 320}}}}',
     "is no configuration: the key 'dim' stands twice in one object"),
    (ONE, [], "an object is needed, got list"),
    (ONE, "null", "an object is needed, got NoneType"),
    (ONE, {"task": ONE, "model": None}, "model: an object is needed, got None"),
    (ONE, of_stage(ONE, [1]), "model_args: an object is needed, got [1]"),
    (ONE, of_stage(ONE, {}, "x"), "model_cfg: an object is needed, got 'x'"),
    (ONE, of_stage(ONE, {}, {"UNet": []}), "UNet: an object is needed, got []"),
    (ONE, of_stage(ONE, {}, {"auto_encoder": 3}), "auto_encoder: an object is needed, got 3"),
    (ONE, of_stage(ONE, {}, {"auto_encoder": {"ddconfig": []}}), "ddconfig: an object is needed, got []"),
    (ONE, of_stage(ONE, {}, {"embedder": "ViT-H-14"}), "embedder: an object is needed, got 'ViT-H-14'"),
    (ONE, {"task": ["image-to-video"]}, "describes ['image-to-video'], not image-to-video"),
    (ONE, {"task": "text-to-image"}, "describes 'text-to-image', not image-to-video"),
    (ONE, {}, "describes None, not image-to-video"),
    (TWO, HUB[ONE], "describes image-to-video, not video-to-video"),
    (TWO, {**HUB[ONE], "video_to_video": {"model_cfg": {"steps": 0}}}, "steps: got 0, allowed is a whole "),
    (TWO, {**HUB[ONE], "video_to_video": []}, "video_to_video: an object is needed, got []"),
    (TWO, {**HUB[ONE], "video_to_video": {"model_args": {"steps": 3}, "model_cfg": {"steps": 4}}},
     "video_to_video: steps is given twice, as 3 and as 4"),
])  # fmt: skip
def test_files_that_are_no_configuration_are_refused(tmp_path, stage, contents, message):
    folder = written(tmp_path, contents)
    assert refusal_of(folder, stage).startswith(f"{folder / 'configuration.json'}: {message}")


@pytest.mark.timeout(20)
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    path = written(tmp_path, " " * (2**20 + 1)) / "configuration.json"
    assert refusal_of(tmp_path) == f"{path}: is no configuration: it is larger than 1,048,576 bytes"
    path.unlink()
    os.mkfifo(path)
    assert refusal_of(tmp_path) == f"{path}: is no configuration: it is not an ordinary file"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refusal_of(tmp_path) == f"{path}: is no configuration: it is not an ordinary file"
    path.unlink()
    path.mkdir()
    assert refusal_of(tmp_path) == f"{path}: cannot be read: Is a directory"


def test_missing_file_and_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder, what in ((tmp_path, "file"), (tmp_path / "nowhere", "folder"), (tmp_path / "file", "folder")):
        with pytest.raises(MissingFileError) as refusal:
            load_settings(folder, ONE)
        assert isinstance(refusal.value, FileNotFoundError)
        assert str(refusal.value) == (
            f"{folder / 'configuration.json'}: there is no such {what}; "
            "a model folder holds a configuration.json beside its weights"
        )


# Both stages in one file


def test_second_stage_may_stand_in_a_section_of_the_first(tmp_path):
    section = {"model_args": {"ckpt_unet": "two.pth", "seed": 7}, "model_cfg": {"max_frames": 16, "steps": 5}}
    folder = written(tmp_path, {**HUB[ONE], "video_to_video": section})
    assert stages_in(read_configuration(folder)) == [ONE, TWO]
    one, two = load_settings(folder, ONE), load_settings(folder, TWO)
    assert {name: getattr(one, name) for name in EXPECTED[ONE]} == EXPECTED[ONE]
    expected = {**EXPECTED[TWO], "ckpt_unet": "two.pth", "seed": 7, "max_frames": 16, "steps": 5}
    assert {name: getattr(two, name) for name in expected} == expected
    assert type(two) is VideoToVideoSettings


def test_stages_in_a_file():
    assert stages_in(HUB[ONE]) == [ONE]
    assert stages_in(HUB[TWO]) == [TWO]
    assert stages_in({"task": "text-to-image"}) == []
    assert stages_in({"video_to_video": {}}) == [TWO]
    assert stages_in({**HUB[TWO], "video_to_video": {}}) == [TWO]


# Architectures


def test_every_setting_of_an_architecture_is_read(tmp_path):
    unet = {
        "in_dim": 4, "dim": 64, "y_dim": 16, "context_dim": 24, "out_dim": 4, "dim_mult": [1, 2, 3],
        "num_heads": 3, "head_dim": 32, "num_res_blocks": 1, "attn_scales": [1, 0.25], "num_tokens": 7,
        "default_fps": 12, "num_groups": 16,
    }  # fmt: skip
    autoencoder = {
        "in_channels": 1, "out_ch": 2, "ch": 64, "ch_mult": [1, 3], "num_res_blocks": 5, "z_channels": 6,
        "num_groups": 8,
    }  # fmt: skip
    sections = {"UNet": unet, "auto_encoder": {"ddconfig": autoencoder, "embed_dim": 4}}
    clip = {"model_cfg": CLIP, "layer": "last"}
    settings = load_settings(written(tmp_path, of_stage(ONE, {}, {**sections, "embedder": clip})), ONE)
    assert settings.unet == UNetConfig(**{**unet, "dim_mult": (1, 2, 3), "attn_scales": (1.0, 0.25)})
    assert settings.autoencoder == AutoencoderConfig(**{**autoencoder, "ch_mult": (1, 3)}, embed_dim=4)
    assert settings.clip == ClipConfig(model_cfg=CLIP, layer="last")
    hash(settings.unet), hash(settings.autoencoder)  # no lists in them
    named = {"UNet": {**SMALL["UNet"], "y_dim": 512}, "embedder": {"arch": "ViT-B-32"}}
    assert load_settings(written(tmp_path, of_stage(ONE, {}, named)), ONE).clip == ClipConfig(arch="ViT-B-32")
    unet = load_settings(written(tmp_path, of_stage(TWO, {}, SMALL)), TWO).unet
    assert (unet.image_conditioned, unet.row_padding, unet.dim, unet.y_dim) == (False, 2, 32, 16)


#: Bounds by section and name; what stands in the first list is a list of such.
LISTS = ("dim_mult", "attn_scales", "ch_mult")
BOUNDS = {
    "UNet": {
        "in_dim": (1, 1024), "dim": (1, 4096), "y_dim": (1, 16384), "context_dim": (1, 16384),
        "out_dim": (1, 1024), "dim_mult": (1, 64), "num_heads": (1, 256), "head_dim": (1, 1024),
        "num_res_blocks": (1, 16), "attn_scales": (0.0, 1.0), "num_tokens": (1, 1024),
        "default_fps": (1, 240), "num_groups": (1, 4096),
    },
    "auto_encoder": {
        "in_channels": (1, 1024), "out_ch": (1, 1024), "ch": (1, 4096), "ch_mult": (1, 64),
        "num_res_blocks": (1, 16), "z_channels": (1, 1024), "embed_dim": (1, 1024), "num_groups": (1, 4096),
    },
}  # fmt: skip


@pytest.mark.parametrize("section, name", [(section, name) for section in BOUNDS for name in BOUNDS[section]])
def test_wrong_value_of_a_part_is_named_with_what_is_allowed(tmp_path, section, name):
    low, high = BOUNDS[section][name]
    number = "number" if isinstance(high, float) else "whole number"
    allowed = f"a {number} from {low} to {high}"
    wrong: list[Any] = [low - 1, high + 1, "4", None, True, 0.5 if number == "whole number" else math.nan]
    if name in LISTS:
        fewest = 0 if name == "attn_scales" else 1
        allowed = f"a list of {fewest} to 8 entries, each {allowed}"
        wrong = [*([1, each] for each in wrong), *([[]] * fewest), 1, [1] * 9]
    in_ddconfig = section == "auto_encoder" and name != "embed_dim"
    for value in wrong:
        for contents in ({name: value}, *([{"ddconfig": {name: value}}] if in_ddconfig else [])):
            folder = written(tmp_path, of_stage(ONE, {}, {section: contents}))
            words = f"{section}: {name}: got {value!r}, allowed is {allowed}"
            assert refusal_of(folder) == f"{folder / 'configuration.json'}: {words}"


@pytest.mark.parametrize(
    "stage, changed, message",
    [
        (ONE, {"UNet": {"y_dim": 24}},
         "UNet: y_dim: got 24, allowed is 16, as the width of the embedder's output is"),
        (ONE, {"UNet": {"in_dim": 8}}, "UNet: in_dim: got 8, allowed is 4, as auto_encoder: embed_dim is"),
        (ONE, {"auto_encoder": {"embed_dim": 8}},
         "UNet: in_dim: got 4, allowed is 8, as auto_encoder: embed_dim is"),
        (ONE, {"UNet": {"out_dim": 3}}, "UNet: out_dim: got 3, allowed is 4, as UNet: in_dim is"),
        (TWO, {"embedder": {"model_cfg": {**CLIP, "text_cfg": {**CLIP["text_cfg"], "width": 32}}}},
         "UNet: y_dim: got 16, allowed is 32, as the width of the embedder's output is"),
        (TWO, {"UNet": {"y_dim": 24}}, "UNet: y_dim 24 and context_dim 16 must be equal in stage two"),
        (ONE, {"UNet": {"dim": 33}}, "UNet: dim must be even, got 33"),
        (ONE, {"UNet": {"dim": 48}}, "UNet: dim x dim_mult[0] is 48, and must be a multiple of num_groups"),
        (ONE, {"auto_encoder": {"ddconfig": {"ch": 40}}}, "auto_encoder: ch must be a multiple of num_"),
        (ONE, {"auto_encoder": {"ddconfig": {"attn_resolutions": [32]}}},
         "auto_encoder: attn_resolutions: only [] is supported"),
        (ONE, {"embedder": {"arch": "ViT-Q-1", "model_cfg": None}}, "has no architecture 'ViT-Q-1'"),
        (ONE, {"embedder": {"model_cfg": {"embed_dim": 16}}},
         "embedder: model_cfg: an object with embed_dim, text_cfg, vision_cfg is needed, got {'embed_dim'"),
        (ONE, {"embedder": {"model_cfg": []}}, "text_cfg, vision_cfg is needed, got ()"),
        (TWO, {"embedder": {"model_cfg": {**CLIP, "text_cfg": 3}}}, "embedder: model_cfg: an object with "),
        (ONE, {"embedder": {"arch": 3}}, "embedder: arch: got 3, allowed is a text"),
        (ONE, {"embedder": {"layer": ["last"]}}, "layer: got ('last',), allowed is one of penultimate, last"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(tmp_path, stage, changed, message):
    given = {name: {**SMALL[name], **changed.get(name, {})} for name in SMALL}
    refusal = refusal_of(written(tmp_path, of_stage(stage, {}, given)), stage)
    assert refusal.startswith(f"{tmp_path / 'configuration.json'}: ")
    assert message in refusal


# Later


def test_overrides_go_before_the_file(tmp_path):
    folder = written(tmp_path, of_stage(ONE, {"steps": 10, "seed": 1}))
    settings = load_settings(folder, ONE, {"steps": 20, "resolution": [64, 32]})
    assert (settings.steps, settings.seed, settings.resolution) == (20, 1, (64, 32))
    with pytest.raises(ConfigurationError, match="^steps: got 0, allowed is "):
        load_settings(folder, ONE, {"steps": 0})
    with pytest.raises(ConfigurationError, match="no setting 'step'; did you mean 'steps'"):
        load_settings(folder, ONE, {"step": 5})


def test_settings_may_be_assigned_and_are_checked():
    settings = ImageToVideoSettings()
    settings.max_frames = 10_000
    assert settings.max_frames == 10_000
    settings.guide_scale = 5
    assert type(settings.guide_scale) is float
    with pytest.raises(ConfigurationError, match="max_frames: got 0, allowed is a whole number from 1 to"):
        settings.max_frames = 0
    assert settings.max_frames == 10_000
    with pytest.raises(ConfigurationError) as refusal:
        settings.max_frame = 3
    message = "image-to-video has no setting 'max_frame'; did you mean 'max_frames'? Known are "
    assert str(refusal.value).startswith(message)
    assert not hasattr(settings, "max_frame")
    with pytest.raises(ConfigurationError, match="image-to-video has no setting 'solver_mode'"):
        settings.solver_mode = "fast"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.unet.dim = 1


def test_two_models_share_no_setting(tmp_path):
    folder = written(tmp_path, of_stage(ONE, {"steps": 10}, SMALL))
    first, second = load_settings(folder, ONE), load_settings(folder, ONE)
    assert first == second
    first.steps, first.max_frames, first.seed = 20, 64, 3
    first.clip.model_cfg["embed_dim"] = 99
    first.unet = UNetConfig()
    assert (second.steps, second.max_frames, second.seed) == (10, 32, None)
    assert second.clip.model_cfg == CLIP
    assert second.unet.dim == 32
    assert load_settings(folder, ONE) == second
    assert ImageToVideoSettings().max_frames == 32
