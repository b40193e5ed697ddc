"""Waits for ModelScope, then puts this package behind its image-to-video and video-to-video tasks.

:func:`activate` runs whenever ``modelscope_i2v`` is imported: by whoever uses it, or, where the package is
installed, by the start-up hook (``_modelscope_i2v_autoload.py``) as soon as ``modelscope`` is imported. What
is loaded of ModelScope by then is dealt with at once; for the rest a finder waits on ``sys.meta_path``. It
imports nothing early, and goes away when its work is done. The finder that stays is that of
:mod:`modelscope_i2v.plugin.stock_modules`.

Whatever goes wrong here is logged, and ModelScope goes on as if this package were not there.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading

from modelscope_i2v.plugin import stock_modules

TYPE_CHECKING = False  # typing's own, whose import would cost every start
if TYPE_CHECKING:
    from typing import Any

AUTOLOAD_VARIABLE = "MODELSCOPE_I2V_AUTOLOAD"
HOOK_MODULE = "_modelscope_i2v_autoload"

#: One of these is imported before any class is looked up.
BUILDERS = ("modelscope.models.builder", "modelscope.preprocessors.builder")
#: Each of these holds a table that the tasks are declared in.
TABLES = ("modelscope.preprocessors.base", "modelscope.pipeline_inputs", "modelscope.outputs.outputs")


def activate() -> None:
    """Make this package the implementation of its two tasks, now or as soon as ModelScope is loaded.

    Does nothing when it was done before.
    """
    _activation.start()


def activation_status() -> dict[str, str | None]:
    """Say whether this package is active in this process, and by which way.

    Returns:
        ``state``: ``"registered"``, ``"waiting"`` (ModelScope is not loaded so far) or ``"failed"``;
        ``way``: ``"start-up hook"`` or ``"import"`` (ModelScope's plugin loader imports, too);
        ``start_up_hook``: ``"on"``, ``"off"`` (by the environment variable) or ``"not installed"``;
        ``error``: what went wrong, or None.
    """
    watch = getattr(sys.modules.get(HOOK_MODULE), "watch", None)
    if os.environ.get(AUTOLOAD_VARIABLE) == "0":
        start_up_hook = "off"
    else:
        start_up_hook = "not installed" if watch is None else "on"
    return {
        "state": _activation.state,
        "way": "start-up hook" if watch is not None and watch.fired else "import",
        "start_up_hook": start_up_hook,
        "error": _activation.error,
    }


class _Activation:
    """The state of one process, and the finder that waits for ModelScope's modules."""

    def __init__(self) -> None:
        self.state = "waiting"
        self.error: str | None = None
        self._lock = threading.Lock()
        self._awaited: set[str] = set()
        self._started = False

    def start(self) -> None:
        """Register with what is loaded, and wait for the rest."""
        with self._lock:
            if self._started:
                return
            self._started = True
            self._awaited.update(BUILDERS + TABLES)
            sys.meta_path.insert(0, self)
            stock_modules.finder.start()
        for name in BUILDERS + TABLES:
            if _is_imported(name):
                self._loaded(name)

    def find_spec(self, name, path=None, target=None):
        """Part of the import system's finder protocol: find what the other finders find, and watch it run."""
        if name not in self._awaited:
            return None
        spec = None
        try:
            spec = self._spec_of_others(name, path, target)
            if spec is not None:
                self._watch(spec.loader, name)
        except Exception as error:
            self._fail(error)
        return spec

    def _spec_of_others(self, name, path, target):
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def _watch(self, loader: Any, name: str) -> None:
        """Call :meth:`_loaded` after the loader has run the module.

        The loader keeps its type, so that whoever looks at the module later sees nothing unusual.
        """
        run = loader.exec_module

        def run_then_register(module: Any) -> None:
            run(module)
            # Another module may come from the same loader, as out of a zip file.
            if module.__name__ == name:
                self._loaded(name)

        loader.exec_module = run_then_register

    def _loaded(self, name: str) -> None:
        with self._lock:
            # Not before it has run: an import that failed may be tried again.
            self._awaited.discard(name)
            if not self._awaited and self in sys.meta_path:
                sys.meta_path.remove(self)
        self._register()

    def _register(self) -> None:
        # Without the lock: registering imports, and imports have locks of their own.
        try:
            from modelscope_i2v.plugin import registration

            if registration.register():
                self.state = "registered"
                self.error = None
            elif not self._awaited.issuperset(BUILDERS):
                raise RuntimeError("this ModelScope's index of classes is in a place that is not known here")
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # ModelScope must go on whatever happens here.
        import logging

        self.state = "failed"
        self.error = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).warning(
            "modelscope_i2v could not be activated, ModelScope goes on without it: %s", self.error
        )


def _is_imported(name: str) -> bool:
    """Whether a module has been imported, once any thread that is in the middle of it is through."""
    if name not in sys.modules:
        return False
    try:
        importlib.import_module(name)
    except Exception:
        # That error is for whoever began the import. Begun anew, it is watched.
        return False
    return True


_activation = _Activation()
