"""Registration at the right moment: this package behind ModelScope's tasks as soon as that is loaded.

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
from importlib.machinery import PathFinder

from modelscope_i2v.plugin import registration, stock_modules

TYPE_CHECKING = False  # typing's own, whose import would cost every start
if TYPE_CHECKING:
    from typing import Any

AUTOLOAD_VARIABLE = "MODELSCOPE_I2V_AUTOLOAD"
HOOK_MODULE = "_modelscope_i2v_autoload"

#: One of these is imported before any class is looked up.
BUILDERS = ("modelscope.models.builder", "modelscope.preprocessors.builder")
#: After each of these there is something to register.
AWAITED = (*BUILDERS, *(module for module, _ in registration.TABLES))


def activate() -> None:
    """Make this package the implementation of its two tasks, now or as soon as ModelScope is loaded.

    Does nothing when it was done before.
    """
    _activation.start()


def activation_status() -> dict[str, str | None]:
    """Return whether this package is active in this process, and what made it so.

    Returns:
        ``state``: ``"registered"``, ``"waiting"`` (ModelScope is not loaded so far) or ``"failed"``;
        ``way``: ``"start-up hook"`` or ``"import"`` (ModelScope's plugin loader imports, too);
        ``start_up_hook``: ``"on"``, ``"off"`` (by the environment variable) or ``"not installed"``;
        ``error``: what went wrong, or None.
    """
    watch = getattr(sys.modules.get(HOOK_MODULE), "watch", None)
    installed = "not installed" if watch is None else "on"
    return {
        "state": _activation.state,
        "way": "start-up hook" if watch is not None and watch.fired else "import",
        "start_up_hook": "off" if os.environ.get(AUTOLOAD_VARIABLE) == "0" else installed,
        "error": _activation.error,
    }


class _Activation:
    """The state of one process, and the finder that waits for ModelScope's modules."""

    def __init__(self) -> None:
        self.state = "waiting"
        self.error: str | None = None
        self._lock = threading.Lock()
        self._awaited: set[str] = set()

    def start(self) -> None:
        """Register with what is loaded, and wait for the rest."""
        with self._lock:
            if stock_modules.finder in sys.meta_path:
                return
            self._awaited.update(AWAITED)
            sys.meta_path.insert(0, self)
            stock_modules.finder.start()
        for name in AWAITED:
            try:  # which waits for any thread that is in the middle of it
                imported = name in sys.modules and importlib.import_module(name)
            except Exception:  # for whoever began that import; begun anew, it is watched
                imported = False
            if imported:
                self._loaded(name)

    def find_spec(self, name, path=None, target=None):
        """Find what Python's own finder finds, and watch it run: part of the import system's protocol."""
        spec = PathFinder.find_spec(name, path, target) if name in self._awaited else None
        if spec is not None:
            self._watch(spec.loader, name)
        return spec

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
        # Without the lock: registering imports, and imports have locks of their own.
        try:
            if registration.register():
                self.state, self.error = "registered", None
            elif not self._awaited.issuperset(BUILDERS):
                raise RuntimeError("this ModelScope's index of classes is in a place that is not known here")
        except Exception as error:  # ModelScope must go on whatever happens here
            import logging

            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).warning(
                "modelscope_i2v could not be activated, ModelScope goes on without it: %s", self.error
            )


_activation = _Activation()
