"""The scripts are standalone, and what they share is the same lines in the same order."""

import ast
import shutil

import pytest
import shared_sections
from conftest import ROOT
from launcher import shared_launcher

SCRIPTS = shared_sections.SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_have_not_drifted(name):
    text = (ROOT / name).read_text()
    assert shared_sections.rewritten(name) == text, "run: python tests/tools/shared_sections.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shared_section_is_there_and_in_order(name):
    _, sections = shared_sections.split((ROOT / name).read_text())
    expected = list(shared_sections.SHARED)
    if name != SCRIPTS[0]:
        expected.insert(1, "Arguments of the analysis")
        expected.insert(-1, "Runs")
    titles = list(sections)
    assert [title for title in titles if title in expected] == expected
    assert titles[0] == "Arguments" and titles[-2:] == ["Utilities", "Experiment"]


@pytest.mark.parametrize(
    "script,line", [("analyze_grads.py", "class Block"), ("analyze_repr.py", "def read_logs")]
)
def test_drift_is_noticed_and_mended(script, line, tmp_path, monkeypatch):
    """In a section from dt_pretrained.py, and in the one that only the analyses share."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(shared_sections, "ROOT", tmp_path)
    in_step = shared_sections.rewritten(script)
    (tmp_path / script).write_text(in_step.replace(line, f"# other\n{line}", 1))
    assert shared_sections.rewritten(script) == in_step != (tmp_path / script).read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_imports_another(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported and not imported & {script.removesuffix(".py") for script in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_in_an_empty_folder_answers_help(name, tmp_path):
    shutil.copy(ROOT / name, tmp_path)
    result = shared_launcher().run(tmp_path, tmp_path / name, "--help")
    assert result.status == 0, result.err
    assert result.out.count("--backbone STR") == 1
    assert result.out.count("(default: 64)") == 1  # ranges do not hide the values
