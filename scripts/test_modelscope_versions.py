"""Try this package with several versions of ModelScope, each in a virtual environment of its own.

For each version: an environment with that ModelScope, this package as an ordinary installation, and all other
requirements as pip resolves them; in it, the model cards' calls in a fresh process that imports nothing of
ours, then tests/test_activation.py and tests/test_pipelines.py. Prints a table in Markdown, and below it what
failed; the exit code says whether anything did. Needs a package index, and 6 GB a version unless packages are
shared; the generations themselves are offline.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Sequence
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "newest"

#: What each version needs beyond its declared requirements, which say nothing of what came after it.
NEEDS: dict[str, tuple[str, ...]] = {
    # It wants datasets before 2.14, which in turn uses what later pyarrow and huggingface_hub no longer have.
    "1.8.4": ("pyarrow<21", "huggingface_hub<1", "setuptools<81"),
    # These import pkg_resources, which setuptools no longer has. (1.20.0 itself wants setuptools 69.5.1.)
    "1.15.0": ("setuptools<81",),
    "1.20.0": (),
    "1.30.0": ("setuptools<81",),
    NEWEST: (),
}

TESTS = ("tests/test_activation.py", "tests/test_pipelines.py")

MAKE_MODEL_AND_PICTURE = """
import sys
sys.path.append("scripts")
from PIL import Image
from make_small_model import make_small_model
settings = {"max_frames": 2, "latent_hei": 10, "latent_wid": 16, "steps": 1}
make_small_model(".", {"image-to-video": settings, "video-to-video": settings})
Image.linear_gradient("L").convert("RGB").save("test.jpg")
"""

CHECK_CALLS = """
for each in (pipe, pipe1, pipe2):
    assert type(each).__module__ == "modelscope_i2v.plugin.pipelines", type(each)
    assert type(each.model).__module__ == "modelscope_i2v.plugin.models", type(each.model)
for path in ("output.mp4", output_video_path, new_output_video_path):
    with open(path, "rb") as file:
        assert file.read(8)[4:] == b"ftyp", path
"""

INFORMATION = re.compile(r"\S+ \S+ - modelscope - INFO - ")


class StepFailed(Exception):
    """A step of a version's trial that could not be done; the message is the end of its output."""


@dataclass
class Result:
    """A row of the table, and what it leaves out."""

    version: str
    python: str = ""
    torch: str = ""
    calls: str = "not run"
    tests: dict[str, str] = field(default_factory=lambda: dict.fromkeys(TESTS, "not run"))
    stray: list[str] | None = None
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        stray = "?" if self.stray is None else str(len(self.stray) or "none")
        return _row(self.version, self.python, self.torch, self.calls, *self.tests.values(), stray)


