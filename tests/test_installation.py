"""What an installation ships and costs, and that ModelScope then finds our classes by each way there is.

Every test runs fresh interpreters in the virtual environments of ``environments.py``.
"""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import tarfile
import threading
import zipfile

import pytest
from conftest import ROOT
from environments import Environment

from modelscope_i2v import __version__

pytestmark = pytest.mark.slow

HOOK_FILES = {
    "_modelscope_i2v_autoload.py",
    "modelscope_i2v_autoload.pth",
    "modelscope_i2v_autoload.start",
}

# Prints, as JSON, what ModelScope finds for our names, by the two steps of its own build_from_cfg.
REPORT = """
import json, sys
from modelscope.models.builder import MODELS
from modelscope.pipelines.builder import PIPELINES
from modelscope.preprocessors.builder import PREPROCESSORS
from modelscope.outputs import TASK_OUTPUTS
from modelscope.pipeline_inputs import TASK_INPUTS
from modelscope.preprocessors.base import PREPROCESSOR_MAP
from modelscope.utils.constant import Tasks
from modelscope.utils.import_utils import LazyImportModule

def found(registry, group, name):
    LazyImportModule.import_module((registry.name.upper(), group, name))
    found = registry.get(name, group)
    return found and f"{found.__module__}.{found.__name__}"

def report(**more):
    from modelscope_i2v.plugin.activation import activation_status
    stock = ("multi_modal.image_to_video", "multi_modal.video_to_video")
    answer = {"classes": [], "declared": [], "status": activation_status()}
    for task, pipeline in (("image-to-video", "image-to-video-task-pipeline"),
                           ("video-to-video", "video-to-video-pipeline")):
        field = Tasks.find_field_by_task(task)
        preprocessor = PREPROCESSOR_MAP.get((f"{task}-model", task), "missing")
        answer["classes"].append(found(MODELS, task, f"{task}-model"))
        answer["classes"].append(found(PIPELINES, task, pipeline))
        answer["classes"].append(found(PREPROCESSORS, field, preprocessor))
        answer["declared"].append([task in TASK_INPUTS, TASK_OUTPUTS.get(task)])
    answer["stock"] = [name for name in sys.modules if any(part in name for part in stock)]
    answer["finders"] = [type(f).__name__ for f in sys.meta_path if "modelscope_i2v" in type(f).__module__]
    print(json.dumps({**answer, **more}))
"""

OUR_CLASSES = [
    "modelscope_i2v.plugin.models.ImageToVideoModel",
    "modelscope_i2v.plugin.pipelines.ImageToVideoPipeline",
    "modelscope_i2v.plugin.preprocessors.ImageToVideoPreprocessor",
    "modelscope_i2v.plugin.models.VideoToVideoModel",
    "modelscope_i2v.plugin.pipelines.VideoToVideoPipeline",
    "modelscope_i2v.plugin.preprocessors.VideoToVideoPreprocessor",
]


def assert_ours(report: dict) -> None:
    assert report["classes"] == OUR_CLASSES
    assert report["declared"] == [[True, ["output_video"]]] * 2
    assert report["status"]["state"] == "registered", report["status"]
    assert report["finders"] == ["StockModuleFinder"]


# What is shipped


