"""The command line: what it makes, what it says, and with which code it ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modelscope_i2v import __version__, cli
from modelscope_i2v.cli import main
from modelscope_i2v.cli.stages import StageRun
from modelscope_i2v.engine.precision import select_dtype
from modelscope_i2v.engine.progress import Progress
from modelscope_i2v.engine.stage import Stage
from modelscope_i2v.media.video import read_video, write_video
from modelscope_i2v.settings.stages import PRECISION_CHOICES, call_settings
from modelscope_i2v.weights.loading import precision_name

ROOT = Path(__file__).resolve().parent.parent
FIRST_SIZE, SECOND_SIZE = (64, 128), (80, 128)  # of TINY_SETTINGS: height, width


@pytest.fixture
def model(small_model) -> list[str]:
    """The arguments that name stage one's folder."""
    return ["--model", str(small_model[0])]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """What a command leaves where it should not is found there."""
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.delenv("MODELSCOPE_LOG_LEVEL", raising=False)
    yield folder
    assert not list(temporary.iterdir())


def fails(capsys, arguments: list[str], code: int = 2) -> str:
    """What a failing command says: one line on stderr (after argparse's usage lines), and no traceback."""
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err
    assert lines[-1].startswith("modelscope-i2v")
    assert ": error: " in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage: "), captured.err
    return lines[-1]


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- usage ---


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_has_help(command, capsys):
    assert main(["--help"]) == main([command, "--help"]) == 0
    everything, shown = capsys.readouterr().out.split(f"usage: modelscope-i2v {command}")
    assert f"\n    {command} " in everything and "--debug" in shown


def test_help_names_what_is_allowed(capsys):
    main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for choices in (PRECISION_CHOICES, ("ddim", "dpmpp"), ("fast", "normal"), ("auto", "sdpa", "xformers")):
        assert f" {{{','.join(choices)}}} " in shown


def test_every_keyword_of_a_call_has_a_flag(capsys):
    shown = {}
    for command in ("generate", "preview"):
        main([command, "--help"])
        shown[command] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    first, second = (call_settings(stage) for stage in ("image-to-video", "video-to-video"))
    flags = {name: f"--{each.flag}" for name, each in {**first, **second}.items()}
    flags = {name: flag for name, flag in flags.items() if name not in ("callback", "generator")}
    assert shown["generate"] >= set(flags.values())
    assert shown["preview"] >= {flag for name, flag in flags.items() if name in first and name != "seed"}
    own = {name: flag for name, flag in flags.items() if {name} <= first.keys() & second.keys()}
    refine = {flag.replace("--", "--refine-") for name, flag in own.items() if not second[name].both}
    assert shown["generate"] >= refine


def test_flags_reach_the_stage_that_they_are_for(monkeypatch, capsys, small_model, model, picture):
    made = []
    monkeypatch.setattr(StageRun, "run", lambda self, *args: made.append(self.keywords))
    monkeypatch.setattr(StageRun, "load", lambda self: lambda *_, **keywords: made.append(keywords))
    one = "--noise-strength 0.5 --guidance-interval 5-800 --chunk-size 3 --overlap-size 1 --reuse-interval 2"
    two = "--text a --positive-prompt b --negative-prompt c --total-noise-levels 5 --solver-mode normal"
    two += " --guide-rescale 0.5 --refine-frames 3 --refine-guide-scale 2 --refine-guidance-interval 1-2"
    command = ["generate", str(picture), "-o", "out.mp4", *model, "--seed", "3", "--fps", "9", *one.split()]
    assert main([*command, "--refine", str(small_model[1]), *two.split()]) == 0
    both = {"seed": 3, "target_fps": 9, "reuse_interval": 2}
    assert made == [
        {**both, "noise_strength": 0.5, "guidance_interval": (5, 800), "chunk_size": 3, "overlap_size": 1},
        {
            **both, "text": "a", "positive_prompt": "b", "negative_prompt": "c", "total_noise_levels": 5,
            "solver_mode": "normal", "guide_rescale": 0.5, "max_frames": 3, "guide_scale": 2.0,
            "guidance_interval": (1, 2),
        },
    ]  # fmt: skip


