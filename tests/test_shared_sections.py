"""The scripts are standalone and short, and what they share is the same lines in the same order."""

import ast
import shutil
import subprocess
import sys

import pytest
import shared_sections
from conftest import ROOT

SCRIPTS = shared_sections.SCRIPTS
AT_MOST = dict(zip(SCRIPTS, (720, 900, 920, 1150)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_have_not_drifted(name):
    assert shared_sections.rewritten(name) == (ROOT / name).read_text(), "run: python tests/shared_sections.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shared_section_is_there_and_in_order(name):
    _, sections = shared_sections.split((ROOT / name).read_text())
    assert tuple(title for title in sections if title in shared_sections.SHARED) == shared_sections.SHARED
    assert next(iter(sections)) == "Arguments" and list(sections)[-1] == "Experiment"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_in_one_sitting(name):
    assert len((ROOT / name).read_text().splitlines()) <= AT_MOST[name], "take something out"


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
    "analyze_grads.py": {"num_epochs", "save_epochs", "run_name", "resume"},
    "analyze_repr.py": {"save_epochs", "run_name", "resume"},
}


def arguments(script):
    """The source of each field of a script's Args, with its help."""
    tree = ast.parse((ROOT / script).read_text())
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    pairs = zip(args.body, args.body[1:])
    return {
        field.target.id: ast.dump(field) + ast.dump(text) for field, text in pairs if isinstance(field, ast.AnnAssign)
    }


@pytest.mark.parametrize("name", ARGUMENTS_OF_THEIR_OWN)
def test_arguments_of_one_name_are_the_same(name):
    """Type, default and help; where they differ, they are listed here."""
    ours, theirs = arguments(name), arguments(SCRIPTS[0])
    different = {argument for argument in ours.keys() & theirs.keys() if ours[argument] != theirs[argument]}
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
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--backbone" in result.stdout and "(default: 64)" in result.stdout
