"""An image to a video, by ModelScope's own call: python examples/image_to_video.py IMAGE OUTPUT [MODEL]

MODEL is a model folder or an id on ModelScope's hub. Nothing of this package is imported: it only has to be
installed.
"""

import sys

from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline

image, output, *model = sys.argv[1:]
pipe = pipeline("image-to-video", model=model[0] if model else "damo/Image-to-Video", model_revision="v1.1.0")
result = pipe(image, output_video=output, seed=1)
print(result[OutputKeys.OUTPUT_VIDEO], "was made with seed", result["seed"])
