"""The command that scores a video."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from modelscope_i2v import ImageToVideo, metrics
from modelscope_i2v.cli import main
from modelscope_i2v.cli.score import _WORDS
from modelscope_i2v.engine.borders import recorded_borders
from modelscope_i2v.engine.embeddings import ImageEmbedder
from modelscope_i2v.media.images import open_image
from modelscope_i2v.media.video import read_video, write_video
from modelscope_i2v.settings.stages import VideoToVideoSettings
from modelscope_i2v.training.scenes import draw

OF_A_VIDEO = {"temporal_consistency", "motion", "motion_ratio", "flicker", "sharpness"}
FACTS = {"video", "frames", "size", "fps"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> str:
    return write_video(draw(3, frames=10)[0], tmp_path_factory.mktemp("scene") / "scene.mp4", 8, {})


@pytest.fixture
def score(capsys):
    """The JSON that the command prints."""

    def run(*arguments: object) -> dict:
        assert main(["score", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_video_by_itself(score, scene):
    frames = read_video(scene).frames
    found = score(scene)
    assert found.keys() == FACTS | OF_A_VIDEO
    assert (found["frames"], found["size"], found["fps"]) == (10, [160, 96], 8)
    assert found["motion"] == metrics.motion(frames) and found["flicker"] == metrics.flicker(frames)


def test_a_reference_of_another_size_and_length(score, scene, tmp_path):
    frames = read_video(scene).frames
    whole = score(scene, "--reference", scene)
    assert (whole["psnr"], whole["ssim"]) == (100, pytest.approx(1)) and "notes" not in whole
    small = np.stack([np.asarray(Image.fromarray(each).resize((80, 48))) for each in frames[:6]])
    other = score(scene, "--reference", write_video(small, tmp_path / "small.mp4", 8, {}))
    assert 20 < other["psnr"] < 45 and other["motion"] == whole["motion"]
    assert other["notes"] == [
        "frames: 10, and 6 of the reference; the first 6 count",
        "the reference is 80x48: resized to 160x96",
    ]


def test_an_image_with_and_without_a_model(score, scene, tmp_path, small_model):
    frames = read_video(scene).frames
    for name, seed in (("own", 3), ("other", 0)):
        Image.fromarray(draw(seed, frames=1)[0][0]).save(tmp_path / f"{name}.png")
    own, other = (score(scene, "--image", tmp_path / f"{name}.png") for name in ("own", "other"))
    assert own.keys() == FACTS | OF_A_VIDEO | {"thumbnail_similarity"}
    assert own["thumbnail_similarity"] > other["thumbnail_similarity"]
    by_clip = score(scene, "--image", tmp_path / "own.png", "--model", small_model[0], "--device", "cpu")
    embed = ImageEmbedder(small_model[0], "cpu")
    of_frames, [of_image] = embed(frames), embed([open_image(tmp_path / "own.png")])
    expected = metrics.embedding_similarity(of_frames, of_image)
    assert by_clip["clip_image_similarity"] == pytest.approx(expected)
    consistency = metrics.embedding_similarity(of_frames[1:], of_frames[:-1])
    assert by_clip["clip_temporal_consistency"] == pytest.approx(consistency)


def test_embeddings_are_the_stages(small_model, picture):
    stage, embed = ImageToVideo.load(small_model[0], "cpu"), ImageEmbedder(small_model[0], "cpu")
    image = open_image(picture)
    expected = stage.clip_encoder(stage.transform(image)[None]).numpy()
    assert np.array_equal(embed([image]), expected)
    assert np.array_equal(embed([np.asarray(image)]), expected)


def test_an_image_of_another_shape_is_cropped(score, scene, tmp_path):
    Image.new("RGB", (200, 200), "white").save(tmp_path / "square.png")
    found = score(scene, "--image", tmp_path / "square.png")
    assert found["notes"] == ["the image is 200x200: its middle of the video's shape is compared"]
    assert found["thumbnail_similarity"] == 0


def test_borders_are_those_of_the_record_or_of_flags(score, scene, small_model, picture, tmp_path):
    stage = ImageToVideo.load(small_model[0], "cpu", steps=1, resolution=(32, 32))
    path = stage(picture, max_frames=8, chunk_size=4, overlap_size=1).save(tmp_path / "windows.mp4")
    frames = read_video(path).frames
    # Windows from 0, 3 and 4, to 4, 7 and 8.
    assert score(path)["window_seams"] == metrics.seam_score(frames, [3, 4, 7], axis=0)
    assert "window_seams" not in score(scene).keys() | score(scene, "--window", 1).keys()
    found = score(scene, "--window", 6, "--window-overlap", 2, "--tile", 64, "--tile-overlap", 32)
    frames = read_video(scene).frames
    assert found["window_seams"] == metrics.seam_score(frames, [4, 6], axis=0)
    assert found["row_seams"] == metrics.seam_score(frames, [32, 64], axis=1)
    assert found["column_seams"] == metrics.seam_score(frames, [32, 64, 96, 128], axis=2)


def test_borders_of_tiles_are_those_of_the_record():
    """At the published size a tile of 512 pixels has 64 latents and is a part of 90 rows and 160 columns."""
    settings = VideoToVideoSettings()
    entries = {"tile_size": 512, "tile_overlap": 128, "chunk_size": 32, "overlap_size": 8}
    windows, rows, columns = recorded_borders(entries, (48, 720, 1280), settings)
    assert windows == [16, 32]
    assert rows == [8 * (90 - 66), 8 * 66]  # stage two's take 2 rows beyond a multiple of 8
    assert columns == [8 * 48, 8 * 64, 8 * 96, 8 * 112]
    for none in ({"chunk_size": 32, "overlap_size": 8, "scene_cuts": True}, {"tile_size": "x"}, {}):
        assert recorded_borders(none, (48, 720, 1280), settings) == ([], [], [])


def test_seams_at_the_borders_of_tiles_are_seen(score, tmp_path):
    frames = draw(3)[0].astype(int)
    frames[:, :, 80:] += 40
    path = write_video(frames.clip(0, 255).astype(np.uint8), tmp_path / "seamed.mp4", 8, {})
    found = score(path, "--tile", 80, "--tile-overlap", 0)
    assert found["column_seams"] > 3 > found["row_seams"]


def test_words_for_people(scene, capsys):
    assert main(["score", scene, "--reference", scene, "--window", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert set(names) == OF_A_VIDEO | {"psnr", "ssim", "edge_psnr", "block_psnr", "window_seams"}
    assert names.index("psnr") > names.index("motion") and set(names) <= _WORDS.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.mp4"], "nowhere.mp4"),
        (["{scene}", "--image", "nowhere.png"], "nowhere.png"),
        (["{scene}", "--model", "nowhere"], "there is no such folder"),
        (["{scene}", "--window", "0"], "windows or tiles of 0 that share 0: allowed is a size from 1"),
        (["{scene}", "--tile", "8", "--tile-overlap", "8"], "of 8 that share 8"),
        (["{scene}", "--window-overlap", "2"], "--window-overlap says nothing without --window"),
    ],
)
def test_what_cannot_be_scored_is_said(scene, capsys, arguments, words):
    assert main(["score", *(each.format(scene=scene) for each in arguments)]) == 2
    assert words in capsys.readouterr().err
