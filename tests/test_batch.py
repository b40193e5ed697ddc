"""Batches: what is an item, what is made of it, what is skipped, and what a killed run leaves."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_videos import moving_frames

from modelscope_i2v.batch.items import read_items
from modelscope_i2v.batch.making import Models, Options
from modelscope_i2v.batch.results import BatchFolder
from modelscope_i2v.batch.running import run_batch
from modelscope_i2v.cli import main
from modelscope_i2v.engine.stage import Stage
from modelscope_i2v.engine.video_to_video import VideoToVideo
from modelscope_i2v.errors import InvalidInputError, MissingFileError, OutputError
from modelscope_i2v.media.video import write_video

ROOT = Path(__file__).resolve().parents[1]
#: Half the tiny model's frames and steps.
QUICK = {"max_frames": 2, "steps": 1}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with three pictures, one of them below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        picture(folder / name, number)
    (folder / "notes.txt").write_text("no picture")
    return folder


def picture(path: Path, number: int) -> str:
    colours = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(colours).save(path)
    return str(path)


def listed(path: Path, *items: dict) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def results(folder: Path) -> dict[str, dict]:
    """The entries by output; there is one of each."""
    entries = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    by_output = {entry["output"]: entry for entry in entries}
    assert len(by_output) == len(entries)
    return by_output


def files(folder: Path) -> dict[str, bytes]:
    """The videos of a batch by their paths."""
    found = (path for path in sorted(folder.rglob("*.mp4")) if ".batch" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def both(small_model) -> list[str]:
    return ["--model", str(small_model[0]), "--refine", str(small_model[1])]


@pytest.fixture
def models(small_model) -> Models:
    return tiny_models(small_model)


def tiny_models(small_model) -> Models:
    folders = dict(zip(("image-to-video", "video-to-video"), map(str, small_model)))
    return Models(folders, {"device": "cpu"})


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The stages that are loaded, in order, with those that are in memory when one is."""
    loaded, references = [], []
    load = Stage.__init__

    def recorded(self, *args):
        held = [each() for each in references]
        loaded.append("+".join([*(each.name for each in held if each is not None), self.name]))
        references.append(weakref.ref(self))
        load(self, *args)

    monkeypatch.setattr(Stage, "__init__", recorded)
    return loaded


# Items


def test_a_folder_with_what_is_below(pictures, tmp_path):
    out = pictures / "out"
    out.mkdir()
    picture(out / "old.png", 9)
    items = read_items([str(pictures)], str(out), {"seed": 3})
    assert [item.output for item in items] == ["a.mp4", "b.mp4", "more/c.mp4"]
    assert all(item.first == {"seed": 3} and item.second is None for item in items)
    with pytest.raises(InvalidInputError, match="is input and output"):
        read_items([str(pictures)], str(pictures))


def test_a_list_has_keywords_of_its_own(tmp_path):
    path = listed(
        tmp_path / "items.jsonl",
        {"image": "a.png", "seed": 5, "steps": 3, "output": "x/y.mov"},
        {"image": "b.png", "refine": True, "text": "a cat", "refine_steps": 4},
        {"video": "c.mov", "scale": 3, "steps": 6},
        {"image": "https://example.org/d.png?size=large"},
    )
    a, b, c, d = read_items([path], str(tmp_path / "out"), {"seed": 1, "steps": 2, "refine_steps": 8})
    assert (a.source, a.output) == (str(tmp_path / "a.png"), "x/y.mov")
    assert (a.first, a.second) == ({"seed": 5, "steps": 3}, None)
    assert b.first == {"seed": 1, "steps": 2} and b.second == {"seed": 1, "text": "a cat", "steps": 4}
    assert (c.first, c.second, c.output) == (None, {"seed": 1, "steps": 6, "scale": 3.0}, "c.mp4")
    assert (d.source, d.output) == ("https://example.org/d.png?size=large", "d.mp4")


