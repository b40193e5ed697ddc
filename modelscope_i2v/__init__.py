"""Image-to-video with I2VGen-XL behind ModelScope's own calls.

Importing this package, or installing it, makes it the implementation of ModelScope's ``image-to-video`` and
``video-to-video`` tasks. It imports neither ModelScope nor torch: see
:mod:`modelscope_i2v.plugin.activation`.
"""

from modelscope_i2v.plugin.activation import activate

__version__ = "0.1.0"
__all__ = ["__version__"]

activate()
