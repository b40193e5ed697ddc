"""The model cards' own snippets, byte for byte apart from the image's path, in a fresh installation."""

from __future__ import annotations

import re
import shutil

import pytest

from modelscope_i2v.media.video import read_video

ONE_STAGE = """\
from modelscope.pipelines import pipeline
from modelscope.outputs import OutputKeys

pipe = pipeline(task='image-to-video', model='damo/Image-to-Video', model_revision='v1.1.0')
output_video_path = pipe(IMG_PATH, output_video='./output.mp4')[OutputKeys.OUTPUT_VIDEO]
"""
TWO_STAGES = """\
from modelscope.pipelines import pipeline
from modelscope.outputs import OutputKeys

pipe1 = pipeline(task='image-to-video', model='damo/Image-to-Video', model_revision='v1.1.0', device='cuda:0')
pipe2 = pipeline(task='video-to-video', model='damo/Video-to-Video', model_revision='v1.1.0', device='cuda:0')
output_video_path = pipe1("test.jpg", output_video='./i2v_output.mp4')[OutputKeys.OUTPUT_VIDEO]
new_output_video_path = pipe2({'video_path': output_video_path}, output_video='./v2v_output.mp4')[OutputKeys.OUTPUT_VIDEO]
"""  # noqa: E501


@pytest.mark.slow
def test_both_snippets_make_videos_and_no_warnings(by_wheel, small_model, picture):
    """In a folder that holds both models under their ids on the hub."""
    shutil.copytree(small_model[0].parent, by_wheel.folder / "damo", dirs_exist_ok=True)
    shutil.copy(picture, by_wheel.folder / "test.jpg")  # a PNG in truth, as pictures from the web often are
    done = by_wheel.run("-c", ONE_STAGE.replace("IMG_PATH", repr(str(picture))) + TWO_STAGES)
    sizes = {"output.mp4": (64, 128), "i2v_output.mp4": (64, 128), "v2v_output.mp4": (80, 128)}
    for name, size in sizes.items():
        assert read_video(by_wheel.folder / name).frames.shape == (4, *size, 3)
    assert (by_wheel.folder / "output.mp4").read_bytes() == (by_wheel.folder / "i2v_output.mp4").read_bytes()
    lines = (done.stdout + done.stderr).splitlines()
    assert not [line for line in lines if not re.match(r"[\d-]+ [\d:,]+ - modelscope - INFO - ", line)]
