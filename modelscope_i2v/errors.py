"""The exceptions that this package raises for its user's or the world's faults.

Each is also the matching built-in exception, so that ``except ValueError`` and the like in existing
code go on working. Anything else that escapes is a bug of ours.
"""


class I2VError(Exception):
    """Base of all exceptions of this package."""


class InvalidInputError(I2VError, ValueError):
    """An image, a video, a prompt or a call keyword that cannot be used."""


class ConfigurationError(I2VError, ValueError):
    """A setting, in a ``configuration.json`` or given as a keyword, that is missing or not allowed."""


class MissingFileError(I2VError, FileNotFoundError):
    """A file or folder that should be there and is not."""


class CheckpointError(I2VError, RuntimeError):
    """A weights file that cannot be read safely, or does not fit the network."""


class OutputError(I2VError, RuntimeError):
    """A video that could not be encoded or written."""


class MissingPackageError(I2VError, ImportError):
    """An optional package that a setting asks for and that is not installed or does not work."""


class NotEnoughMemoryError(I2VError, MemoryError):
    """A generation that does not fit into memory, however little is computed at a time."""
