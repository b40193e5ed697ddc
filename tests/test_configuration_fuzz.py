"""Any bytes and any JSON as a ``configuration.json``: settings, or one of our errors, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from modelscope_i2v.errors import ConfigurationError, MissingFileError
from modelscope_i2v.models.config import AutoencoderConfig, UNetConfig
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.stages import SETTINGS_OF_STAGE

ROOT = Path(__file__).resolve().parents[1]
STAGES = tuple(SETTINGS_OF_STAGE)
RULES = {name: each.rule for stage in SETTINGS_OF_STAGE.values() for name, each in stage.declared().items()}
PARTS = {
    "UNet": (*(each.name for each in dataclasses.fields(UNetConfig)), "type"),
    "auto_encoder": (
        *(each.name for each in dataclasses.fields(AutoencoderConfig)),
        "ddconfig",
        "attn_resolutions",
    ),
    "embedder": ("arch", "model_cfg", "layer", "pretrained"),
}


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="modelscope_i2v")  # else some thousand warnings


def outcome(folder: Path, contents: bytes | str) -> str:
    """What loading both stages comes to; anything but settings and our two errors is raised."""
    data = contents if isinstance(contents, bytes) else contents.encode("utf-8", "surrogatepass")
    (folder / "configuration.json").write_bytes(data)
    outcomes = []
    for stage in STAGES:
        try:
            settings = load_settings(folder, stage)
        except (ConfigurationError, MissingFileError) as error:
            assert str(error).encode().startswith(str(folder).encode()), error  # it can be printed
        else:
            outcomes.append("read")
            assert min(settings.frame_size) > 0
    return "read" if outcomes else "refused"


def awkward(draw: random.Random, depth: int = 0) -> Any:
    """Some JSON value, the awkward ones more often than they occur."""
    kind = draw.randrange(12 if depth < 3 else 9)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind <= 3:
        return draw.choice((0, 1, 2, 4, 8, 32, 64, -1, 2**31, 2**63, 2**64, 10**30, draw.randrange(2000)))
    if kind <= 5:
        return draw.choice((0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, float("inf"), float("nan"), draw.random()))
    if kind <= 8:
        texts = ("", " ", "fast", "normal", "auto", "fp16", "ViT-B-32", "hf-hub:a/b", "local-dir:/", "../x",
                 "\0", "\ud800", "é图", "a" * 5000, "image-to-video", "1")  # fmt: skip
        return draw.choice(texts)
    if kind == 9:
        return [awkward(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = (*RULES, *PARTS, "embed_dim", "vision_cfg", "text_cfg", "width", "image_size", "x", "")
    return {draw.choice(names): awkward(draw, depth + 1) for _ in range(draw.randrange(5))}


def test_any_value_for_every_setting(tmp_path):
    draw, seen = random.Random(0), []
    for name in (*RULES, "Seed", *PARTS, "xyzzy"):
        for _ in range(12):
            model = {draw.choice(("model_args", "model_cfg")): {name: awkward(draw)}}
            contents = {"task": draw.choice(STAGES), "model": model, "video_to_video": model}
            seen.append(outcome(tmp_path, json.dumps(contents)))
    assert {"read", "refused"} == set(seen)


def test_any_value_for_every_entry_of_an_architecture(tmp_path):
    draw = random.Random(1)
    for part, names in PARTS.items():
        for name in names * 12:
            entries = {name: awkward(draw)}
            if name == "model_cfg":
                needed = ("embed_dim", "vision_cfg", "text_cfg")
                entries = {name: {key: awkward(draw, depth=2) for key in needed}}
            if part == "auto_encoder" and draw.random() < 0.5:
                entries = {"ddconfig": entries}
            model = {"model_cfg": {part: entries}}
            outcome(tmp_path, json.dumps({"task": draw.choice(STAGES), "model": model}))


def test_damaged_real_files(tmp_path, small_model):
    originals = [(folder / "configuration.json").read_bytes() for folder in (ROOT, *small_model)]
    draw, seen = random.Random(2), []
    for trial in range(450):
        data = bytearray(originals[trial % 3])
        for _ in range(draw.choice((1, 1, 2, 6))):
            at, count = draw.randrange(len(data)), draw.choice((1, 1, 2, 10, 100))
            kind = draw.randrange(5)
            if kind == 0:
                data[at : at + count] = draw.randbytes(count)
            elif kind == 1:
                del data[at : at + count]
            elif kind == 2:
                data[at:at] = data[at // 2 : at // 2 + count]
            elif kind == 3:
                data[at : at + 1] = bytes([draw.choice(b'{}[]",:0123456789.-eE\\ \n')])
            else:
                data[at:at] = draw.choice(
                    (b"-", b"1e999", b"null", b"NaN", b"[" * 50, b"\\ud800", b"9" * 5000)
                )
        seen.append(outcome(tmp_path, bytes(data)))
    assert {"read", "refused"} == set(seen)


@pytest.mark.parametrize(
    "contents, words",
    [
        ("[" * 100_000, "is no configuration"),
        ('{"task":' * 100_000, "is no configuration"),
        ('{"task": ' + "9" * 5000 + "}", "configuration.json"),  # a limit of newer Python versions only
        (b"\x00" * 4096, "line 1, column 1"),
        ('{"task": "image-to-video", "model": {"model_cfg": {"ckpt_clip": "a\\u0000b"}}}',
         "ckpt_clip: got 'a\\x00b', allowed is a text that is not empty (without null characters"),
        ('{"task": "image-to-video", "model": {"model_cfg": {"ckpt_clip": "\\ud800"}}}', "halves of surr"),
        ('{"task": "image-to-video", "model": {"model_cfg": {"embedder": {"arch": "hf-hub:a/b"}}}}',
         "has no architecture 'hf-hub:a/b'"),
    ],
)  # fmt: skip
def test_files_made_to_hurt(tmp_path, contents, words):
    assert outcome(tmp_path, contents) == "refused"
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(tmp_path, "image-to-video")
    assert words in str(refusal.value)
