"""Weights files: finding and reading them without running what they say, loading networks, and writing."""

from .loading import Checkpoint, check_weights, find_checkpoint, load_weights, open_checkpoint
from .safetensors_writing import safetensors_size, write_safetensors

__all__ = [
    "Checkpoint",
    "check_weights",
    "find_checkpoint",
    "load_weights",
    "open_checkpoint",
    "safetensors_size",
    "write_safetensors",
]
