"""How the package waits for ModelScope, against a stand-in with its shape that takes no time to import.

That it works with ModelScope itself, and from an installation, is in ``test_installation.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STOCK_ENTRY = {"module": "stock", "imports": ["cv2"], "filepath": "stock.py"}
STOCK_KEY = ("MODELS", "image-to-video", "image-to-video-model")
OTHER_KEY = ("MODELS", "other", "other-model")
STAND_IN = {
    "__init__.py": "",
    "utils/__init__.py": "",
    "utils/import_utils.py": f"""
        class LazyImportModule:
            AST_INDEX = {{"index": {{{STOCK_KEY}: {STOCK_ENTRY}, {OTHER_KEY}: {STOCK_ENTRY}}}}}
        """,
    "models/__init__.py": "",
    "models/builder.py": "from modelscope.utils.import_utils import *; MODELS = 1",
    "preprocessors/__init__.py": "",
    "preprocessors/builder.py": "from modelscope.utils.import_utils import *",
    "preprocessors/base.py": "PREPROCESSOR_MAP = {}",
    "pipeline_inputs.py": "TASK_INPUTS = {}",
    "outputs/__init__.py": "",
    "outputs/outputs.py": "TASK_OUTPUTS = {}",
}


@pytest.fixture
def beside_stand_in(tmp_path):
    """Run code in a fresh interpreter, beside a stand-in for ModelScope, of which files may be given anew."""

    def run(code: str, files: dict | None = None, hook: bool = True) -> subprocess.CompletedProcess:
        for name, text in {**STAND_IN, **(files or {})}.items():
            path = tmp_path / "modelscope" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        begin = f"import sys, importlib; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        if hook:
            begin += "import os; del os.environ['MODELSCOPE_I2V_AUTOLOAD']\n"
            begin += "import _modelscope_i2v_autoload; _modelscope_i2v_autoload.start()\n"
        # Off, in case the package is installed where the tests run: what counts is the checkout.
        environment = {**os.environ, "MODELSCOPE_I2V_AUTOLOAD": "0"}
        command = [sys.executable, "-c", begin + textwrap.dedent(code)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


WITH_METHOD = """
    class LazyImportModule:
        table = {"index": {%s: %s, %s: %s}}
        get_ast_index = staticmethod(lambda: LazyImportModule.table)
        AST_INDEX = property()
    """ % (STOCK_KEY, STOCK_ENTRY, OTHER_KEY, STOCK_ENTRY)


@pytest.mark.parametrize("import_utils", [STAND_IN["utils/import_utils.py"], WITH_METHOD])
@pytest.mark.parametrize("first", ["models.builder", "preprocessors.builder"])
def test_either_form_of_the_index_is_repointed(import_utils, first, beside_stand_in):
    code = f"""
        import modelscope.{first}
        lazy = sys.modules["modelscope.utils.import_utils"].LazyImportModule
        index = (lazy.get_ast_index() if hasattr(lazy, "get_ast_index") else lazy.AST_INDEX)["index"]
        print(repr(index))
    """
    done = beside_stand_in(code, {"utils/import_utils.py": import_utils})
    index = ast.literal_eval(done.stdout)
    assert index.pop(OTHER_KEY) == STOCK_ENTRY
    assert index[STOCK_KEY] == {**STOCK_ENTRY, "module": "modelscope_i2v.plugin.models"}
    modules = sorted(entry["module"].rpartition(".")[2] for entry in index.values())
    assert modules == ["models"] * 4 + ["pipelines"] * 4 + ["preprocessors"] * 2 + ["trainers"] * 2
    assert all(entry.keys() == STOCK_ENTRY.keys() for entry in index.values())


def test_each_table_is_filled_as_it_is_imported_and_the_finder_goes(beside_stand_in):
    done = beside_stand_in("""
        import modelscope.pipeline_inputs, modelscope.outputs.outputs, modelscope.preprocessors.base
        print(len(modelscope.pipeline_inputs.TASK_INPUTS), len(modelscope.outputs.outputs.TASK_OUTPUTS))
        print(sorted(modelscope.preprocessors.base.PREPROCESSOR_MAP.values()))
        def waiting():
            return "_Activation" in [type(finder).__name__ for finder in sys.meta_path]
        import modelscope.preprocessors.builder
        print(waiting())
        import modelscope.models.builder
        print(waiting(), type(modelscope.models.builder.__loader__).__name__)
    """)
    assert done.stdout.splitlines() == [
        "2 2",
        "['image-to-video-preprocessor', 'video-to-video-preprocessor']",
        "True",
        "False SourceFileLoader",
    ]


@pytest.mark.parametrize(
    ("import_utils", "reason"),
    [("", "index of classes is in a place"), ("class LazyImportModule: AST_INDEX = {}", "KeyError: 'index'")],
)
def test_modelscope_goes_on_when_ours_cannot_be_registered(import_utils, reason, beside_stand_in):
    code = """
        import modelscope.models.builder
        print(modelscope.models.builder.MODELS)
        from modelscope_i2v.plugin.activation import activation_status
        status = activation_status()
        print(status["state"], status["error"])
    """
    done = beside_stand_in(code, {"utils/import_utils.py": import_utils})
    assert done.stdout.startswith("1\nfailed ") and reason in done.stdout
    assert "ModelScope goes on without it" in done.stderr and reason in done.stderr
    assert "Traceback" not in done.stderr


def test_an_import_of_modelscope_that_failed_is_tried_again(beside_stand_in):
    done = beside_stand_in(
        """
        try:
            import modelscope.models.builder
        except ZeroDivisionError as error:
            print(error)
        sys.again = True
        import modelscope.models.builder
        from modelscope_i2v.plugin.activation import activation_status
        print(activation_status())
        """,
        {"models/builder.py": STAND_IN["models/builder.py"] + "\nimport sys\nhasattr(sys, 'again') or 1 / 0"},
    )
    assert done.stdout.startswith("division by zero\n{'state': 'registered', 'way': 'start-up hook', ")


def test_imports_in_several_threads_at_once(beside_stand_in):
    in_the_middle = "import sys; sys.inside.set(); sys.go_on.wait(10)\n"
    done = beside_stand_in(
        """
        import threading
        sys.inside, sys.go_on = threading.Event(), threading.Event()
        def start(name):
            threads.append(threading.Thread(target=lambda: importlib.import_module(name), daemon=True))
            threads[-1].start()
        threads = []
        start("modelscope.models.builder")
        sys.inside.wait(10)
        for _ in range(4):
            start("modelscope_i2v")
        threads[-1].join(0.2)
        sys.go_on.set()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        import modelscope_i2v
        modelscope_i2v.activate()
        entries = sys.modules["modelscope.utils.import_utils"].LazyImportModule.AST_INDEX["index"]
        print(sum(entry["module"].startswith("modelscope_i2v.") for entry in entries.values()))
        print([type(f).__name__ for f in sys.meta_path if "modelscope_i2v" in type(f).__module__])
        """,
        {"models/builder.py": in_the_middle + STAND_IN["models/builder.py"]},
        hook=False,
    )
    assert (done.stdout, done.stderr) == ("12\n['StockModuleFinder', '_Activation']\n", "")
