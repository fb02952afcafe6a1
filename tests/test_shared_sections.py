"""The scripts are standalone, and what they share is the same lines in the same order."""

import ast
import shutil
import subprocess
import sys

import pytest
import shared_sections
from conftest import ROOT

SCRIPTS = shared_sections.SCRIPTS
SOME_ONLY = {"Video": SCRIPTS[:2], "Study": SCRIPTS[2:]}  # the others record no video, and make one run


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_have_not_drifted(name):
    assert shared_sections.rewritten(name) == (ROOT / name).read_text(), "run: python tests/shared_sections.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shared_section_is_there_and_in_order(name):
    _, sections = shared_sections.split((ROOT / name).read_text())
    expected = [title for title in shared_sections.SHARED if name in SOME_ONLY.get(title, SCRIPTS)]
    assert [title for title in sections if title in shared_sections.SHARED] == expected
    assert list(sections)[0] == "Arguments" and list(sections)[-1] == "Experiment"


@pytest.mark.parametrize(
    "name,old,new",
    [("dt_no_context.py", "RETURN_SCALE = 1000", "RETURN_SCALE = 1"), ("analyze_repr.py", "def read_records", "def records")],
)
def test_drift_is_noticed(name, old, new, tmp_path, monkeypatch):
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    copy = tmp_path / name
    whole = copy.read_text()
    copy.write_text(whole.replace(old, new, 1))
    monkeypatch.setattr(shared_sections, "ROOT", tmp_path)
    assert shared_sections.rewritten(name) == whole != copy.read_text()


ARGUMENTS_OF_THEIR_OWN = {
    "dt_no_context.py": {"context_length"},
    "analyze_grads.py": {"backbone", "max_grad_norm", "num_epochs", "save_epochs", "run_name", "resume"},
    "analyze_repr.py": {"backbone", "sample", "save_epochs", "run_name", "resume"},
}


@pytest.mark.parametrize("name", ARGUMENTS_OF_THEIR_OWN)
def test_arguments_of_one_name_are_the_same(name):
    """Type, default and help; where they differ, they are listed here."""

    def arguments(script):
        tree = ast.parse((ROOT / script).read_text())
        (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
        fields = zip(args.body, args.body[1:])
        return {field.target.id: ast.dump(field) + ast.dump(text) for field, text in fields if isinstance(field, ast.AnnAssign)}

    ours, theirs = arguments(name), arguments(SCRIPTS[0])
    assert {argument for argument in ours.keys() & theirs.keys() if ours[argument] != theirs[argument]} == (
        ARGUMENTS_OF_THEIR_OWN[name]
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_standalone(name, tmp_path):
    """No script imports another one, and a copy in an empty folder answers --help."""
    imported = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.ImportFrom)}
    assert not imported & {script.removesuffix(".py") for script in SCRIPTS}
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--backbone" in result.stdout and "(default: 0.25)" in result.stdout
