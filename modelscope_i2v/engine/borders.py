"""Where windows and tiles begin and end in a video: seams, if there are any, are there."""

from __future__ import annotations

from typing import Any, Mapping

from ..errors import InvalidInputError
from ..samplers.windows import window_starts
from ..settings.stages import StageSettings
from .latents import latent_size
from .memory.tiles import TileLimit


def part_borders(length: int, size: int, overlap: int | None = None) -> list[int]:
    """Return where parts begin or end within a length, without its own ends.

    Args:
        length: of what goes through a network in parts.
        size: of a part.
        overlap: what two of them have in common; by default a quarter.

    Raises:
        InvalidInputError: if it cannot be laid out so.
    """
    overlap = size // 4 if overlap is None else overlap
    if not 0 <= overlap < size:
        raise InvalidInputError(
            f"windows or tiles of {size} that share {overlap}: allowed is a size from 1, and less in common"
        )
    starts = window_starts(length, size, overlap)
    return sorted({*starts[1:], *(start + size for start in starts[:-1])})


def recorded_borders(
    record: Mapping[str, Any], shape: tuple[int, int, int], settings: StageSettings
) -> tuple[list[int], list[int], list[int]]:
    """Return where, by a video's record, its windows (frames) and its tiles (rows, columns) begin or end.

    Args:
        record: as of ``from_metadata``; it may be empty.
        shape: of the video: frames, height and width in pixels.
        settings: of the stage that made it: tiles are of latents.
    """
    names = ("chunk_size", "overlap_size", "tile_size", "tile_overlap")
    window, overlap, tile, shared = (
        value if isinstance(value, int) else None for value in map(record.get, names)
    )
    count, height, width = shape
    # Within a scene, which a record does not tell, they begin anew.
    windows = [] if window is None or record.get("scene_cuts") else part_borders(count, window, overlap)
    if tile is None:
        return windows, [], []
    scale = settings.autoencoder.downscale
    sizes, overlaps = TileLimit(tile, shared).layout(tile, settings.unet, scale)
    latent = latent_size((width, height), settings.unet, scale)
    borders = [[scale * each for each in part_borders(*axis)] for axis in zip(latent, sizes, overlaps)]
    rows, columns = ([each for each in found if each < end] for found, end in zip(borders, (height, width)))
    return windows, rows, columns
