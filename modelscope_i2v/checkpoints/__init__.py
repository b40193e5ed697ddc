"""Weights files: finding them, reading them without running what they say, and loading networks from them."""

from .loading import Checkpoint, find_checkpoint, load_weights, open_checkpoint

__all__ = ["Checkpoint", "find_checkpoint", "load_weights", "open_checkpoint"]
