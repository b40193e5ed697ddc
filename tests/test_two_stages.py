"""Both stages in one call, previews, and the record of how a video was made."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from PIL import Image

from modelscope_i2v.errors import ConfigurationError, InvalidInputError
from modelscope_i2v.media.contact_sheet import contact_sheet
from modelscope_i2v.media.video import read_metadata, read_video
from modelscope_i2v.plugin.pipelines import VideoToVideoPipeline
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.record import FIRST_STAGE, from_metadata, keywords_like
from modelscope_i2v.settings.stages import ImageToVideoSettings, VideoToVideoSettings


@pytest.fixture(scope="module")
def both(small_model):
    return pipeline("image-to-video", model=str(small_model[0]), device="cpu", refine=str(small_model[1]))


@pytest.fixture(scope="module")
def combined(small_model, tmp_path_factory) -> Path:
    """One folder with the weights of both stages, and the repository's configuration.json, made small."""
    folder = tmp_path_factory.mktemp("combined")
    for stage in small_model:
        for path in stage.iterdir():
            shutil.copy(path, folder)
    configuration = json.loads((ROOT / "configuration.json").read_text(encoding="utf-8"))
    for section, stage in (("model", small_model[0]), ("video_to_video", small_model[1])):
        small = json.loads((stage / "configuration.json").read_text(encoding="utf-8"))
        configuration[section]["model_cfg"].update(small["model"]["model_cfg"])
    (folder / "configuration.json").write_text(json.dumps(configuration), encoding="utf-8")
    return folder


def test_refining_gives_stage_two_of_stage_ones_frames(both, small_model, picture, tmp_path):
    path = tmp_path / "out.mp4"
    keywords = {"refine": True, "text": "a boat", "seed": 5, "keep_first": True, "refine_steps": 1}
    result = both(str(picture), output_video=str(path), **keywords)
    assert result[OutputKeys.OUTPUT_VIDEO] == str(path)
    assert result["first_video"] == str(tmp_path / "out.i2v.mp4")
    assert read_video(result["first_video"]).frames.shape == (4, 64, 128, 3)
    made = [result[name] for name in ("stage", "seed", "steps", "text")]
    assert made == ["video-to-video", 5, 1, "a boat"] and result[FIRST_STAGE]["steps"] == 2

    # The same by hand: stage one's frames as they are, not as the kept file has them, which are compressed.
    first = both.preview(str(picture), seeds=[5])["videos"][0]
    assert Path(result["first_video"]).read_bytes() == first[OutputKeys.OUTPUT_VIDEO]
    second = pipeline("video-to-video", model=str(small_model[1]), device="cpu")
    video = both.generate(str(picture), seed=5)
    by_hand = second({"video_path": video, "text": "a boat"}, seed=5, steps=1)
    assert path.read_bytes() == by_hand[OutputKeys.OUTPUT_VIDEO]


def test_the_same_autoencoder_is_held_once(both, small_model, tmp_path):
    first, second = both.model, both._second_stage.model
    assert first.autoencoder is second.autoencoder
    other = pipeline("video-to-video", model=str(small_model[1]), device="cpu").model
    other.autoencoder.decoder.conv_out.bias += 1
    kept = other.autoencoder
    other.stage.share_autoencoder(first.stage)
    assert other.autoencoder is kept


def test_one_folder_for_both_stages(combined, both, picture, monkeypatch):
    """Stage two is loaded when it is first needed, once, by however many threads."""
    made, build = [], VideoToVideoPipeline.__init__
    monkeypatch.setattr(
        VideoToVideoPipeline, "__init__", lambda *args, **kwargs: made.append(args) or build(*args, **kwargs)
    )
    pipe = pipeline("image-to-video", model=str(combined), device="cpu")
    assert not made
    with ThreadPoolExecutor(2) as threads:
        refined = [threads.submit(pipe, str(picture), refine=True) for _ in range(2)]
        videos = [each.result()[OutputKeys.OUTPUT_VIDEO] for each in refined]
    assert len(made) == 1
    expected = read_video(both(str(picture), refine=True)[OutputKeys.OUTPUT_VIDEO]).frames
    assert all(np.array_equal(read_video(video).frames, expected) for video in videos)
    assert pipeline("video-to-video", model=str(combined), device="cpu").model.cfg.stage == "video-to-video"


def test_the_repositorys_configuration_has_the_reference_settings():
    assert load_settings(ROOT, "image-to-video") == ImageToVideoSettings(seed=666)
    assert load_settings(ROOT, "video-to-video") == VideoToVideoSettings(seed=666)


