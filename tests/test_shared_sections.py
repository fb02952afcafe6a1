"""The scripts are standalone, and what they share is the same lines in the same order."""

import ast
import shutil
import subprocess
import sys

import pytest
import shared_sections
from conftest import ROOT

SCRIPTS = shared_sections.SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_have_not_drifted(name):
    text = (ROOT / name).read_text()
    assert shared_sections.rewritten(name) == text, "run: python tests/tools/shared_sections.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shared_section_is_there_and_in_order(name):
    _, sections = shared_sections.split((ROOT / name).read_text())
    shared = [title for title in sections if title in shared_sections.SHARED]
    assert tuple(shared) == shared_sections.SHARED
    assert next(iter(sections)) == "Arguments" and list(sections)[-1] == "Experiment"


def test_drift_is_noticed(tmp_path, monkeypatch):
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    copy = tmp_path / "dt_no_context.py"
    whole = copy.read_text()
    copy.write_text(whole.replace("RETURN_SCALE = 1000", "RETURN_SCALE = 1", 1))
    monkeypatch.setattr(shared_sections, "ROOT", tmp_path)
    assert shared_sections.rewritten("dt_no_context.py") == whole != copy.read_text()


ARGUMENTS_OF_THEIR_OWN = {
    "dt_no_context.py": {"context_length"},
    "analyze_grads.py": {"backbone", "max_grad_norm", "num_epochs", "save_epochs"},
    "analyze_repr.py": {"backbone", "save_epochs"},
}


def arguments(script):
    """The source of each field of a script's Args, with its help."""
    tree = ast.parse((ROOT / script).read_text())
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = {}
    for field, text in zip(args.body, [*args.body[1:], ast.Pass()]):
        if isinstance(field, ast.AnnAssign):
            fields[field.target.id] = ast.dump(field) + ast.dump(text)
    return fields


@pytest.mark.parametrize("name", ARGUMENTS_OF_THEIR_OWN)
def test_arguments_of_one_name_are_the_same(name):
    """Type, default and help; where they differ, they are listed here."""
    ours, theirs = arguments(name), arguments(SCRIPTS[0])
    different = {arg for arg in ours.keys() & theirs.keys() if ours[arg] != theirs[arg]}
    assert different == ARGUMENTS_OF_THEIR_OWN[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_standalone(name, tmp_path):
    """No script imports another one, and a copy in an empty folder answers --help."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert not imported & {script.removesuffix(".py") for script in SCRIPTS}
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run(
        [sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and "--backbone" in result.stdout
    assert "(default: 64)" in result.stdout
