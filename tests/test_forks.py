"""Forks that a researcher makes on a Friday afternoon: each is a few changed lines of a copy.

README.md shows the same lines. Each fork patches dt_pretrained.py, runs it for a few steps, and is
seen to do what it is for.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

# Each is a list of (lines to replace, lines to put there); README.md has them as diffs.
FORKS = {
    "another optimizer": [
        ("    optimizer = torch.optim.AdamW(\n", "    optimizer = torch.optim.SGD(\n"),
        ("        eps=1e-6 if backbone.pretrained else 1e-8,  # [utils.py#L60]\n", ""),
    ],
    "a new metric": [
        (
            'METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")',
            'METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction", "head_norm")',
        ),
        (
            "            metrics[i] = torch.stack([loss.detach(), saturated_fraction, grad_norm, clipped])\n",
            "            head_norm = model.embed_action.weight.detach().norm()\n"
            "            metrics[i] = torch.stack(\n"
            "                [loss.detach(), saturated_fraction, grad_norm, clipped, head_norm]\n"
            "            )\n",
        ),
    ],
    "another activation": [
        (
            '        block = replace(block, n_head=1, activation="relu")\n',
            '        block = replace(block, n_head=1, activation="gelu")\n',
        ),
    ],
    "another loss": [
        (
            "    squared_error = (predicted - windows.actions).square()\n",
            "    squared_error = (predicted - windows.actions).abs()\n",
        ),
    ],
    "no warm-up": [
        (
            "        optimizer, lambda steps_done: min((steps_done + 1) / max(1, args.warmup_steps), 1)\n",
            "        optimizer, lambda steps_done: 1\n",
        ),
    ],
    "three blocks": [
        (
            "    num_blocks = 4 if args.sample else 12\n",
            "    num_blocks = 3\n",
        ),
    ],
}
RUN = [*TINY, "--backbone", "random", "--num-epochs", "1", "--run-name", "fork"]


def changed_lines(changes):
    """How many lines of a diff begin with a plus, or with a minus if nothing takes their place."""
    return sum(max(old.count("\n"), new.count("\n"), 1) for old, new in changes)


def run(script, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), *RUN],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "runs" / "fork" / "summary.json").read_text())
    return summary, result.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return run(ROOT / "dt_pretrained.py", tmp_path_factory.mktemp("original"))[0]


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_is_at_most_five_lines_and_does_what_it_is_for(name, original, tmp_path):
    text = (ROOT / "dt_pretrained.py").read_text()
    for old, new in FORKS[name]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    assert changed_lines(FORKS[name]) <= 5
    (tmp_path / "dt_fork.py").write_text(text)
    (tmp_path / "tests").mkdir()
    shutil.copytree(ROOT / "tests" / "assets", tmp_path / "tests" / "assets")
    summary, err = run(tmp_path / "dt_fork.py", tmp_path)
    before, after = original["epochs"][0], summary["epochs"][0]
    if name == "a new metric":
        assert summary["epochs"][1]["head_norm"] > 0 and "head_norm" in summary["history"][0]
        assert "head_norm" in err  # in the progress bar
    elif name in ("another activation", "three blocks"):
        assert after["return_mean"] != before["return_mean"]  # another model from the start
    else:
        assert after["return_mean"] == before["return_mean"]  # the same model, trained otherwise
        assert summary["epochs"][1]["return_mean"] != original["epochs"][1]["return_mean"]


@pytest.mark.parametrize("name", FORKS)
def test_the_readme_shows_the_same_lines(name):
    shown = (ROOT / "README.md").read_text().splitlines()
    for old, new in FORKS[name]:
        for sign, lines in (("-", old), ("+", new)):
            assert all(sign + line in shown for line in lines.splitlines())
