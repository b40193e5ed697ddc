"""Any video larger and sharper, with its sound and at its rate; interrupted, it goes on where it was.

python examples/enhance.py VIDEO OUTPUT FOLDER

FOLDER is a downloaded or converted model folder of stage two.
"""

import os
import sys

from modelscope_i2v import VideoToVideo

video, output, folder = sys.argv[1:]
stage = VideoToVideo.load(folder)
done = stage.enhance(video, output, scale=2, seed=1, resume=os.path.exists(output + ".unfinished"))
print(f"{done.frames} frames of {done.size[0]}x{done.size[1]} at {done.fps:g} fps, {done.scenes} scenes")