def test_what_each_stage_has_for_itself_goes_to_videos_where_there_is_no_image(tmp_path):
    out = str(tmp_path / "out")
    (item,) = read_items(["a.mp4"], out, {"steps": 3})
    assert item.second == {"steps": 3}
    (item,) = read_items(["a.mp4"], out, {"steps": 3, "refine_steps": 5})
    assert item.second == {"steps": 5}
    image, video = read_items(["b.png", "a.mp4"], out, {"steps": 3, "scale": 2})
    assert (image.first, video.second) == ({"steps": 3}, {"scale": 2.0})


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], r"'.*items.jsonl' is empty"),
        (['{"image": "a.png"}', "{"], "line 2: is no JSON object"),
        (['{"image": "a.png", "image": "b.png"}'], "line 1: .*'image' stands twice"),
        (['{"image": "a.png", "video": "b.mp4"}'], "line 1: an object with image or video"),
        (["[1]"], r"line 1: an object with image or video is needed, got \[1\]"),
        (['{"image": 3}'], "line 1: image: got 3"),
        (['{"image": "a.png", "sede": 3}'], "line 1: an item has no 'sede'; did you mean 'seed'"),
        (['{"image": "a.png", "callback": 3}'], "line 1: an item has no 'callback'"),
        (['{"image": "a.png", "steps": 0}'], "line 1: steps: got 0"),
        (['{"image": "a.png", "text": "a"}'], "line 1: without refine there is no stage two for text"),
        (['{"video": "a.mp4", "solver": "ddim"}'], "line 1: .*no keyword 'solver': image-to-video has it"),
        (['{"image": "a.png", "refine": "yes"}'], "line 1: refine: got 'yes'"),
        (['{"image": "a.png", "output": "../a.mp4"}'], "line 1: output: got '../a.mp4'"),
        (['{"image": "a.png"}', '{"image": "a.png"}'], "line 2 is given twice"),
        (['{"image": "a.png"}', '{"image": "a.jpg"}'], "line 1 and .*line 2 have one output, 'a.mp4'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_with_the_line(lines, words, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises((InvalidInputError, OutputError), match=words):
        read_items([str(path)], str(tmp_path / "out"))


def test_inputs_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="holds no image and no video"):
        read_items([str(tmp_path / "empty")], "out")
    with pytest.raises(MissingFileError, match="the list '.*no.jsonl' does not exist"):
        read_items([str(tmp_path / "no.jsonl")], "out")
    with pytest.raises(InvalidInputError, match="no item takes text: images that are not refined"):
        read_items(["a.png"], "out", {"text": "a cat", "seed": 3})


# Videos


