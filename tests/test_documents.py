"""What the documents say is so: tests that they name, settings, commands, and code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from modelscope_i2v import cli
from modelscope_i2v.settings.stages import SETTINGS_OF_STAGE, call_settings
from modelscope_i2v.settings.tables import keywords_table, settings_table, training_table, with_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = text[text.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


# Reliability


def promises() -> list[list[str]]:
    return [row for row in rows(RELIABILITY, "| promise | test |") if not row[0].startswith("**")]


def test_every_promise_names_a_test_that_is_there():
    assert len(promises()) > 30
    names = set()
    for promise, tests in promises():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("`") // 2, f"{promise}: {tests}"
        names.update(named)
    for file, name in sorted(names):
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{file}::{name}"


def test_limits_are_as_documented():
    settings = [each() for each in SETTINGS_OF_STAGE.values()]
    table = "\n".join(" | ".join(row) for row in rows(RELIABILITY, "| of | default | raised by |"))
    for name in ("limit_pixels", "limit_frames", "limit_steps"):
        (value,) = {getattr(each, name) for each in settings}
        assert re.search(rf"\b{value:,}\b.*`{name}`", table), name
        (cells,) = [row for row in rows(README, "| key | default") if f"`{name}`" in row[0]]
        assert re.search(rf"\b{value}\b", cells[1]), name


# README


def test_its_tables_are_those_of_the_declarations():
    assert with_tables(README) == README, "run python -m modelscope_i2v.settings.tables README.md"
    for name, table in (("settings", settings_table), ("keywords", keywords_table)):
        assert f"<!-- {name}:begin -->\n{table()}<!-- {name}:end -->" in README
    settings = {name for stage in SETTINGS_OF_STAGE.values() for name in stage.names()}
    assert set(re.findall(r"^\| `(\w+)`", settings_table(), re.MULTILINE)) == settings
    keywords = {each.keyword for stage in SETTINGS_OF_STAGE for each in call_settings(stage).values()}
    assert set(re.findall(r"^\| `(\w+)`", keywords_table(), re.MULTILINE)) == keywords


def test_the_table_of_training_is_that_of_the_declarations():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m modelscope_i2v.settings.tables docs/training.md"
    assert f"<!-- training:begin -->\n{training_table()}<!-- training:end -->" in text


def test_its_two_commands_are_those_that_are_run():
    demo, test = (block.strip() for block in code_blocks("sh")[:2])
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert test in lines
    install, command = demo.split(" && ")
    assert install == "pip install ." and command in {f"modelscope-i2v {each.name}" for each in cli.COMMANDS}


def test_links_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_its_code_compiles():
    blocks = code_blocks("python")
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "README.md", "exec")
