"""Both pipelines through ModelScope's own ``pipeline()``, from file to file, and as clients use them."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import load_json
from modelscope.models import Model
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from PIL import Image

from modelscope_i2v.errors import ConfigurationError, InvalidInputError, MissingFileError
from modelscope_i2v.media.preprocessing import to_frames
from modelscope_i2v.media.video import read_video, video_bytes
from modelscope_i2v.samplers.ddim import sample_ddim
from modelscope_i2v.samplers.dpmpp import BrownianNoise, sample_dpmpp_2m_sde
from modelscope_i2v.samplers.guidance import denoiser, guided
from modelscope_i2v.samplers.schedules import ddim_levels, dpmpp_2m_sde_levels


def bytes_of(result: dict) -> bytes:
    assert isinstance(result[OutputKeys.OUTPUT_VIDEO], bytes)
    return result[OutputKeys.OUTPUT_VIDEO]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_stage_one_writes_a_playable_file_of_what_the_model_computed(i2v, picture, tmp_path):
    path = tmp_path / "new folder" / "a video 'of' ünïcode.mp4"
    result = i2v(str(picture), output_video=str(path))
    assert result[OutputKeys.OUTPUT_VIDEO] == str(path)
    assert result["seed"] == 666
    video = read_video(path)
    assert video.frames.shape == (4, 64, 128, 3)
    assert video.fps == 8
    expected = to_frames(i2v.model(i2v.preprocess(str(picture)))[0])
    assert np.array_equal(video.frames, read_video(video_bytes(expected)).frames)


def test_stage_two_takes_stage_ones_file_alone_or_as_bytes_and_with_further_keys(v2v, clip, tmp_path):
    path = tmp_path / "v2v.mp4"
    result = v2v({"video_path": str(clip)}, output_video=str(path))
    assert result[OutputKeys.OUTPUT_VIDEO] == str(path)
    video = read_video(path)
    assert video.frames.shape == (4, 80, 128, 3)
    expected = to_frames(v2v.model(v2v.preprocess({"video_path": str(clip)}))[0])
    assert np.array_equal(video.frames, read_video(video_bytes(expected)).frames)
    for source in (str(clip), {"video_path": clip.read_bytes(), "scene": 7}):
        assert bytes_of(v2v(source)) == path.read_bytes()


@pytest.mark.parametrize("size", [(100, 60), (72, 136)])
def test_odd_sizes_come_out_as_asked_for(i2v, v2v, picture, clip, size):
    for pipe, source in ((i2v, str(picture)), (v2v, {"video_path": str(clip)})):
        frames = read_video(bytes_of(pipe(source, resolution=size, steps=1))).frames
        assert frames.shape == (4, size[1], size[0], 3)


def test_call_keywords_reach_the_video(i2v, picture):
    video = read_video(bytes_of(i2v(str(picture), steps=1, max_frames=3, fps=12, seed=5)))
    assert len(video.frames) == 3
    assert video.fps == 12
    assert video.metadata["seed"] == "5" and video.metadata["steps"] == "1"


def test_frames_per_second_condition_stage_one(i2v, picture):
    slow, fast = (read_video(bytes_of(i2v(str(picture), fps=fps))).frames for fps in (4, 24))
    assert not np.array_equal(slow, fast)


def test_same_seed_same_bytes_and_other_seed_other_video(i2v, picture):
    first, other, again = (bytes_of(i2v(str(picture), seed=seed)) for seed in (1, 2, 1))
    assert first == again
    assert not np.array_equal(read_video(first).frames, read_video(other).frames)


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process(i2v, v2v, small_model, picture, clip, tmp_path):
    script = (
        "import sys\n"
        "import modelscope_i2v\n"
        "from modelscope.pipelines import pipeline\n"
        "one, two, picture, clip, folder = sys.argv[1:]\n"
        "pipeline('image-to-video', model=one, device='cpu')(picture, output_video=folder + '/1.mp4')\n"
        "pipe = pipeline('video-to-video', model=two, device='cpu')\n"
        "pipe({'video_path': clip}, output_video=folder + '/2.mp4')\n"
    )
    arguments = [*map(str, small_model), str(picture), str(clip), str(tmp_path)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    assert (tmp_path / "1.mp4").read_bytes() == bytes_of(i2v(str(picture)))
    assert (tmp_path / "2.mp4").read_bytes() == bytes_of(v2v({"video_path": str(clip)}))


def test_without_a_seed_every_call_differs_and_reports_its_seed(i2v, picture):
    i2v.model.cfg.seed = None
    try:
        first, second = i2v(str(picture)), i2v(str(picture))
    finally:
        i2v.model.cfg.seed = 666
    assert first["seed"] != second["seed"]
    assert bytes_of(i2v(str(picture), seed=first["seed"])) == bytes_of(first)


def test_a_generator_gives_a_seed_that_reproduces_the_video(i2v, picture):
    generator = torch.Generator().manual_seed(3)
    first, second = (i2v(str(picture), generator=generator) for _ in range(2))
    again = i2v(str(picture), generator=torch.Generator().manual_seed(3))
    assert first["seed"] == again["seed"] != second["seed"]
    assert bytes_of(i2v(str(picture), seed=first["seed"])) == bytes_of(first) == bytes_of(again)


def test_every_kind_of_image_gives_the_same_video(i2v, picture):
    image = Image.open(picture)
    bgr = np.asarray(image)[:, :, ::-1]
    sources = [str(picture), picture, image, np.ascontiguousarray(bgr), picture.read_bytes()]
    videos = [bytes_of(i2v(source)) for source in sources]
    assert all(video == videos[0] for video in videos)


def test_prompts_reach_stage_two(v2v, clip):
    plain, with_text, by_keyword, other_negative = (
        bytes_of(v2v({"video_path": str(clip), **given}, **keywords))
        for given, keywords in (
            ({}, {}),
            ({"text": "a boat"}, {}),
            ({}, {"text": "a boat"}),
            ({"negative_prompt": "a car"}, {}),
        )
    )
    assert with_text == by_keyword
    frames = [read_video(video).frames for video in (plain, with_text, other_negative)]
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_a_batch_in_the_model_is_two_singles(i2v, picture):
    inputs = i2v.preprocess(str(picture))
    one = i2v.model(inputs)
    two = i2v.model({**inputs, "vit_frame": inputs["vit_frame"].repeat(2, 1, 1, 1)})
    torch.testing.assert_close(two, one.repeat(2, 1, 1, 1, 1), atol=1e-3, rtol=1e-3)


def test_stage_one_is_the_chain_of_its_parts(i2v, picture):
    """With given noise: CLIP, DDIM under guidance 3 at 8 frames a second, the autoencoder."""
    model = i2v.model
    vit_frame = model.vid_trans(Image.open(picture).convert("RGB"))[None]
    noise = torch.randn(1, 4, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, fps = model.clip_encoder(vit_frame)[:, None], torch.tensor([8])

        def velocity(y):
            return lambda x, level: model.generator(x, torch.tensor([level.t]), y=y, fps=fps)

        guide = guided(both(velocity(y), velocity(torch.zeros_like(y))), 3.0)
        latents = sample_ddim(denoiser(guide), noise, ddim_levels(model.diffusion, 2))
        expected = model.autoencoder.decode(latents[0].transpose(0, 1) / 0.18215).transpose(0, 1)[None]
    result = model({"vit_frame": vit_frame, "noise": noise})
    assert result.dtype == torch.float32 and result.shape == (1, 3, 4, 64, 128)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def both(conditional, unconditional):
    return lambda x, level: torch.stack([conditional(x, level), unconditional(x, level)])


def test_stage_two_is_the_chain_of_its_parts(v2v):
    model = v2v.model
    draw = torch.Generator().manual_seed(0)
    frames = torch.rand(4, 3, 40, 64, generator=draw) * 2 - 1
    posterior_noise = torch.randn(4, 4, 10, 16, generator=draw)
    noise = torch.randn(1, 4, 4, 10, 16, generator=draw)
    with torch.no_grad():
        y = model.clip_encoder("a boat" + model.positive_prompt)
        large = torch.nn.functional.interpolate(frames, size=(80, 128), mode="bilinear")
        posterior = model.autoencoder.encode(large)
        x0 = 0.18215 * (posterior.mean + torch.exp(0.5 * posterior.logvar) * posterior_noise)
        noised = model.diffusion.add_noise(x0.transpose(0, 1)[None], noise, 599)

        def velocity(y):
            return lambda x, level: model.generator(x, torch.tensor([level.t]), y=y)

        levels = dpmpp_2m_sde_levels(model.diffusion, 2, 600)
        denoise = denoiser(guided(both(velocity(y), velocity(model.negative_y)), 7.5, 0.2))
        x = noised * levels[0].s
        latents = sample_dpmpp_2m_sde(denoise, x, levels, BrownianNoise(x, levels, [77]))
        expected = model.autoencoder.decode(latents[0].transpose(0, 1) / 0.18215).transpose(0, 1)[None]
    result = model(
        {"video_data": frames, "y": y, "noise": noise, "posterior_noise": posterior_noise, "entropy": 77}
    )
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


def test_what_callers_may_rely_on(i2v, v2v):
    assert v2v.model.positive_prompt == load_json("prompts")["positive_prompt"]
    assert v2v.model.negative_y.shape == (1, 77, 64)
    assert v2v.model.clip_encoder(["a", "b"]).shape == (2, 77, 64)
    assert i2v.model.device == torch.device("cpu") == i2v.device
    assert i2v.model.autoencoder.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)
    for part in ("generator", "autoencoder", "clip_encoder", "diffusion", "vid_trans", "cfg"):
        assert hasattr(i2v.model, part) and hasattr(v2v.model, part)


def test_a_model_built_first_is_taken(small_model, picture, i2v):
    model = Model.from_pretrained(str(small_model[0]), device="cpu")
    pipe = pipeline("image-to-video", model=model, device="cpu")
    assert bytes_of(pipe(str(picture))) == bytes_of(i2v(str(picture)))


def test_parts_moved_and_cast_by_hand(small_model, picture, clip, i2v, v2v):
    pipe = pipeline("video-to-video", model=str(small_model[1]), device="cpu")
    device = torch.device("cpu")
    pipe.device = pipe.model.device = device
    pipe.model.clip_encoder.model.to(device)
    pipe.model.clip_encoder.device = device
    pipe.model.autoencoder.to(device)
    pipe.model.generator.bfloat16().to(device)
    pipe.model.negative_y = pipe.model.negative_y.to(device)
    halved, full = (read_video(bytes_of(each(str(clip)))).frames for each in (pipe, v2v))
    assert not np.array_equal(halved, full)
    assert psnr(halved, full) > 10


def test_long_videos_go_through_in_windows(v2v, clip):
    """No frame is dropped, and a limit above the length changes nothing."""
    long = np.concatenate([read_video(clip).frames] * 2)  # 8 frames, twice max_frames
    source = {"video_path": video_bytes(long)}
    windowed = read_video(bytes_of(v2v(source))).frames
    assert len(windowed) == 8
    v2v.model.cfg.max_frames = 10000
    try:
        whole = read_video(bytes_of(v2v(source))).frames
        v2v.chunk_size, v2v.overlap_size = 4, 2
        chunked = read_video(bytes_of(v2v(source))).frames
        v2v.overlap_size = 1  # which is what four frames' windows have by default
        assert np.array_equal(read_video(bytes_of(v2v(source))).frames, windowed)
    finally:
        v2v.model.cfg.max_frames, v2v.chunk_size, v2v.overlap_size = 4, None, None
    assert len(whole) == len(chunked) == 8
    assert not np.array_equal(whole, windowed) and not np.array_equal(chunked, windowed)


def test_a_slip_in_the_pipelines_keywords_is_pointed_out(small_model, caplog):
    import logging

    logger = logging.getLogger("modelscope")
    logger.addHandler(caplog.handler)
    try:
        pipeline("image-to-video", model=str(small_model[0]), device="cpu", step=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "did you mean 'steps'?" in caplog.text


def test_callbacks_see_every_step(i2v, v2v, picture, clip):
    calls = []
    i2v(str(picture), steps=3, callback=lambda step, t, latents: calls.append((step, t, latents.shape)))
    assert calls == [(i, t, (1, 4, 4, 8, 16)) for i, t in enumerate([668, 334, 1])]
    calls.clear()
    v2v(str(clip), callback=lambda step, s, latents: calls.append((step, latents.shape)))
    assert calls == [(0, (1, 4, 4, 10, 16)), (1, (1, 4, 4, 10, 16))]


def test_a_bar_is_shown_only_where_asked_for(i2v, picture, capfd):
    i2v(str(picture), steps=1)
    assert "%|" not in capfd.readouterr().err
    i2v(str(picture), steps=1, progress=True)
    assert "image-to-video: 100%|" in capfd.readouterr().err


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"step": 3}, "did you mean 'steps'"),
        ({"steps": 0}, "steps: got 0, allowed is a whole number from 1 to 1000"),
        ({"text": "a boat"}, "no keyword 'text'"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_refused_keywords(i2v, picture, keywords, message):
    for source in (str(picture), [str(picture)]):
        with pytest.raises(InvalidInputError, match=message):
            i2v(source, **keywords)


def test_refused_inputs(i2v, v2v, picture, tmp_path):
    with pytest.raises(MissingFileError, match="no-such.png"):
        i2v(str(tmp_path / "no-such.png"))
    with pytest.raises(FileNotFoundError):
        v2v({"video_path": str(tmp_path / "no-such.mp4")})
    with pytest.raises(InvalidInputError, match="needs the key 'video_path', got text"):
        v2v({"text": "a boat"})
    with pytest.raises(InvalidInputError, match="total_noise_levels: got 1000"):
        v2v({"video_path": str(picture), "total_noise_levels": 1000})
    with pytest.raises(InvalidInputError, match="BytesIO"):
        v2v({"video_path": io.BytesIO(b"x")})
    with pytest.raises(InvalidInputError, match="a list of 2 paths"):
        i2v([str(picture)] * 2, output_video=str(tmp_path / "video.mp4"))
    with pytest.raises(InvalidInputError, match=r"noise: must be \[1, 4, 4, 8, 16\], got \[1, 4, 4, 8, 8\]"):
        i2v.model({**i2v.preprocess(str(picture)), "noise": torch.zeros(1, 4, 4, 8, 8)})


def test_an_output_that_cannot_be_written_is_refused_before_work(i2v, picture, tmp_path):
    steps = []
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        i2v(str(picture), output_video=str(tmp_path), callback=lambda *step: steps.append(step))
    assert not steps


def test_models_that_do_not_fit_the_task(small_model, i2v):
    with pytest.raises(InvalidInputError, match="a model folder or a VideoToVideoModel is needed"):
        pipeline("video-to-video", model=i2v.model, pipeline_name="video-to-video-pipeline", device="cpu")
    with pytest.raises(ConfigurationError, match="describes image-to-video, not video-to-video"):
        pipeline("video-to-video", model=str(small_model[0]), device="cpu")
    with pytest.raises(ConfigurationError, match="describes video-to-video, not image-to-video"):
        pipeline("image-to-video", model=str(small_model[1]), device="cpu")


def test_a_callback_may_call_another_pipeline(i2v, v2v, picture, clip):
    inner = []
    i2v(str(picture), steps=1, callback=lambda *step: inner.append(v2v(str(clip), steps=1)))
    assert bytes_of(inner[0]) == bytes_of(v2v(str(clip), steps=1))
