"""Virtual environments for tests: they see the packages of the one that runs the tests, but not this package.

It is built here, as a wheel and as an editable install, and put in. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import venv
from pathlib import Path

#: ModelScope's: in a new one it spends some ten seconds on its index of classes.
CACHE = tempfile.TemporaryDirectory(prefix="modelscope_cache_")


class Environment:
    """A virtual environment with the parent's packages, a home of its own, and without this package."""

    # Transformers is optional to ModelScope, and half of the time that importing it takes.
    hidden = ("modelscope_i2v", "_modelscope_i2v", "__editable__", "transformers")

    def __init__(self, folder: Path, with_packages: bool = True):
        venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        self.site_packages = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        if with_packages:
            self._link_packages()

    def _link_packages(self) -> None:
        links = self.folder / "packages"
        links.mkdir()
        for parent in sys.path:
            if not parent.endswith(("site-packages", "dist-packages")):
                continue
            for entry in Path(parent).iterdir():
                if not entry.name.lower().startswith(self.hidden) and not (links / entry.name).exists():
                    (links / entry.name).symlink_to(entry)
        # A path, and not addsitedir: the parent's own start-up files stay out.
        (self.site_packages / "packages.pth").write_text(f"{links}\n")

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Run this environment's Python, with ``settings`` in its process environment."""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MODELSCOPE", "PIP_", "PYTHONPATH", "VIRTUAL_ENV"))
        }
        own = {
            "HOME": str(self.folder),
            "MODELSCOPE_CACHE": CACHE.name,
            "OMP_NUM_THREADS": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
        }
        if "PIP_INDEX_URL" in settings:
            del own["PIP_NO_INDEX"]
        done = subprocess.run(
            [self.python, *arguments],
            env={**inherited, **own, **settings},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def ask(self, code: str, **settings: str) -> str:
        """Run code; what it printed, stripped."""
        return self.run("-c", textwrap.dedent(code), **settings).stdout.strip()

    def report(self, code: str, **settings: str) -> dict:
        """Run code that ends in a call of ``report``; what that printed."""
        return json.loads(self.ask(code, **settings).splitlines()[-1])

    def pip(self, *arguments: str) -> None:
        self.run("-m", "pip", *arguments)

    def files(self) -> set[str]:
        """What is installed, by name."""
        folders = (self.site_packages, self.folder / "bin")
        return {entry.name for folder in folders for entry in folder.iterdir() if entry.name != "__pycache__"}