class Environment:
    """A virtual environment, and a folder to work in that holds nothing of the checkout but its tests."""

    def __init__(self, folder: Path, python: str, share_packages: bool):
        self.folder = folder
        self.work = folder / "work"
        self.python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
        if not os.path.exists(self.python):
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(ROOT / "tests", self.work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (self.work / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "make_small_model.py", self.work / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.work)
        shared = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"), "shared.pth")
        shared.unlink(missing_ok=True)
        if share_packages:
            code = "import site; print(*site.getsitepackages(), sep='\\n')"
            # As a path, behind the environment's own packages: start-up files there are not run.
            shared.write_text(subprocess.check_output([python, "-c", code], text=True), encoding="utf-8")

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Run this environment's Python in the working folder, with ``settings`` as environment variables."""
        foreign = ("MODELSCOPE", "PYTHON", "VIRTUAL_ENV")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own = {"MODELSCOPE_CACHE": str(self.folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [self.python, *arguments],
            env={**inherited, **own, **settings},
            cwd=self.work,
            capture_output=True,
            text=True,
        )

    def ask(self, code: str, **settings: str) -> str:
        """What code prints, stripped.

        Raises:
            StepFailed: if it fails.
        """
        return _checked(self.run("-c", code, **settings)).stdout.strip()

    def install(self, source: Path, requirements: Sequence[str]) -> None:
        """Install this package and ModelScope, in one resolution, as a user would."""
        tools = "pytest", "pytest-timeout"  # not all of [test]: ModelScope 1.20 wants an older setuptools
        _checked(self.run("-m", "pip", "install", "--upgrade", str(source), *tools, *requirements))

    def version_of(self, name: str) -> str:
        return self.ask(f"from importlib.metadata import version; print(version({name!r}))")


def main() -> int:
    arguments = _arguments()
    results = []
    with _folder(arguments.folder, arguments.keep) as folder:
        source = _copy_of_sources(folder)
        for version in arguments.versions:
            _say(f"ModelScope {version}")
            place = folder / f"modelscope-{version}"
            results.append(_try_version(version, place, source, arguments))
            if not arguments.keep:
                shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(source)
    print(_row("ModelScope", "Python", "torch", "model cards' calls", *TESTS, "stray warnings"))
    print("|---" * 7 + "|")
    for result in results:
        print(result.row())
    for result in results:
        for problem in [*result.problems, *(f"stray: {line}" for line in result.stray or ())]:
            print(f"\nModelScope {result.version}: {problem}")
    return int(any(result.problems or result.stray for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--versions", nargs="+", default=list(NEEDS), metavar="V", help=f"default: {' '.join(NEEDS)}")
    add("--python", default=sys.executable, metavar="PATH", help="make the environments with this Python")
    add("--folder", type=Path, metavar="DIR", help="make them there (default: a temporary folder)")
    add("--keep", action="store_true", help="leave them there; what is there already is used again")
    add("--share-packages", action="store_true", help="let them use the packages that --python finds, where "
        "those will do: a version then takes a minute of installing instead of 6 GB")  # fmt: skip
    return parser.parse_args()


@contextmanager
def _folder(given: Path | None, keep: bool) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    elif keep:
        folder = Path(tempfile.mkdtemp(prefix="modelscope-versions-"))
        _say(f"The environments are in {folder}")
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="modelscope-versions-") as temporary:
            yield Path(temporary)


def _copy_of_sources(folder: Path) -> Path:
    """What this package is built from, in a folder of its own: building leaves files behind."""
    copy = folder / "source"
    shutil.rmtree(copy, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modelscope_i2v", copy / "modelscope_i2v", ignore=ignore)
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, copy)
    return copy


def _try_version(version: str, folder: Path, source: Path, arguments: argparse.Namespace) -> Result:
    result = Result(version)
    modelscope = "modelscope[framework]" + ("" if version == NEWEST else f"=={version}")
    try:
        environment = Environment(folder, arguments.python, arguments.share_packages)
        _say("  installing")
        environment.install(source, [modelscope, *NEEDS.get(version, ())])
        result.version = environment.version_of("modelscope")
        result.python = environment.ask("import platform; print(platform.python_version())")
        result.torch = environment.version_of("torch")
        _say("  the model cards' calls")
        result.calls = "failed"
        result.stray = _try_calls(environment)
        result.calls = "work"
    except StepFailed as error:
        result.problems.append(str(error))
        if not result.torch:
            result.calls = "not installable"
            return result
    for test in TESTS:
        _say(f"  {test}")
        result.tests[test], problem = _try_tests(environment, test)
        if problem:
            result.problems.append(problem)
    return result


def _try_calls(environment: Environment) -> list[str]:
    """Make the model cards' calls; what they put on standard error that is no information line.

    ModelScope's own words there, which importing it brings about without ours, do not count.

    Raises:
        StepFailed: if a call fails, or reaches other classes than ours.
    """
    environment.ask(MAKE_MODEL_AND_PICTURE)
    calls = _model_card_calls()
    imports = "".join(line for line in calls.splitlines(True) if line.startswith("from "))
    alone = _checked(environment.run("-c", imports, MODELSCOPE_I2V_AUTOLOAD="0"))
    done = _checked(environment.run("-c", calls + CHECK_CALLS))
    said_alone = _warnings(alone.stderr)
    return [line for line in _warnings(done.stderr) if line not in said_alone]


def _model_card_calls() -> str:
    """Both snippets, out of the test that demands a silence that older versions of ModelScope do not keep.

    Their ids on the hub are also the paths of the folders that ``MAKE_MODEL_AND_PICTURE`` makes.
    """
    path = ROOT / "tests" / "test_model_card.py"
    constants = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    snippets = [ast.literal_eval(constants[name]) for name in ("ONE_STAGE", "TWO_STAGES")]
    return "\n".join(snippets).replace("IMG_PATH", "'test.jpg'")


def _warnings(text: str) -> list[str]:
    """Lines that are no information of ModelScope's, without their times."""
    lines = [line for line in text.splitlines() if line.strip() and not INFORMATION.match(line)]
    return [re.sub(r"^\S+ \S+ - modelscope - ", "", line) for line in lines]


def _try_tests(environment: Environment, test: str) -> tuple[str, str]:
    """Run a file of tests; how many passed and failed, and where any failed, pytest's words on it."""
    report = environment.folder / "report.xml"
    report.unlink(missing_ok=True)
    done = environment.run("-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", test)
    if not report.exists():
        return "not run", _tail(done)
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    words = {"failures": "failed", "errors": "with errors", "skipped": "skipped"}
    counts = {word: int(suite.get(key, 0)) for key, word in words.items()}
    counts = {"passed": int(suite.get("tests", 0)) - sum(counts.values()), **counts}
    summary = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return summary or "no tests", "" if done.returncode == 0 else _tail(done)


def _checked(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    if done.returncode:
        raise StepFailed(_tail(done))
    return done


def _tail(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not INFORMATION.match(line)]
    return "\n".join(lines[-25:])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
