"""The start-up files, which ``pyproject.toml`` cannot declare; everything else about packaging is there."""

from __future__ import annotations

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

# Python itself reads the .pth file at start-up, from 3.15 on the .start file instead (PEP 829). Their name
# sorts after those of editable installs, which have to be on the path by then. The module lies beside them
# in editable installs, too: through setuptools' own finder, it would take several times as long to import.
START_UP_FILES = [
    "modelscope_i2v_autoload.pth",
    "modelscope_i2v_autoload.start",
    "_modelscope_i2v_autoload.py",
]


class build_start_up_files(Command):
    """Put the start-up files where Python looks for them: at the root of site-packages.

    They belong to no package, so ``package_data`` cannot, and ``data_files`` go to ``sys.prefix``. Nor is
    the module one of ``py_modules``: an editable install would only point to it.
    """

    description = "copy the files that Python reads at start-up"
    user_options = []
    # Set by setuptools (setuptools.command.build.SubCommand).
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        # An editable wheel leaves out what is built, and holds what is installed into it, like scripts.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(str(target))
        for name in START_UP_FILES:
            self.copy_file(name, str(Path(target, name)))

    def get_outputs(self):
        return [] if self.editable_mode else [str(Path(self.build_lib, name)) for name in START_UP_FILES]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return START_UP_FILES


class build_with_start_up_files(build):
    """The usual build, and then the start-up files."""

    sub_commands = [*build.sub_commands, ("build_start_up_files", None)]


setup(cmdclass={"build": build_with_start_up_files, "build_start_up_files": build_start_up_files})