def test_refused_refinements(small_model, both, picture, tmp_path):
    plain = pipeline("image-to-video", model=str(small_model[0]), device="cpu")
    with pytest.raises(ConfigurationError, match="describes no second stage; give its folder or its id"):
        plain(str(picture), refine=True)
    calls = []
    for keywords, message in (
        ({"refine_steps": 0}, "steps: got 0"),
        ({"refine_stepz": 1}, "no keyword 'refine_stepz'; did you mean 'refine_steps'"),
        ({"total_noise_levels": 0}, "total_noise_levels: got 0"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            both(str(picture), refine=True, callback=lambda *step: calls.append(step), **keywords)
    assert not calls


def test_a_preview_shows_each_seed_and_writes_what_refining_would_start_from(both, picture, tmp_path):
    shown = both.preview(str(picture), seeds=[1, 2], output_folder=tmp_path / "previews", steps=1)
    assert [video["seed"] for video in shown["videos"]] == [1, 2]
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["contact_sheet.png", "seed_1.mp4", "seed_2.mp4"]
    one, two = (read_video(video[OutputKeys.OUTPUT_VIDEO]).frames for video in shown["videos"])
    assert not np.array_equal(one, two)
    again = both(str(picture), seed=2, steps=1)[OutputKeys.OUTPUT_VIDEO]
    assert Path(shown["videos"][1][OutputKeys.OUTPUT_VIDEO]).read_bytes() == again
    assert Image.open(tmp_path / "previews" / "contact_sheet.png").size == shown["contact_sheet"].size
    with pytest.raises(InvalidInputError, match="seeds: at least one"):
        both.preview(str(picture), seeds=[])


def test_a_contact_sheet_has_a_row_of_evenly_spaced_frames_for_each_video():
    shades = np.arange(7, dtype=np.uint8)[:, None, None, None] * 30
    frames = np.broadcast_to(shades, (7, 16, 32, 3))
    sheet = np.asarray(contact_sheet([("a", frames), ("b", frames[::-1])], width=32))
    first_row = [sheet[30, 4 + 36 * column + 16, 0] for column in range(4)]
    assert first_row == [0, 60, 120, 180]
    second_row = [sheet[30 + 36, 4 + 36 * column + 16, 0] for column in range(4)]
    assert second_row == [180, 120, 60, 0]


def test_a_files_record_makes_the_video_again(both, picture, tmp_path):
    path = tmp_path / "video.mp4"
    result = both(str(picture), output_video=str(path), steps=3, seed=9, guide_scale=2.5, resolution=[72, 64])
    record = from_metadata(read_metadata(path))
    for name in ("seed", "steps", "guide_scale", "model", "configuration_sha256", "mode", "precision"):
        assert record[name] == result[name]
    assert record["mode"] == "exact" and record["model"] == "Image-to-Video"
    assert record["resolution"] == [72, 64] == list(result["resolution"])
    keywords, second = keywords_like(read_metadata(path), "video.mp4")
    assert second is None
    assert both(str(picture), **keywords)[OutputKeys.OUTPUT_VIDEO] == path.read_bytes()


def test_a_refined_files_record_makes_the_video_again(both, picture, tmp_path):
    path = tmp_path / "video.mp4"
    both(str(picture), output_video=str(path), seed=3, refine=True, text='"quoted", 3', refine_seed=4)
    first, second = keywords_like(read_metadata(path), "video.mp4")
    assert (first["seed"], second["seed"], second["text"]) == (3, 4, '"quoted", 3')
    again = both(str(picture), refine=True, **first, **{f"refine_{name}": second[name] for name in second})
    assert again[OutputKeys.OUTPUT_VIDEO] == path.read_bytes()


def test_stage_two_keeps_the_record_of_the_file_it_was_given(both, small_model, picture, tmp_path):
    first = both(str(picture), output_video=str(tmp_path / "first.mp4"), seed=8)
    second = pipeline("video-to-video", model=str(small_model[1]), device="cpu")
    result = second({"video_path": first[OutputKeys.OUTPUT_VIDEO]}, output_video=str(tmp_path / "second.mp4"))
    assert result[FIRST_STAGE]["seed"] == 8
    assert keywords_like(read_metadata(tmp_path / "second.mp4"), "second.mp4")[0]["seed"] == 8


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"software": "Lavf"}, "video.mp4: says nothing of how it was made"),
        ({"stage": "video-to-video"}, "from another video, not from an image"),
        ({"stage": "x"}, "names no stage, got 'x'"),
        ({"stage": "image-to-video", "steps": "-1"}, "damaged: steps: got -1"),
        ({"stage": "video-to-video", "first_stage": "3"}, "its record names no stage"),
    ],
)
def test_records_that_cannot_be_followed(entries, message):
    with pytest.raises(InvalidInputError, match=message):
        keywords_like({"software": "modelscope_i2v 1", **entries}, "video.mp4")
