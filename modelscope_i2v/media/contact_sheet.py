"""A picture of several videos, to choose one by: a row of frames each, under its label."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw

_COLUMNS = 4
_MARGIN = 4  # pixels
_LABEL_HEIGHT = 16


def contact_sheet(videos: Sequence[tuple[str, np.ndarray]], width: int = 224) -> Image.Image:
    """Draw a contact sheet.

    Args:
        videos: (label, frames [F, H, W, 3] uint8), at least one, all of one shape of frames.
        width: of each frame in the sheet, in pixels.

    Returns:
        An RGB image with a row for each video: up to four frames, evenly spaced from its first to its last.
    """
    first = videos[0][1]
    height = max(round(width * first.shape[1] / first.shape[2]), 1)
    row_height = height + _LABEL_HEIGHT + _MARGIN
    sheet = Image.new(
        "RGB", (_COLUMNS * (width + _MARGIN) + _MARGIN, len(videos) * row_height + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames) in enumerate(videos):
        top = _MARGIN + row * row_height
        draw.text((_MARGIN, top), label, fill="black")
        shown = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
        for column, index in enumerate(shown):
            frame = Image.fromarray(frames[index]).resize((width, height))
            sheet.paste(frame, (_MARGIN + column * (width + _MARGIN), top + _LABEL_HEIGHT))
    return sheet
