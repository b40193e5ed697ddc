"""Packaging. Tool settings are in ``pyproject.toml``."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent

# Python itself reads the .pth file at start-up, from 3.15 on the .start file instead (PEP 829). Their name
# sorts after those of editable installs, which have to be on the path by then. The module lies beside them
# in editable installs, too: through setuptools' own finder, it would take several times as long to import.
START_UP_FILES = [
    "modelscope_i2v_autoload.pth",
    "modelscope_i2v_autoload.start",
    "_modelscope_i2v_autoload.py",
]


def read_version() -> str:
    """Take ``__version__`` from the package without importing it: its requirements may be missing here."""
    for node in ast.parse((ROOT / "modelscope_i2v" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("modelscope_i2v/__init__.py does not define __version__")


def read_readme() -> str:
    """The project's description for package indexes."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


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


setup(
    name="modelscope_i2v",
    version=read_version(),
    description="I2VGen-XL image-to-video and video-to-video for ModelScope",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["modelscope_i2v", "modelscope_i2v.*"]),
    package_data={"modelscope_i2v": ["assets/*", "samplers/*.npy"]},
    include_package_data=False,
    cmdclass={"build": build_with_start_up_files, "build_start_up_files": build_start_up_files},
    python_requires=">=3.9",
    install_requires=[
        "modelscope[framework]>=1.8.4",
        "torch>=2.1",
        "open_clip_torch>=2.20",
        "einops",
        "torchsde>=0.2.6",
        "numpy",
        "Pillow>=10",
        "av>=13",
        "safetensors",
        "tqdm",
        "requests",
    ],
    extras_require={
        "xformers": ["xformers"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "setuptools>=64", "wheel"],
    },
    entry_points={"console_scripts": ["modelscope-i2v = modelscope_i2v.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Multimedia :: Video",
    ],
)
