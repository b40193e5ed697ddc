"""This package's speed and memory beside the stock implementation's: ``python scripts/benchmark --help``."""
