"""``modelscope-i2v score``: figures of a video, with what it was made of, and with what it should be."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError, redact
from .command import Command, echo
from .stages import check_device

if TYPE_CHECKING:
    import numpy as np

    from ..media.video import Video

#: What the scores say, in a line each; their formulas are in ``modelscope_i2v.metrics``.
_WORDS = {
    "thumbnail_similarity": "to the image, of small pictures; up to 1",
    "clip_image_similarity": "to the image, by CLIP; up to 1",
    "clip_temporal_consistency": "of neighbouring frames, by CLIP; up to 1",
    "temporal_consistency": "of neighbouring frames, of 8x8 blocks; up to 1",
    "motion": "from frame to frame, in 0..255; 0 is a still video",
    "motion_ratio": "how far motion leads, in steps; 1 is noise",
    "flicker": "back and forth, in 0..255; less is calmer",
    "sharpness": "variance of the Laplacian; noise raises it, too",
    "psnr": "dB to the reference; more is nearer",
    "ssim": "to the reference; up to 1",
    "edge_psnr": "dB to the reference's edges; more is nearer",
    "block_psnr": "dB to the reference in 8x8 blocks; more is nearer",
    "window_seams": "steps where windows begin and end; 1 is no seam",
    "row_seams": "steps between rows of tiles; 1 is no seam",
    "column_seams": "steps between columns of tiles; 1 is no seam",
}


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("video", metavar="VIDEO", help="a path or a URL")
    add("--image", metavar="IMAGE", help="that the video was made of")
    add("--reference", metavar="VIDEO", help="what it should be")
    add("--model", metavar="DIR", help="a model folder, for what CLIP's image tower says")
    add("--device", metavar="D", help="for CLIP: cpu, gpu or cuda:N (default: a GPU if there is one)")
    for name, unit in (("window", "frames"), ("tile", "pixels")):
        add(f"--{name}", type=int, metavar="N",
            help=f"{unit} of a {name}, for its seams (default: what the file says)")  # fmt: skip
        add(f"--{name}-overlap", type=int, metavar="N",
            help=f"{unit} that two {name}s share (default: a quarter)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def _score(arguments: argparse.Namespace) -> None:
    from ..engine.embeddings import ImageEmbedder
    from ..media.images import open_image
    from ..media.video import read_video
    from ..metrics import reference_scores, scores

    check_device(arguments.device)
    video = read_video(arguments.video)
    count, height, width, _ = video.frames.shape
    given: dict[str, Any] = {}
    notes: list[str] = []
    image = None if arguments.image is None else open_image(arguments.image)
    reference = None if arguments.reference is None else read_video(arguments.reference).frames
    if image is not None:
        given["image"] = _cropped(image, width, height, notes)
    if arguments.model is not None:
        arguments.model = os.path.expanduser(arguments.model)
        embed = ImageEmbedder(arguments.model, arguments.device)
        given["embeddings"] = embed(video.frames)
        given["image_embedding"] = None if image is None else embed([image])[0]
    found = scores(video.frames, borders=_borders(video, arguments), **given)
    if reference is not None:
        found.update(reference_scores(*_alike(video.frames, reference, notes)))
    if arguments.json:
        facts = {"video": redact(arguments.video), "frames": count, "size": [width, height], "fps": video.fps}
        echo(json.dumps({**facts, **found, **({"notes": notes} if notes else {})}))
        return
    for name, value in found.items():
        echo(f"{name:<26} {value:>9.4g}   {_WORDS[name]}")
    for note in notes:
        echo(f"note: {note}")


def _cropped(image: Any, width: int, height: int, notes: list[str]) -> np.ndarray:
    """Return an image's middle of the video's shape, in the video's size."""
    import numpy as np
    from PIL import Image, ImageOps

    if abs(image.width * height / (image.height * width) - 1) > 0.02:
        notes.append(
            f"the image is {image.width}x{image.height}: its middle of the video's shape is compared"
        )
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BOX))


def _alike(video: Any, reference: Any, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a video and its reference with as many frames, the reference in the video's size."""
    import numpy as np
    from PIL import Image

    count = min(len(video), len(reference))
    if len(video) != len(reference):
        notes.append(f"frames: {len(video)}, and {len(reference)} of the reference; the first {count} count")
    height, width = video.shape[1:3]
    if reference.shape[1:3] != (height, width):
        notes.append(
            f"the reference is {reference.shape[2]}x{reference.shape[1]}: resized to {width}x{height}"
        )
        frames = [Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
                  for frame in reference[:count]]  # fmt: skip
        reference = np.stack([np.asarray(frame) for frame in frames])
    return video[:count], reference[:count]


def _borders(video: Video, arguments: argparse.Namespace) -> list[list[int]]:
    """Return where windows, and tiles down and across, begin or end, by the flags or the file's record."""
    from ..engine.borders import part_borders, recorded_borders
    from ..settings.configuration import load_settings, read_configuration, stages_in
    from ..settings.record import from_metadata
    from ..settings.stages import SETTINGS_OF_STAGE

    record, shape = from_metadata(video.metadata), video.frames.shape[:3]
    stage = str(record.get("stage"))
    stage = stage if stage in SETTINGS_OF_STAGE else "video-to-video"
    settings = SETTINGS_OF_STAGE[stage]()  # the published architecture, unless the model's is known
    if arguments.model is not None and stage in stages_in(read_configuration(arguments.model)):
        settings = load_settings(arguments.model, stage)
    for name in ("window", "tile"):
        if getattr(arguments, name) is None and getattr(arguments, f"{name}_overlap") is not None:
            raise InvalidInputError(f"--{name}-overlap says nothing without --{name}")
    borders = list(recorded_borders(record, shape, settings))
    if arguments.window is not None:
        borders[0] = part_borders(shape[0], arguments.window, arguments.window_overlap)
    if arguments.tile is not None:
        borders[1:] = [part_borders(side, arguments.tile, arguments.tile_overlap) for side in shape[1:]]
    return borders


SCORE = Command(
    "score",
    "figures of a video: how steady, how sharp, how near to its image and to a reference",
    _add_score_arguments,
    _score,
)
