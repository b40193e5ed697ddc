"""The small model that ships with the package: its recipe, from drawn scenes to a model folder."""

from .autoencoder import AutoencoderPhase
from .image_to_video import ImageToVideoPhase, SteadyPhase
from .tower import TowerPhase
from .video_to_video import VideoToVideoPhase

#: In the order of training.
PHASES = {
    "autoencoder": AutoencoderPhase,
    "tower": TowerPhase,
    "image-to-video": ImageToVideoPhase,
    "image-to-video-steady": SteadyPhase,
    "video-to-video": VideoToVideoPhase,
}
