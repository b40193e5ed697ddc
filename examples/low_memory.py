"""An image to a video on a small GPU: each network is there only while it works.

python examples/low_memory.py IMAGE OUTPUT FOLDER

FOLDER is a downloaded or converted model folder of stage one.
"""

import sys

from modelscope_i2v import ImageToVideo

image, output, folder = sys.argv[1:]
stage = ImageToVideo.load(folder, low_memory=True)
print(stage(image, seed=1).save(output))
