"""Weights files: finding and reading them without running what they say, and loading networks."""

from .loading import Checkpoint, check_weights, find_checkpoint, load_weights, open_checkpoint

__all__ = ["Checkpoint", "check_weights", "find_checkpoint", "load_weights", "open_checkpoint"]
