"""The floors of the house: which part of the package may import which, and what is imported with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modelscope_i2v"

#: The other parts of the package that each part may import; ``errors`` is everybody's.
ALLOWED = {
    "models": set(),
    "samplers": set(),
    "media": set(),
    "metrics": set(),
    "settings": {"models"},
    "weights": {"models", "settings", "media"},
    "engine": {"models", "samplers", "weights", "media", "settings"},
    "training": {"metrics", "models", "samplers", "weights", "media", "settings", "engine"},
    "batch": {"metrics", "media", "settings", "engine"},
    "plugin": {"models", "samplers", "weights", "media", "settings", "engine", "training"},
    "studio": {"weights", "media", "settings", "engine"},
    "cli": {
        "metrics", "models", "samplers", "weights", "media", "settings", "engine", "training", "batch",
        "plugin", "studio",
    },
}  # fmt: skip
#: Packages that only the doors may know, each its own.
OUTER = {"modelscope", "argparse", "flask", "fastapi", "gradio", "nicegui", "starlette"}
DOORS = {"plugin": {"modelscope"}, "cli": {"modelscope", "argparse"}, "studio": {"gradio"}}
#: Of ``models``, what settings read from a file are made of.
ARCHITECTURES = {"AutoencoderConfig", "ClipConfig", "UNetConfig", "ATTENTION_CHOICES", "LAYER_CHOICES"}


def imports(path: Path) -> list[tuple[str, str | None]]:
    """Each import of a file as (module, imported name), with relative ones made absolute."""
    package = ["modelscope_i2v", *path.relative_to(PACKAGE).parent.parts]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found += [(module, alias.name) for alias in node.names]
    return found


def part_of(module: str, name: str | None) -> str:
    """The part of the package that an import takes from; empty for the package's own top."""
    parts = [*module.split("."), *filter(None, [name])]
    return parts[1] if len(parts) > 1 else ""


def files(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def test_every_folder_has_its_floor():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(ALLOWED)
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py", "__main__.py", "errors.py",
    }  # fmt: skip


@pytest.mark.parametrize("part", ALLOWED)
def test_each_part_imports_what_stands_below_it_and_nothing_else(part):
    wrong = []
    for path in files(part):
        for module, name in imports(path):
            target = part_of(module, name) if module.split(".")[0] == "modelscope_i2v" else None
            if target is not None and target not in {part, "errors", "__version__", *ALLOWED[part]}:
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
            if module.split(".")[0] in OUTER - DOORS.get(part, set()):
                wrong.append(f"{path.relative_to(ROOT)}: {module}")
    assert wrong == []


def test_settings_know_the_architectures_only():
    taken = {
        name
        for path in files("settings")
        for module, name in imports(path)
        if module.startswith("modelscope_i2v.models")
    }
    assert taken <= ARCHITECTURES


@pytest.mark.slow
def test_only_the_doors_bring_modelscope():
    """Without the package's own start-up, which would wait for ModelScope and not import it."""
    parts = [part for part in ALLOWED if part not in DOORS and files(part)]
    code = f"""if True:
        import importlib, pkgutil, sys
        import modelscope_i2v
        for part in {parts}:
            package = importlib.import_module(f"modelscope_i2v.{{part}}")
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        print(sorted(name for name in sys.modules if name.split(".")[0] == "modelscope"))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