def test_help_is_quick_and_imports_nothing_heavy():
    def seconds(code: str) -> tuple[float, str]:
        start = os.times()
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        end = os.times()  # of the processor: others may be using the machine
        used = end.children_user + end.children_system - start.children_user - start.children_system
        return used, done.stderr

    shown = "import sys; from modelscope_i2v.cli import main; code = main(['generate', '--help']); "
    listed = shown + "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    code, *modules = seconds(listed)[1].split()
    assert code == "0"
    assert "argparse" in modules
    assert not {"torch", "modelscope", "numpy", "PIL", "av", "tqdm"} & set(modules)
    least = min(seconds("import argparse")[0] for _ in range(3))
    assert min(seconds(shown)[0] for _ in range(3)) < 2 * least + 0.3


def test_running_the_package_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "modelscope_i2v", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"modelscope-i2v {__version__}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["generate", "x.png"], "--output"),
        (["generate", "x.png", "-o", "y.mp4", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["generate", "x.png", "-o", "y.mp4", "--size", "448"], "got '448', allowed is WIDTHxHEIGHT"),
        (["generate", "x.png", "-o", "y.mp4", "--text", "a cat"], "there is no stage two for --text"),
        (["generate", "x.png", "-o", "y.mp4", "--keep-first", "z.mp4", "--refine-steps", "3"],
         "for --refine-steps, --keep-first"),
        (["generate", "x.png", "-o", "y.mp4", "--refine", "--keep-first", "./y.mp4"], "the same file"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments, words, capsys, in_an_empty_folder):
    assert words in fails(capsys, arguments)
    assert everything_below(in_an_empty_folder) == []


# --- generate ---


def test_generate_one_stage(model, picture, capsys):
    options = (
        "--seed 9 --steps 3 --guide-scale 4.5 --frames 3 --size 72x64 --fps 12 --precision fp32 --device cpu"
    )
    assert main(["generate", str(picture), "-o", "new folder/é.mov", *model, *options.split()]) == 0
    video = read_video("new folder/é.mov")
    assert (video.frames.shape, video.fps) == ((3, 64, 72, 3), 12)
    made = [video.metadata[name] for name in ("stage", "seed", "steps", "guide_scale", "precision")]
    assert made == ["image-to-video", "9", "3", "4.5", "fp32"]
    captured = capsys.readouterr()
    assert captured.out.startswith("new folder/é.mov: 3 frames of 72x64 at 12 fps, seed 9 (")
    assert captured.err == ""  # no logs, and no bar where there is no terminal
    assert main(["generate", str(picture), "-o", "out.mp4", *model, "--progress"]) == 0
    assert "image-to-video: 100%" in capsys.readouterr().err
    assert read_video("out.mp4").frames.shape == (4, *FIRST_SIZE, 3)


def test_generate_two_stages(small_model, model, picture, capsys):
    options = ["--refine", str(small_model[1]), "--text", "a red boat", "--refine-steps", "3", "--fps", "10"]
    options += ["--refine-size", "136x96", "--keep-first", "first.mp4", "--seed", "7"]
    assert main(["generate", str(picture), "-o", "final.mp4", *model, *options]) == 0
    first, final = read_video("first.mp4"), read_video("final.mp4")
    assert first.frames.shape == (4, *FIRST_SIZE, 3)
    assert final.frames.shape == (4, 96, 136, 3)
    assert first.fps == final.fps == 10
    assert (first.metadata["seed"], first.metadata["steps"]) == ("7", "2")
    made = [final.metadata[name] for name in ("stage", "seed", "steps", "text")]
    assert made == ["video-to-video", "7", "3", "a red boat"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["first.mp4", "final.mp4"]


def test_refine_uses_a_folder_that_describes_both_stages(small_model, picture, in_an_empty_folder):
    for folder in reversed(small_model):
        shutil.copytree(folder, "both", dirs_exist_ok=True)
    contents, second = (json.loads((path / "configuration.json").read_text()) for path in small_model)
    Path("both/configuration.json").write_text(json.dumps({**contents, "video_to_video": second["model"]}))
    assert main(["generate", str(picture), "-o", "out.mp4", "--model", "both", "--refine"]) == 0
    assert read_video("out.mp4").frames.shape == (4, *SECOND_SIZE, 3)
    assert sorted(os.listdir()) == ["both", "out.mp4"]


# --- generate: faults, all found before a model is loaded ---


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("modelscope_i2v.engine.stage.load_weights", load)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "steps: got 0, allowed is a whole number from 1"),
        (["--size", "4x4"], "resolution: got [4, 4]"),
        (["--precision", "half"], "precision: got 'half', allowed is one of auto, fp32"),
        (["--device", "tpu"], "--device: got 'tpu', allowed are cpu"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', but torch finds"),
        (["--model", "no/such/folder"], "no folder 'no/such/folder'"),
        (["--model", "."], "configuration.json: there is no such file"),
        (["--refine", "./no-folder"], "no folder './no-folder'"),
        (["--refine", "SECOND", "--refine-steps", "0"], "steps: got 0"),
        (["--refine", "FIRST"], "describes image-to-video, not video-to-video"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options, words, small_model, model, picture, capsys, nothing_is_loaded, in_an_empty_folder
):
    folders = {"FIRST": small_model[0], "SECOND": small_model[1]}
    options = [folders.get(option, option) for option in options]
    assert words in fails(capsys, ["generate", picture, "-o", "out.mp4", *model, *options])
    assert everything_below(in_an_empty_folder) == []


def test_faulty_images(model, capsys, nothing_is_loaded, in_an_empty_folder):
    Path("text.png").write_text("not an image")
    for image, words in [
        ("missing.png", "'missing.png'"),
        ("text.png", "it seems to be a text"),
        (".", "is a folder"),
    ]:
        assert words in fails(capsys, ["generate", image, "-o", "out.mp4", *model])
    assert everything_below(in_an_empty_folder) == ["text.png"]


def test_faulty_outputs(model, small_model, picture, capsys, nothing_is_loaded, in_an_empty_folder):
    Path("file").write_text("mine")
    Path("folder").mkdir()
    before = everything_below(in_an_empty_folder)
    generate = ["generate", picture, *model]
    assert "file/out.mp4" in fails(capsys, [*generate, "-o", "file/out.mp4"], code=1)
    assert "it is a folder" in fails(capsys, [*generate, "-o", "folder"], code=1)
    assert "'.webm'" in fails(capsys, [*generate, "-o", "out.webm"], code=1)
    refine = ["--refine", small_model[1], "--keep-first", "file/first.mp4"]
    assert "file/first.mp4" in fails(capsys, [*generate, "-o", "out.mp4", *refine], code=1)
    assert everything_below(in_an_empty_folder) == before
    assert Path("file").read_text() == "mine"


def test_a_missing_and_a_damaged_weights_file(small_model, model, picture, capsys, in_an_empty_folder):
    """A missing one of stage two is found before stage one runs."""
    shutil.copytree(small_model[1], "second")
    unet = Path("second/non_ema_0035000.pth")
    options = "-o out.mp4 --refine second --keep-first first.mp4 --steps 1".split()
    arguments = ["generate", picture, *model, *options]
    os.truncate(unet, unet.stat().st_size // 2)
    assert unet.name in fails(capsys, arguments, code=1)
    Path("first.mp4").unlink()
    unet.unlink()
    assert unet.name in fails(capsys, arguments)
    assert os.listdir() == ["second"]


def test_debug_shows_where_an_error_comes_from(capsys):
    assert main(["generate", "missing.png", "-o", "out.mp4", "--debug"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert captured.err.splitlines()[-1].startswith("modelscope-i2v: error: ")


def test_models_of_the_hub(picture, capsys, monkeypatch, small_model, nothing_is_loaded):
    asked = []

    def download(model, revision=None):
        asked.append((model, revision))
        if "Image" in model:
            return str(small_model[0])
        raise ConnectionError("no\nroute")

    hub = importlib.import_module("modelscope.hub.snapshot_download")
    monkeypatch.setattr(hub, "snapshot_download", download)
    message = fails(capsys, ["generate", picture, "-o", "out.mp4", "--refine"])
    assert asked == [("damo/Image-to-Video", "v1.1.0"), ("damo/Video-to-Video", "v1.1.0")]
    assert "'damo/Video-to-Video'" in message
    assert "no route" in message
    fails(capsys, ["generate", picture, "-o", "out.mp4", "--model", "someone/Video-thing"])
    assert asked[-1] == ("someone/Video-thing", None)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "modelscope-i2v: interrupted\n"),
        (MemoryError(), 1, "modelscope-i2v: error: video-to-video, denoising: out of memory on cpu"),
        (torch.cuda.OutOfMemoryError("full"), 1, "error: video-to-video, denoising: out of memory on cpu"),
    ],
)
def test_a_run_that_is_broken_off_leaves_nothing(
    error, code, words, small_model, model, picture, capsys, monkeypatch, in_an_empty_folder
):
    def decode(self, latents, request, *args, **kwargs):
        if self.name == "image-to-video":
            return decode_latents(self, latents, request, *args, **kwargs)
        with self._phase("denoising", Progress(), request, 1, self.unet):
            raise error

    decode_latents = Stage.decode
    monkeypatch.setattr(Stage, "decode", decode)
    assert main(["generate", str(picture), "-o", "out.mp4", *model, "--refine", str(small_model[1])]) == code
    captured = capsys.readouterr()
    assert captured.err.endswith(words) or words in captured.err
    assert "Traceback" not in captured.err
    assert everything_below(in_an_empty_folder) == []


def test_a_bug_is_not_hidden(monkeypatch, picture):
    monkeypatch.setattr("modelscope_i2v.media.images.open_image", lambda source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(picture), "-o", "out.mp4"])


def test_an_output_that_nobody_reads():
    code = """if True:
        import sys
        from modelscope_i2v import cli
        from modelscope_i2v.cli import command
        speak = command.Command("speak", "", lambda parser: None, lambda arguments: command.echo("something"))
        cli.COMMANDS = (speak,)
        sys.exit(cli.main(["speak"]))
    """
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# --- info, preview, doctor ---


def test_a_video_says_how_it_was_made_and_is_made_again(
    model, small_model, picture, capsys, in_an_empty_folder
):
    refine = ["--refine", str(small_model[1])]
    options = ["--seed", "5", "--steps", "3", "--text", "a boat", "--refine-steps", "1"]
    assert main(["generate", str(picture), "-o", "one.mp4", *model, *refine, *options]) == 0
    assert main(["generate", str(picture), "-o", "two.mp4", *model, *refine, "--like", "one.mp4"]) == 0
    assert Path("one.mp4").read_bytes() == Path("two.mp4").read_bytes()
    assert main(["generate", str(picture), "-o", "three.mp4", *model, "--like", "one.mp4", *refine,
                 "--refine-steps", "2"]) == 0  # what is spelled out goes first  # fmt: skip
    assert [read_video("three.mp4").metadata[name] for name in ("steps", "text")] == ["2", "a boat"]
    capsys.readouterr()
    assert main(["info", "one.mp4"]) == 0
    second, first = capsys.readouterr().out.split("\nof a video that was made so:\n")
    lines = ("seed: 5", "stage: video-to-video", "text: a boat", "resolution: 128x80", "mode: exact")
    assert all(f"{line}\n" in second for line in lines)
    assert "model: Image-to-Video\n" in first and "resolution: 128x64\n" in first
    write_video(np.zeros((1, 16, 16, 3), np.uint8), "other.mp4")
    assert "says nothing of how it was made" in fails(capsys, ["info", "other.mp4"])
    assert "no-such.mp4" in fails(capsys, ["info", "no-such.mp4"])


def test_preview_writes_a_video_for_each_seed(model, picture, capsys, in_an_empty_folder):
    assert main(["preview", str(picture), "-o", "previews", "--seeds", "1,2", "--steps", "1", *model]) == 0
    assert sorted(os.listdir("previews")) == ["contact_sheet.png", "seed_1.mp4", "seed_2.mp4"]
    assert "2 videos" in capsys.readouterr().out
    assert "--seeds" in fails(capsys, ["preview", str(picture), "-o", "x", "--seeds", "1,b", *model])
    assert "seed: got -1" in fails(capsys, ["preview", str(picture), "-o", "x", "--seeds=-1", *model])


def test_doctor_says_what_is_there_and_what_is_wrong(small_model, capsys, in_an_empty_folder):
    precision = precision_name(select_dtype("auto", torch.device("cpu")))
    main(["doctor", str(small_model[1])])
    shown = capsys.readouterr().out
    for words in ("torch", "cpu", precision, "sdpa_attention", "non_ema_0035000.pth", "weights of the unet"):
        assert words in shown
    assert "-> download" not in shown
    assert "behind ModelScope's image-to-video and video-to-video tasks" in shown

    shutil.copytree(small_model[1], "model")
    unet = Path("model", "non_ema_0035000.pth")
    os.truncate(unet, unet.stat().st_size // 2)
    assert main(["doctor", "model"]) == 1
    shown = capsys.readouterr()
    assert "! video-to-video: non_ema_0035000.pth" in shown.out and "-> download it again" in shown.out
    assert "found" in shown.err
    unet.unlink()
    main(["doctor", "model"])
    assert "no weights file 'non_ema_0035000.pth'" in capsys.readouterr().out
    main(["doctor", "no-folder"])
    assert "no such folder" in capsys.readouterr().out
