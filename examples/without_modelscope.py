"""The engine in plain Python: no ModelScope is imported, and the frames are an array.

python examples/without_modelscope.py FOLDER IMAGE OUTPUT

FOLDER is a downloaded or converted model folder of stage one.
"""

import sys

from modelscope_i2v import ImageToVideo

folder, image, output = sys.argv[1:]
stage = ImageToVideo.load(folder)
video = stage(image, seed=1, callback=lambda step, timestep, latents: print("step", step + 1))
print(video.frames.shape, video.frames.dtype, f"{video.fps} frames a second, {video.record['steps']} steps")
video.save(output)
