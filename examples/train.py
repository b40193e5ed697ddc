"""A LoRA adapter for stage one from a folder of clips, and a video with it.

python examples/train.py CLIPS IMAGE OUTPUT FOLDER STEPS

FOLDER is a downloaded or converted model folder of stage one; the run goes to the folder run.
"""

import sys

from modelscope_i2v import ImageToVideo
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.fine_tuning import FineTuning

clips, image, output, folder, steps = sys.argv[1:]
settings = TrainingSettings(lora=8, steps=int(steps), seed=1)
adapter = FineTuning(folder, clips, "run", settings, echo=print).train()
stage = ImageToVideo.load(folder)
stage(image, seed=1, lora=str(adapter)).save(output)
print(f"{output} was made with {adapter}")
