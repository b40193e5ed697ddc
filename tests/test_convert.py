"""Lean model folders: what is written, that it gives the same videos, and what is left after a failure."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from sample_videos import moving_frames
from test_lora import trained
from tiny_networks import built
from tqdm import tqdm

from modelscope_i2v import ImageToVideo
from modelscope_i2v.cli import main
from modelscope_i2v.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidInputError,
    MissingFileError,
    OutputError,
)
from modelscope_i2v.media.video import read_video, write_video
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.training.lora import save_adapter
from modelscope_i2v.weights import open_checkpoint
from modelscope_i2v.weights.conversion import convert_folder
from modelscope_i2v.weights.parts import stage_parts

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

ONE, TWO = STAGES = ("image-to-video", "video-to-video")
CLIP, AUTOENCODER = "open_clip_pytorch_model", "v2-1_512-ema-pruned"
UNETS = {ONE: "base_03_alldata_fps_v_80g_0789000", TWO: "non_ema_0035000"}
PREFIX = "first_stage_model."


@pytest.fixture
def folder_of(small_model, tmp_path):
    """A copy of a stage's folder, whose weights are links."""

    def copy(stage: str = ONE, name: str = "") -> Path:
        target = tmp_path / (name or f"copy of {stage}")
        shutil.copytree(small_model[STAGES.index(stage)], target, copy_function=os.symlink)
        text = (target / "configuration.json").read_bytes()
        (target / "configuration.json").unlink()
        (target / "configuration.json").write_bytes(text)
        return target

    return copy


@pytest.fixture(scope="module")
def combined(small_model, tmp_path_factory) -> Path:
    """Both stages in one folder, in bf16."""
    folder = tmp_path_factory.mktemp("combined") / "model"
    convert_folder(small_model, folder, "bf16")
    return folder


def configuration(folder: Path) -> dict:
    return json.loads((folder / "configuration.json").read_text(encoding="utf-8"))