def test_wheel_ships_the_hook_and_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = {
            name.partition(".dist-info/")[2]: archive.read(name).decode() for name in names if ".dist" in name
        }
    assert about["top_level.txt"].split() == ["modelscope_i2v"]
    assert f"\nVersion: {__version__}\n" in about["METADATA"]
    assert "modelscope-i2v = modelscope_i2v.cli:main" in about["entry_points.txt"]
    assert {name for name in names if "/" not in name} == HOOK_FILES
    assert not [name for name in names if name.startswith(("tests", "scripts"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modelscope_i2v").rglob("*.py")}
    assert modules <= set(names)


def test_source_distribution_has_all_that_the_wheel_is_made_of(source, wheel, builder, tmp_path):
    code = f"""
        import os, setuptools.build_meta
        os.chdir({str(source)!r})
        print(setuptools.build_meta.build_sdist({str(tmp_path)!r}))
    """
    with tarfile.open(tmp_path / builder.ask(code).splitlines()[-1]) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    made_of = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert made_of | {"pyproject.toml", "setup.py"} <= shipped


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_uninstalling_leaves_nothing_and_leftovers_are_silent(how, wheel, source, tmp_path):
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    what = [str(wheel)] if how == "wheel" else ["--no-build-isolation", "-e", str(source)]
    environment.pip("install", *what)
    assert environment.files() - before >= HOOK_FILES
    (environment.folder / "modelscope.py").touch()
    for missing in ("_modelscope_i2v_autoload.py", "modelscope_i2v") if how == "wheel" else ():
        target = environment.site_packages / missing
        target.rename(tmp_path / missing)
        done = environment.run("-c", "import modelscope; print(modelscope.__file__)")
        assert done.stdout.strip().endswith("modelscope.py")
        assert done.stderr == ""
        (tmp_path / missing).rename(target)
    environment.pip("uninstall", "-y", "modelscope_i2v")
    assert environment.files() == before


# Start-up


def test_users_of_anything_else_notice_nothing(installed):
    code = "import json, sys; print(json.dumps([sorted(sys.modules), [repr(f) for f in sys.meta_path]]))"
    modules, finders = json.loads(installed.ask(code))
    modules_without, finders_without = json.loads(installed.ask(code, MODELSCOPE_I2V_AUTOLOAD="0"))
    assert set(modules) - set(modules_without) == {"_modelscope_i2v_autoload"}
    # Once, although some versions of Python run start-up files twice in a virtual environment.
    assert len(finders) - len(finders_without) == 1
    assert not [name for name in modules_without if "modelscope" in name and "__editable__" not in name]


def test_start_up_costs_next_to_nothing(installed):
    """Less than a millisecond, by Python's own clock of imports. Noise only ever adds."""
    microseconds = []
    for _ in range(5):
        done = installed.run("-X", "importtime", "-c", "pass")
        [line] = [line for line in done.stderr.splitlines() if line.endswith("_modelscope_i2v_autoload")]
        microseconds.append(int(line.split("|")[1]))
    assert min(microseconds) < 1000, microseconds


def test_importing_the_package_is_light(by_wheel):
    code = """
        import sys
        before = set(sys.modules)
        import modelscope_i2v
        new = set(sys.modules) - before
        print(sorted(name for name in new if "." not in name))
        print(len(new))
    """
    names, count = by_wheel.ask(code, MODELSCOPE_I2V_AUTOLOAD="0").splitlines()
    assert not {"torch", "modelscope", "numpy", "logging"} & set(json.loads(names.replace("'", '"')))
    assert int(count) < 25


# With ModelScope itself


def test_nothing_but_pip_install(by_wheel):
    code = f"""
from modelscope.pipelines import pipeline
from modelscope.outputs import OutputKeys
{REPORT}
report(table=TASK_OUTPUTS["image-to-video"] == [OutputKeys.OUTPUT_VIDEO])
"""
    report = by_wheel.report(code)
    assert_ours(report)
    assert report["table"]
    assert report["stock"] == []
    assert (report["status"]["way"], report["status"]["start_up_hook"]) == ("start-up hook", "on")


def test_nothing_but_an_editable_install(editable):
    """No class is imported: what ModelScope's index says is enough beside the test above."""
    code = """
        import json
        import modelscope.models.builder
        from modelscope.utils.import_utils import LazyImportModule
        from modelscope_i2v.plugin.activation import activation_status
        index = LazyImportModule.get_ast_index()["index"]
        entry = index["MODELS", "image-to-video", "image-to-video-model"]
        print(json.dumps({**activation_status(), "module": entry["module"]}))
    """
    report = editable.report(code)
    assert report["module"] == "modelscope_i2v.plugin.models"
    assert (report["state"], report["way"]) == ("registered", "start-up hook")


# Of the classes that ModelScope ships, these import if cv2 is there; the models import on no current system.
STOCK_CLASSES = """
import sys, types
sys.modules["cv2"] = types.ModuleType("cv2")
import modelscope.pipelines.multi_modal.image_to_video_pipeline
import modelscope.pipelines.multi_modal.video_to_video_pipeline
"""


def test_import_after_modelscope_and_its_own_classes(by_wheel):
    code = f"""{STOCK_CLASSES}
{REPORT}
@MODELS.register_module("image-to-video", module_name="image-to-video-model")
class StandInForTheStockModel: ...
index = LazyImportModule.get_ast_index()["index"]
entry = index["PIPELINES", "image-to-video", "image-to-video-task-pipeline"]
before = [entry["module"], "image-to-video" in TASK_INPUTS, "modelscope_i2v" in sys.modules]
import modelscope_i2v
report(before=before)
"""
    report = by_wheel.report(code, MODELSCOPE_I2V_AUTOLOAD="0")
    # Off is off: up to the import, all is as ModelScope ships it.
    assert report["before"] == ["modelscope.pipelines.multi_modal.image_to_video_pipeline", False, False]
    assert_ours(report)
    assert (report["status"]["way"], report["status"]["start_up_hook"]) == ("import", "off")


def test_import_before_modelscope_and_its_own_classes(by_wheel):
    code = f"""import modelscope_i2v
from modelscope.pipelines.multi_modal.video_to_video_pipeline import VideoToVideoPipeline
{REPORT}
report(by_path=VideoToVideoPipeline.__module__)
"""
    report = by_wheel.report(code, MODELSCOPE_I2V_AUTOLOAD="0")
    assert report["by_path"] == "modelscope_i2v.plugin.pipelines"
    assert_ours(report)
    assert report["status"]["way"] == "import"


@pytest.fixture
def package_index(wheel, tmp_path):
    """A package index on this machine that knows our wheel and nothing else; its address."""
    folder = tmp_path / "index" / "modelscope-i2v"
    folder.mkdir(parents=True)
    shutil.copy(wheel, folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_plugins_in_a_model_folder(by_wheel, wheel, package_index, tmp_path):
    """By name and by file."""
    configuration = {
        "framework": "pytorch",
        "task": "image-to-video",
        "model": {"type": "image-to-video-model"},
        "pipeline": {"type": "image-to-video-task-pipeline"},
        "plugins": ["modelscope_i2v", str(wheel)],
    }
    (tmp_path / "configuration.json").write_text(json.dumps(configuration))
    code = f"""{REPORT}
from modelscope.pipelines import pipeline
messages = []
for trust in False, True:
    try:
        pipeline("image-to-video", model={str(tmp_path)!r}, device="cpu", trust_remote_code=trust)
    except Exception as error:  # with trust, ours: the folder holds no weights
        messages.append(str(error))
    messages.append("modelscope_i2v" in sys.modules)
report(messages=messages)
"""
    done = by_wheel.run("-c", code, MODELSCOPE_I2V_AUTOLOAD="0", PIP_INDEX_URL=package_index)
    report = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in report["messages"][0]
    assert report["messages"][1] is False and report["messages"][-1] is True
    assert_ours(report)
    # The loader imports every public submodule, and says so where it cannot.
    assert "not imported" not in done.stdout + done.stderr


def test_modelscope_plugins_command_and_plugin_file(wheel, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.run("-m", "modelscope.cli.cli", "plugins", "install", str(wheel))
    assert environment.files() >= HOOK_FILES
    (environment.folder / ".modelscope_plugins").write_text("modelscope_i2v\n")
    code = f"""{REPORT}
from modelscope.utils.plugins import import_all_plugins
before = "modelscope_i2v" in sys.modules
report(before=before, plugins=import_all_plugins())
"""
    report = environment.report(code, MODELSCOPE_I2V_AUTOLOAD="0")
    assert (report["before"], report["plugins"]) == (False, ["modelscope_i2v"])
    assert_ours(report)
