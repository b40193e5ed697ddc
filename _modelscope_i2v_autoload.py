"""Start-up hook: imports ``modelscope_i2v`` as soon as ``modelscope`` is imported, and not before.

Python itself runs it at every start, through ``modelscope_i2v_autoload.pth`` or ``.start``, so it is kept to
what costs next to nothing. ``MODELSCOPE_I2V_AUTOLOAD=0`` in the environment turns it off.
"""

import os
import sys


class _ModelScopeWatch:
    """A finder that finds nothing, and takes the import of ``modelscope`` as its cue."""

    fired = False

    def find_spec(self, name, path=None, target=None):
        if name == "modelscope" and not self.fired:
            self.fired = True
            self._import_ours()
        return None

    def _import_ours(self):
        try:
            sys.meta_path.remove(self)
            import modelscope_i2v  # noqa: F401
        except Exception as error:
            # ModelScope must go on whatever happens here, and without a word where only this hook is left.
            if getattr(error, "name", None) != "modelscope_i2v":
                import logging

                logging.getLogger(__name__).warning(
                    "modelscope_i2v could not be activated, ModelScope goes on without it: %s", error
                )


watch = _ModelScopeWatch()


def start():
    """Watch out for the import of ``modelscope``, unless the environment says not to."""
    # Not twice: in virtual environments, some versions of Python run their .pth files twice.
    if os.environ.get("MODELSCOPE_I2V_AUTOLOAD") != "0" and watch not in sys.meta_path:
        sys.meta_path.insert(0, watch)