def configure(folder: Path, section: str = "model", part: str = "model_args", **settings) -> None:
    contents = configuration(folder)
    contents[section][part].update(settings)
    (folder / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")


def edit_weights(path: Path, edit) -> None:
    """Replace a weights file, or a link to one, by a changed copy."""
    tensors = weights(path)
    edit(tensors)
    path.unlink()
    torch.save({"state_dict": tensors}, path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}


def expected(folder: Path, stage: str, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """By the part's name, what a stage's networks are loaded with."""
    found = {}
    for name, part in stage_parts(load_settings(folder, stage), folder).items():
        held = weights(part.path)
        keys = [part.prefix + key for key in part.weights.state_dict()]
        found[name] = {key: held[key].to(dtype) for key in keys}
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


# --- the same videos ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_converted_stage_gives_the_very_file_of_its_source(stage, small_model, picture, tmp_path):
    source = small_model[STAGES.index(stage)]
    converted = tmp_path / source.name  # a file's metadata name the folder
    convert_folder(source, converted, "bf16")
    write_video(moving_frames(4, 40, 64), tmp_path / "clip.mp4")
    given = str(picture if stage == ONE else tmp_path / "clip.mp4")
    videos = [
        pipeline(stage, model=str(folder), device="cpu", precision="bf16")(given)[OutputKeys.OUTPUT_VIDEO]
        for folder in (source, converted)
    ]
    assert videos[0] == videos[1]


def test_the_folder_of_both_stages_gives_the_videos_of_the_two(small_model, combined, picture, tmp_path):
    first, second = map(str, small_model)
    pipes = {
        "apart": pipeline(ONE, model=first, device="cpu", precision="bf16", refine=second),
        "combined": pipeline(ONE, model=str(combined), device="cpu", precision="bf16"),
    }
    frames = {}
    for name, pipe in pipes.items():
        paths = [str(tmp_path / f"{name}{number}.mp4") for number in (1, 2)]
        pipe(str(picture), output_video=paths[1], refine=True, keep_first=paths[0])
        frames[name] = [read_video(path).frames for path in paths]
    for apart, together in zip(frames["apart"], frames["combined"]):
        assert (apart == together).all()
    assert frames["combined"][0].std() > 1  # a picture, not one colour
    assert pipeline(TWO, model=str(combined), device="cpu").model.cfg.latent_hei == 10


# --- what is written ---


@pytest.mark.parametrize(
    ("stage", "precision", "dtype"), [(ONE, "fp16", torch.float16), (TWO, "fp32", torch.float32)]
)
def test_what_the_networks_need_is_written_and_nothing_else(stage, precision, dtype, small_model, tmp_path):
    source, folder = small_model[STAGES.index(stage)], tmp_path / "link"
    folder.symlink_to(tmp_path / "new" / "folder")  # neither of which is there
    done = convert_folder(str(source), str(folder), precision)
    stems = {"clip_encoder": CLIP, "autoencoder": AUTOENCODER, "unet": UNETS[stage]}
    assert names(folder) == sorted(
        [*(f"{stem}.safetensors" for stem in stems.values()), "configuration.json"]
    )
    for part, tensors in expected(source, stage, dtype).items():
        assert_same(load_file(folder / f"{stems[part]}.safetensors"), tensors)
    before, now = (
        sum(path.stat().st_size for path in each.iterdir() if path.suffix != ".json")
        for each in (source, folder)
    )
    assert (done.size_before, done.size, done.stages) == (before, now, (stage,))
    assert (folder / "configuration.json").read_bytes() == (source / "configuration.json").read_bytes()


def test_two_folders_become_one_in_either_order_and_it_stays_one(small_model, combined, tmp_path):
    stems = (CLIP, AUTOENCODER, *UNETS.values())
    assert names(combined) == sorted([*(f"{stem}.safetensors" for stem in stems), "configuration.json"])
    convert_folder(reversed(small_model), tmp_path / "reversed", "bf16")
    done = convert_folder(combined, tmp_path / "again", "bf16")
    assert done.stages == STAGES and done.size_before == done.size
    for copy in (tmp_path / "reversed", tmp_path / "again"):
        assert names(copy) == names(combined)
        assert all((combined / name).read_bytes() == (copy / name).read_bytes() for name in names(copy))
    first, second = (expected(folder, stage, torch.bfloat16) for folder, stage in zip(small_model, STAGES))
    both = {**first["clip_encoder"], **second["clip_encoder"]}
    assert_same(load_file(combined / f"{CLIP}.safetensors"), both)
    assert "text_projection" not in both  # which neither stage needs
    assert_same(load_file(combined / f"{AUTOENCODER}.safetensors"), second["autoencoder"])
    one, two = map(configuration, small_model)
    assert configuration(combined) == {**one, "video_to_video": two["model"]}


def test_what_differs_is_kept_of_both(folder_of, small_model, tmp_path):
    """Two autoencoders, and of CLIP each stage's tower."""
    second = folder_of(TWO)
    key = PREFIX + "decoder.conv_out.bias"

    def double(tensors: dict) -> None:
        for tensor in tensors.values():
            tensor *= 2

    edit_weights(second / f"{AUTOENCODER}.ckpt", lambda tensors: tensors[key].add_(1))
    edit_weights(second / f"{CLIP}.bin", double)
    convert_folder([small_model[0], second], tmp_path / "out", "fp32")
    files = [load_file(tmp_path / "out" / f"{AUTOENCODER}{end}.safetensors") for end in ("", f"-{TWO}")]
    assert torch.equal(files[0][key] + 1, files[1][key])
    one, two = (configuration(tmp_path / "out")[section] for section in ("model", "video_to_video"))
    assert one["model_args"]["ckpt_autoencoder"] == f"{AUTOENCODER}.ckpt"
    assert two["model_args"]["ckpt_autoencoder"] == f"{AUTOENCODER}-{TWO}.safetensors"
    pipe = pipeline(TWO, model=str(tmp_path / "out"), device="cpu", precision="fp32")
    assert torch.equal(pipe.model.autoencoder.decoder.conv_out.bias, files[1][key])
    clip = load_file(tmp_path / "out" / f"{CLIP}.safetensors")
    original = weights(small_model[0] / f"{CLIP}.bin")
    for key in ("visual.proj", "token_embedding.weight", "ln_final.bias"):
        assert torch.equal(clip[key], original[key] * (1 if key.startswith("visual") else 2)), key


# --- names and settings ---


def test_file_names_from_elsewhere_become_plain_and_edits_stay(folder_of, small_model, tmp_path):
    first, second = folder_of(ONE), folder_of(TWO)
    (first / "deep" / "er").mkdir(parents=True)
    (first / f"{UNETS[ONE]}.pth").rename(first / "deep" / "er" / "unet.pth")
    (tmp_path / "elsewhere").mkdir()
    (second / f"{UNETS[TWO]}.pth").rename(tmp_path / "elsewhere" / "UNet.pth")
    configure(first, ckpt_unet="deep/er/unet.pth")
    configure(second, ckpt_unet=str(tmp_path / "elsewhere" / "UNet.pth"))
    configure(second, part="model_cfg", steps=7, positive_prompt=", ein Bär \ud83d")  # half a pair
    contents = {**configuration(second), "plugins": ["mine"], "framework": "other"}
    (second / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="halves of surrogate pairs"):
        convert_folder([first, second], tmp_path / "out")
    configure(second, part="model_cfg", positive_prompt=", ein Bär 熊")
    convert_folder([first, second], tmp_path / "out")
    contents = configuration(tmp_path / "out")
    assert contents["model"]["model_args"]["ckpt_unet"] == "unet.safetensors"
    assert contents["video_to_video"]["model_args"]["ckpt_unet"] == f"UNet-{TWO}.safetensors"
    assert contents["video_to_video"]["model_args"]["ckpt_clip"] == f"{CLIP}.bin"
    assert contents["video_to_video"]["model_cfg"]["steps"] == 7
    assert (contents["plugins"], contents["framework"]) == (["mine"], "pytorch")
    assert "Bär 熊" in (tmp_path / "out" / "configuration.json").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "elsewhere")
    for stage in STAGES:
        path = stage_parts(load_settings(tmp_path / "out", stage), tmp_path / "out")["unet"].path
        source = first / "deep" / "er" / "unet.pth" if stage == ONE else small_model[1] / f"{UNETS[TWO]}.pth"
        assert torch.equal(load_file(path)["out.2.weight"], weights(source)["out.2.weight"].half())


def test_names_of_one_stem_are_told_apart_wherever_they_stand(folder_of, tmp_path):
    folder = folder_of(ONE)
    (folder / f"{CLIP}.bin").rename(folder / "model.bin")
    (folder / f"{AUTOENCODER}.ckpt").rename(folder / "model.ckpt")
    contents = configuration(folder)
    del contents["model"]["model_args"]
    contents["model"]["model_cfg"].update(ckpt_clip="model.bin", ckpt_autoencoder="model.ckpt")
    contents["half"] = "\ud83d"  # which only an escape can spell
    (folder / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
    convert_folder(folder, tmp_path / "out")
    contents["model"]["model_cfg"]["ckpt_autoencoder"] = f"model-{ONE}.safetensors"
    assert configuration(tmp_path / "out") == contents
    pipeline(ONE, model=str(tmp_path / "out"), device="cpu")


# --- what cannot be converted ---


def test_a_weight_beyond_the_precision_is_named(folder_of, tmp_path):
    folder = folder_of(ONE)
    unet = folder / f"{UNETS[ONE]}.pth"

    values = torch.tensor([65519.0, -65520.0])
    edit_weights(unet, lambda tensors: tensors["out.2.bias"][:2].copy_(values))
    with pytest.raises(CheckpointError) as caught:
        convert_folder(folder, tmp_path / "out")
    assert str(caught.value) == (
        f"The weights file '{unet}' cannot be used: 1 of its weights are not finite ('out.2.bias'); the "
        "first holds 65520, and fp16 goes up to 65504: use precision bf16 or fp32."
    )
    assert not (tmp_path / "out").exists()
    convert_folder(folder, tmp_path / "out", "bf16")
    converted = load_file(tmp_path / "out" / f"{UNETS[ONE]}.safetensors")["out.2.bias"]
    assert converted[:2].tolist() == [65536, -65536]


def test_weights_folders_and_precisions_that_do_not_fit(folder_of, small_model, combined, tmp_path):
    first, second = small_model
    speech, misfit, missing = (folder_of(ONE, name) for name in ("speech", "misfit", "missing"))
    contents = configuration(speech)
    (speech / "configuration.json").write_text(json.dumps({**contents, "task": "text-to-speech"}))
    edit_weights(misfit / f"{UNETS[ONE]}.pth", lambda tensors: tensors.pop("out.2.bias"))
    (missing / f"{UNETS[ONE]}.pth").unlink()
    for sources, precision, error, words in [
        ([first, first], "fp16", InvalidInputError, f"'{first}' and '{first}' both describe image-to-video"),
        ([second, combined], "fp16", InvalidInputError, f"'{combined}' both describe video-to-video"),
        ([first, second, combined], "fp16", InvalidInputError, "one of each stage; got 3"),
        ([], "fp16", InvalidInputError, "one of each stage; got 0"),
        (speech, "fp16", ConfigurationError, "neither image-to-video nor video-to-video, but 'text-to-sp"),
        (tmp_path / "none", "fp16", MissingFileError, "there is no such folder"),
        (first, "auto", InvalidInputError, "precision: got 'auto', allowed is one of fp16, bf16, fp32"),
        (misfit, "fp16", CheckpointError, "1 missing keys ('out.2.bias')"),
        (missing, "fp16", MissingFileError, f"{UNETS[ONE]}.pth"),
    ]:
        with pytest.raises(error) as caught:
            convert_folder(sources, tmp_path / "out", precision)
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_no_new_folder_can_be_is_refused_before_any_work(folder_of, tmp_path):
    folder = folder_of(ONE)
    for path in folder.glob("*.*[!n]"):  # all weights: whoever looked at them would miss them
        if path.suffix != ".json":
            path.unlink()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for output, words in [
        (folder, f"cannot write '{folder}': it is, or is in, the model folder '{folder}'"),
        (folder / "sub" / "folder", "it is, or is in, the model folder"),
        (tmp_path / "link" / "sub", "it is, or is in, the model folder"),
        (tmp_path / "full", "it is not empty, it holds '.hidden'; give a new folder, or empty it"),
        (tmp_path / "file", "it is a file, not a folder"),
        (tmp_path / "file" / "sub", "Not a directory"),
        ("", "it is empty"),
        ("a\0b", "null"),
        ("https://a.b/c", "it is a URL"),
        (None, "cannot write to a NoneType"),
    ]:
        with pytest.raises(OutputError) as caught:
            convert_folder(folder, output)
        assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(MissingFileError):  # nothing else stood in the way
        convert_folder(folder, tmp_path / "out")


def test_too_little_disk_is_said_before_anything_is_written(small_model, tmp_path, monkeypatch):
    size = convert_folder(small_model[0], tmp_path / "first").size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    words = rf"cannot write '.*second': it will take [\d.]+ MB, and {size / 1e6:.2f} MB are free"
    with pytest.raises(OutputError, match=words):
        convert_folder(small_model[0], tmp_path / "second")
    assert names(tmp_path) == ["first"]


# --- nothing is left behind ---


@pytest.mark.parametrize(
    ("tensors", "is_there"),
    [(1, True), (300, False)],  # in CLIP's file and the UNet's
)
def test_an_interrupt_leaves_nothing(small_model, tmp_path, monkeypatch, tensors, is_there):
    output = tmp_path / "new" / "folder"
    if is_there:
        output.mkdir(parents=True)
    calls = []

    def interrupt(bar: tqdm, count: int = 1) -> None:
        calls.append(count)
        if len(calls) == tensors:
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(small_model[0], output)
    assert len(calls) == tensors
    assert sorted(tmp_path.rglob("*")) == ([output.parent, output] if is_there else [])
    monkeypatch.undo()
    convert_folder(small_model[0], output)  # nothing stands in the way of the next


def test_a_full_disk_leaves_nothing(small_model, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = convert_folder(small_model[0], tmp_path / "whole")
    sizes = sorted(file.size for file in done.files)
    for limit in (4, sizes[0], sizes[-1] - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match=r"cannot write '.*out': .*File too large"):
                convert_folder(small_model[0], tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["whole"]


# --- the command ---


def test_the_command_says_what_it_wrote(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = map(str, small_model)
    assert main(["convert", second, first, "out", "--precision", "bf16", "--progress"]) == 0
    captured = capsys.readouterr()
    *files, last = captured.out.splitlines()
    assert [line.partition(":")[0] for line in files] == [
        f"out/{stem}.safetensors" for stem in (CLIP, AUTOENCODER, *UNETS.values())
    ]
    assert files[0].endswith(" MB, CLIP for image-to-video and video-to-video")
    assert files[3].endswith(" MB, UNet for video-to-video")
    # The two files that are the same in both folders are links, and so there once.
    before = [*small_model[0].iterdir(), small_model[1] / f"{UNETS[TWO]}.pth"]
    before = sum(path.stat().st_size for path in before if path.suffix != ".json") / 1e6
    now = sum(path.stat().st_size for path in Path("out").glob("*.safetensors")) / 1e6
    assert last == (
        "out: a model for image-to-video and video-to-video: "
        f"{before:.2f} MB of weights before, {now:.2f} MB now"
    )
    assert "converting: 100%" in captured.err
    with open_checkpoint(Path("out") / f"{UNETS[ONE]}.safetensors") as checkpoint:
        assert {stored.dtype for stored in checkpoint.values()} == {torch.bfloat16}


def test_the_commands_faults(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = map(str, small_model)
    Path("full").mkdir()
    Path("full", "file").write_text("mine")
    for arguments, code, words in [
        ([first], 2, "required: OUT"),
        ([first, second, "out", "more"], 2, "unrecognized arguments: more"),
        ([first, "out", "--precision", "half"], 2, "precision: got 'half', allowed is one of fp16, bf16"),
        ([first, first, "out"], 2, "both describe image-to-video"),
        (["none", "out"], 2, "none/configuration.json: there is no such folder"),
        ([first, "full"], 1, "cannot write 'full': it is not empty, it holds 'file'"),
    ]:
        assert main(["convert", *arguments]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and captured.out == ""
        assert words in captured.err.splitlines()[-1]
    assert names(tmp_path) == ["full"]


def test_adapters_are_merged_each_into_its_stage(small_model, combined, picture, tmp_path):
    """What is written gives the video that its source gives with them."""
    paths = {stage: tmp_path / f"{stage}.safetensors" for stage in STAGES}
    for stage, model in zip(STAGES, small_model):
        unet = trained(built(load_settings(model, stage).unet))
        save_adapter(unet, paths[stage], {"stage": stage} if stage == TWO else {})
    output = tmp_path / "merged"
    convert_folder(combined, output, "bf16", lora=[paths[TWO], paths[ONE]], lora_scale=[0.5, 2])
    call = {"seed": 1, "steps": 1, "max_frames": 2, "resolution": (32, 32)}
    stage, source = (ImageToVideo.load(folder, "cpu", precision="bf16") for folder in (output, combined))
    expected = source(picture, **call, lora=paths[ONE], lora_scale=2).frames
    assert np.array_equal(stage(picture, **call).frames, expected)
    assert not np.array_equal(source(picture, **call).frames, expected)
    with safe_open(output / f"{UNETS[TWO]}.safetensors", "pt") as file:
        [origin] = json.loads(file.metadata()["lora"])
    assert (origin["name"], origin["scale"]) == (f"{TWO}.safetensors", 0.5)
    assert (output / f"{CLIP}.safetensors").read_bytes() == (combined / f"{CLIP}.safetensors").read_bytes()


def test_an_adapter_that_fits_no_stage_is_refused(small_model, tmp_path, capsys):
    save_adapter(trained(built(load_settings(small_model[1], TWO).unet)), tmp_path / "a", {"stage": TWO})
    arguments = ["convert", str(small_model[0]), str(tmp_path / "out")]
    assert main([*arguments, "--lora", str(tmp_path / "a"), "--lora-scale", "0.5"]) == 1
    assert f"it was trained for {TWO}, and this is {ONE}" in capsys.readouterr().err
    assert main([*arguments, "--lora", "nowhere"]) == 2
    assert not (tmp_path / "out").exists()


# ModelScope's convention for models with code

_LOADED = """
import sys
from modelscope.pipelines import pipeline
pipe = pipeline("image-to-video", model=sys.argv[1], device="cpu", trust_remote_code=True)
print(type(pipe).__module__)
try:
    pipeline("image-to-video", model=sys.argv[1], device="cpu")
except RuntimeError as error:
    print("trust_remote_code" in str(error))
"""


@pytest.mark.slow
def test_a_folder_with_code_loads_without_the_start_up_hook(small_model, tmp_path):
    """And is refused by ModelScope itself where its code is not trusted."""
    folder = tmp_path / "out"
    assert main(["convert", str(small_model[0]), str(folder), "--allow-remote"]) == 0
    assert len((folder / "ms_wrapper.py").read_text().splitlines()) == 2
    assert json.loads((folder / "configuration.json").read_text())["allow_remote"] is True
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, str(folder)],
        env={**os.environ, "MODELSCOPE_I2V_AUTOLOAD": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-2:] == ["modelscope_i2v.plugin.pipelines", "True"], done.stderr[-2000:]