def test_videos_are_those_of_single_calls(pictures, both, small_model, tmp_path, loads, capsys):
    write_video(moving_frames(3, 40, 64), tmp_path / "in.mp4", 25)
    (pictures / "b.jpg").unlink()
    options = ["--seed", "7", "--text", "a boat", "--device", "cpu", "--refine-steps", "1"]
    enhance_options = ["--steps" if each == "--refine-steps" else each for each in options]
    out = tmp_path / "out"
    command = ["batch", str(pictures), str(tmp_path / "in.mp4"), "-o", str(out), *both, *options]
    assert main([*command, "--score"]) == 0
    assert loads == ["image-to-video", "image-to-video+video-to-video"]
    made = files(out)
    assert list(made) == ["a.mp4", "in.mp4", "more/c.mp4"]
    assert main(["generate", str(pictures / "a.png"), "-o", str(tmp_path / "a.mp4"), *both, *options]) == 0
    enhance = ["enhance", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "b.mp4")]
    assert main([*enhance, "--model", str(small_model[1]), *enhance_options]) == 0
    assert made["a.mp4"] == (tmp_path / "a.mp4").read_bytes()
    assert made["in.mp4"] == (tmp_path / "b.mp4").read_bytes()
    entry = results(out)["a.mp4"]
    assert (entry["status"], entry["seed"], entry["frames"], entry["fps"]) == ("done", 7, 4, 8)
    assert entry["source"] == str(pictures / "a.png") and entry["seconds"] > 0
    assert {"thumbnail_similarity", "flicker", "sharpness"} <= entry["scores"].keys()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}/a.mp4: 4 frames of 128x80 at 8 fps, seed 7 (")
    assert f"{out}: 3 items: 3 made, 0 finished before, 0 failed" in lines
    assert [path.name for path in (out / ".batch").iterdir()] == ["results.lock"]


def test_by_stage_each_model_is_loaded_by_itself(pictures, models, tmp_path, loads):
    (pictures / "b.jpg").unlink()
    items = read_items([str(pictures)], "out", {"seed": 3, **QUICK}, refine=True)
    run_batch(items, tmp_path / "one", models)
    assert loads == ["image-to-video", "image-to-video+video-to-video"]
    loads.clear()
    gc.collect()
    run_batch(items, tmp_path / "two", models, Options(by_stage=True))
    assert loads == ["image-to-video", "video-to-video"]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two" / ".batch").iterdir()] == ["results.lock"]


def test_a_failed_item_stops_no_other(pictures, both, tmp_path, capsys):
    (pictures / "b.jpg").write_bytes(b"not a picture")
    items = listed(
        tmp_path / "items.jsonl", {"image": "gone.png"}, {"image": "pictures/a.png", "output": "x.mp4"}
    )
    out = tmp_path / "out"
    assert main(["batch", items, str(pictures), "-o", str(out), *both[:2], "--seed", "1"]) == 1
    assert list(files(out)) == ["a.mp4", "more/c.mp4", "x.mp4"]
    assert files(out)["a.mp4"] == files(out)["x.mp4"]
    found = results(out)
    assert found["gone.mp4"]["error"].startswith("MissingFileError: the image ")
    assert "it seems to be a text" in found["b.mp4"]["error"]
    assert [name for name, entry in found.items() if entry["status"] == "failed"] == ["gone.mp4", "b.mp4"]
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith(f"{out}/gone.mp4: MissingFileError: ")  # before work
    assert captured.err.splitlines()[-1].endswith(f"2 of 5 items failed: see {out}/results.jsonl")


def test_a_model_that_cannot_be_loaded_ends_the_batch(pictures, small_model, tmp_path, capsys):
    command = ["batch", str(pictures), "-o", str(tmp_path / "out"), "--model"]
    assert main([*command, str(small_model[1])]) == 2
    assert "describes video-to-video, not image-to-video" in capsys.readouterr().err
    assert main([*command, str(small_model[0]), "--steps", "2000"]) == 2
    assert not (tmp_path / "out").exists()


# Resuming


def test_what_is_finished_is_skipped_and_all_else_is_made(pictures, models, tmp_path, loads):
    out = tmp_path / "out"

    def run(**keywords) -> tuple[int, int, int]:
        items = read_items([str(pictures)], str(out), {"seed": 3, **QUICK, **keywords})
        counts = run_batch(items, out, models)
        return counts.made, counts.found, counts.failed

    whole = (pictures / "b.jpg").read_bytes()
    (pictures / "b.jpg").write_bytes(b"not a picture")
    assert run() == (2, 0, 1)
    first = files(out)
    (pictures / "b.jpg").write_bytes(whole)
    assert run() == (1, 2, 0)  # the one that failed
    loads.clear()
    assert run() == (0, 3, 0) and loads == []
    (out / "a.mp4").write_bytes(first["a.mp4"][:-1])
    assert run() == (1, 2, 0)  # a file that is not whole
    (out / "more/c.mp4").unlink()
    picture(pictures / "b.jpg", 8)
    assert run() == (2, 1, 0)  # a file that is gone, another input
    assert {name: files(out)[name] for name in first} == first
    assert run(noise_strength=0) == (3, 0, 0)
    assert len(results(out)) == 3


def test_a_line_that_was_cut_counts_for_nothing(tmp_path):
    folder = BatchFolder(tmp_path)
    folder.add({"output": "a.mp4", "status": "done"})
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"output": "b.mp4", "sta')
    assert list(folder.results()) == ["a.mp4"]
    folder.add({"output": "c.mp4", "status": "done"})
    assert list(results(tmp_path)) == ["a.mp4", "c.mp4"]


def test_a_claim_is_of_one_at_a_time(tmp_path):
    one, two = BatchFolder(tmp_path), BatchFolder(tmp_path)
    claim = one.claim("a.mp4")
    assert claim is not None and two.claim("a.mp4") is None
    other = two.claim("b.mp4")
    assert other is not None
    claim.release()
    again = two.claim("a.mp4")
    assert again is not None
    again.release(settled=True)
    other.release(settled=True)
    assert not list((tmp_path / ".batch").iterdir())


def started(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "modelscope_i2v", "batch", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines(folder: Path) -> int:
    try:
        return (folder / "results.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def twelve_items(tmp_path: Path) -> str:
    """A list of ten pictures, one that is none and one that is not there."""
    items = []
    for number in range(12):
        name = f"{number:02}.png"
        if number != 5:
            picture(tmp_path / name, number)
        items.append({"image": name, "seed": number, **QUICK})
    (tmp_path / "07.png").write_bytes(b"not a picture")
    return listed(tmp_path / "items.jsonl", *items)


@pytest.mark.slow
def test_killed_twice_and_shared_by_two_it_ends_as_an_undisturbed_run(models, tmp_path, small_model):
    twelve = twelve_items(tmp_path)
    quiet, out = tmp_path / "quiet", tmp_path / "out"
    counts = run_batch(read_items([twelve], str(quiet)), quiet, models)
    assert (counts.made, counts.failed) == (10, 2)
    arguments = [twelve, "-o", str(out), "--model", str(small_model[0]), "--device", "cpu"]
    for done in (3, 6):
        process = started(arguments)
        wait_for(lambda done=done: lines(out) >= done)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    two = [started(arguments), started(arguments)]
    assert [process.wait() for process in two] == [1, 1]
    assert files(out) == files(quiet)
    assert len(before) >= 3
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    found = results(out)
    assert len(found) == 12  # none twice
    assert sorted(name for name, entry in found.items() if "error" in entry) == ["05.mp4", "07.mp4"]


def test_an_interrupted_run_goes_on_in_the_middle_of_a_video(small_model, models, tmp_path, monkeypatch):
    scenes = np.concatenate([moving_frames(3, 40, 64), 255 - moving_frames(3, 40, 64)])
    write_video(scenes, tmp_path / "in.mp4", 25)
    items = read_items([str(tmp_path / "in.mp4")], "out", {"seed": 3, "steps": 1})
    run_batch(items, tmp_path / "quiet", models)
    sample, sampled = VideoToVideo.sample, []

    def interrupted(self, *args, **keywords):
        sampled.append(self)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return sample(self, *args, **keywords)

    monkeypatch.setattr(VideoToVideo, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_batch(items, tmp_path / "out", models)
    assert not files(tmp_path / "out")
    run_batch(items, tmp_path / "out", models)
    assert len(sampled) == 3  # the first scene was not made again
    assert files(tmp_path / "out") == files(tmp_path / "quiet")
