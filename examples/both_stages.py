"""Both stages: videos of several seeds, and the chosen one sharpened.

python examples/both_stages.py IMAGE OUTPUT [FIRST_MODEL SECOND_MODEL]
"""

import sys

from modelscope.pipelines import pipeline

image, output, *models = sys.argv[1:]
first, second = models or ("damo/Image-to-Video", "damo/Video-to-Video")
pipe = pipeline("image-to-video", model=first, model_revision="v1.1.0", refine=second)

# Stage one is quick: look at previews/contact_sheet.png, and choose.
pipe.preview(image, seeds=[1, 2], output_folder="previews")
pipe(image, output_video=output, seed=2, refine=True, text="a landscape")
