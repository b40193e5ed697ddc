"""What is trained on: items of folders and rows, clips, buckets of sizes and rates, the cache."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from sample_videos import moving_frames
from training_data import draw_folder

from modelscope_i2v.engine.image_to_video import ImageToVideo
from modelscope_i2v.engine.video_to_video import VideoToVideo
from modelscope_i2v.errors import InvalidInputError, MissingFileError
from modelscope_i2v.media.video import Video
from modelscope_i2v.models.config import UNetConfig
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.cache import TensorCache, content_hash
from modelscope_i2v.training.data import (
    Clip,
    Item,
    clips_of_video,
    fitted,
    nearest_size,
    read_items,
    sizes_near,
)
from modelscope_i2v.training.encoding import EncodedClip, Encoder, draw_clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("data") / "clips")


def encoder_of(small_model, stage, cache, **settings):
    classes = {"image-to-video": (ImageToVideo, 0), "video-to-video": (VideoToVideo, 1)}
    stage_class, number = classes[stage]
    loaded = stage_class.load(small_model[number], "cpu", precision="fp32")
    return Encoder(loaded, TrainingSettings(stage=stage, **settings), TensorCache(cache), CPU)


def test_a_folder_gives_its_videos_and_images_with_captions(folder):
    items = read_items(folder)
    kinds = {item.source.rpartition("/")[2]: item.is_video for item in items}
    assert kinds == {"0.mp4": True, "1.mp4": True, "2.mp4": True, "broken.mp4": True, "3.png": False}
    assert all(item.text.startswith("a ") for item in items if "broken" not in item.source)


def test_rows_give_items():
    video, picture = Video(moving_frames(3), 8.0), Image.new("RGB", (20, 10))
    rows = ({"video": video, "text": "a"}, {"image": picture}, {"video_path": "c.mp4", "caption": "c"})
    items = read_items(row for row in rows)
    assert [(item.source, item.is_video, item.text) for item in items] == [
        (video, True, "a"), (picture, False, ""), ("c.mp4", True, "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "the data set has no video and no image"),
        ([{"text": "a"}], "row 0: either 'video' or 'image' is needed, got text"),
        ([{"video": "a.mp4", "image": "b.png"}], "row 0: either"),
        (["a.mp4"], "row 0: a dict is needed, got 'a.mp4'"),
        (3, "a folder or rows are needed, got 3"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(data, words):
    with pytest.raises(InvalidInputError, match=words):
        read_items(data)


def test_faults_of_a_folder_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="is not there"):
        read_items(tmp_path / "nowhere")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.mp4", "text": "a"}\n{"file": "b.mp4"\n')
    with pytest.raises(InvalidInputError, match="captions.jsonl: line 2"):
        read_items(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes('{"file": "a.mp4", "text": "café"}'.encode("latin-1"))
    with pytest.raises(InvalidInputError, match="captions.jsonl: cannot be read as UTF-8"):
        read_items(tmp_path)


def test_clips_have_the_rate_that_is_wanted_as_near_as_may_be():
    size = (64, 64)
    assert clips_of_video(100, 24.0, size, 8, 8, 3) == [
        Clip(0, 3, 8, 8, size), Clip(24, 3, 8, 8, size), Clip(48, 3, 8, 8, size),
    ]  # fmt: skip
    assert clips_of_video(100, 30.0, size, 8, 8, 1) == [Clip(0, 4, 8, 8, size)]  # 7.5
    assert clips_of_video(16, 24.0, size, 8, 8, 9) == [Clip(0, 2, 8, 12, size)]  # too short at 8
    assert clips_of_video(6, 8.0, size, 8, 8, 9) == [Clip(0, 1, 4, 8, size)]
    assert clips_of_video(1, 8.0, size, 8, 8, 9) == [Clip(0, 1, 1, 8, size)]
    assert clips_of_video(8, 5.0, size, 8, 8, 9) == [Clip(0, 1, 8, 5, size)]
    for count in range(1, 60):
        for clip in clips_of_video(count, 30.0, size, 8, 8, 9):
            assert clip.start + (clip.frames - 1) * clip.stride < count


def test_sizes_are_of_one_area_and_taken_by_the_network_as_they_are():
    for config in (UNetConfig(), UNetConfig(image_conditioned=False, row_padding=2)):
        size = (448, 256) if config.image_conditioned else (1280, 720)
        sizes = sizes_near(size, config, 8)
        assert sizes[0] == size and len(sizes) >= 4
        for width, height in sizes:
            assert config.padded_size(height // 8, width // 8) == (height // 8, width // 8)
            assert width * height == pytest.approx(size[0] * size[1], rel=0.2)
        assert nearest_size((1920, 1080), sizes) == size
        portrait = nearest_size((1080, 1920), sizes)
        assert portrait[0] < portrait[1]


def test_a_frame_covers_its_size_undistorted():
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 40:60] = 255  # a bar as wide as half the height
    shown = fitted(frame, (80, 80))
    assert shown.shape == (80, 80, 3)
    assert (shown[40, :, 0] > 128).sum() == 40 and (shown[:, 40, 0] > 128).all()


def test_latents_and_embeddings_are_computed_once(small_model, folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        first = encoder_of(small_model, "image-to-video", tmp_path).encode(read_items(folder))
    assert [record.getMessage() for record in caplog.records if "broken.mp4" in record.getMessage()]
    assert sorted(each.clip.frames for each in first) == [1, 4, 4, 4]
    tensors = first[0].tensors()
    assert tensors["mean"].shape == tensors["logvar"].shape == (4, 4, 8, 16) and tensors["y"].shape == (1, 64)

    again = encoder_of(small_model, "image-to-video", tmp_path)
    again.stage.autoencoder.encode = again.stage.clip_encoder.forward = None  # nothing may be computed
    assert again.encode(read_items(folder)) == first
    other = encoder_of(small_model, "image-to-video", tmp_path, frames=2, clips=1)
    assert {each.clip.frames for each in other.encode(read_items(folder))} == {1, 2}


def test_a_damaged_entry_is_computed_anew(tmp_path):
    cache, key = TensorCache(tmp_path), {"a": 1}
    assert cache.get(key, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    cache.path(key).write_bytes(b"half")
    assert cache.get(key, lambda: {"x": torch.zeros(2)})["x"].tolist() == [0, 0]
    assert cache.path(key) != cache.path({"a": 2})


def test_content_tells_sources_apart(folder, tmp_path):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((folder / "0.mp4").read_bytes())
    hashes = [content_hash(Item(str(each), True)) for each in (folder / "0.mp4", copy, folder / "1.mp4")]
    assert hashes[0] == hashes[1] != hashes[2]
    black, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white"))
    assert content_hash(Item(black, False)) != content_hash(Item(white, False))


def test_stage_two_is_conditioned_on_the_text_as_in_sampling(small_model, folder, tmp_path):
    encoder = encoder_of(small_model, "video-to-video", tmp_path, size=(128, 80))
    [clip] = encoder.encode(read_items(folder)[:1])
    stage = encoder.stage
    assert torch.equal(clip.tensors()["y"], stage.encode_text(clip.text + stage.positive_prompt)[0])


def test_without_anything_to_read_there_is_an_error(small_model, folder, tmp_path):
    with pytest.raises(InvalidInputError, match="none of 1 videos and images can be read"):
        encoder_of(small_model, "image-to-video", tmp_path).encode([Item(str(folder / "broken.mp4"), True)])


def test_batches_are_of_one_bucket_and_mix_images():
    sizes = ((64, 64), (128, 32))
    clips = [
        EncodedClip(Clip(0, 1, frames, 8, size), f"{frames} {size}", "", ())
        for frames in (1, 4, 8)
        for size in sizes
    ]
    generator, images = torch.Generator().manual_seed(0), 0
    drawn = set()
    for _ in range(800):
        batch = draw_clips(clips, 3, 1 / 8, generator)
        assert len({each.clip.bucket for each in batch}) == 1
        images += batch[0].clip.frames == 1
        drawn.update(batch)
    assert images == pytest.approx(100, abs=30) and drawn == set(clips)
    assert draw_clips(clips[:1], 2, 0.0, generator) == clips[:1] * 2  # images alone
