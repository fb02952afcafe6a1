"""What several test files need: the scripts on the path, small models and runs, ways to run one."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
os.environ.update(TOKENIZERS_PARALLELISM="false", TF_CPP_MIN_LOG_LEVEL="3")

TINY = ["--sample", "--steps-per-epoch", "6", "--num-eval-episodes", "2", "--batch-size", "8"]
TINY += ["--dropout", "0.2"]


def sample_args(module, **changes):
    """Arguments of a script for the bundled Hopper data, as complete_arguments leaves them."""
    fields = {
        "env": "Hopper-v5",
        "dataset": "sample/hopper/medium-v0",
        "sample": True,
        "device": "cpu",
        "precision": "fp32",
        "target_return": 3600.0,
    }
    return module.Args(**{**fields, **changes})


def load_data(module, args):
    return module.OfflineData(module.load_episodes(args, module.make_env(args, 1)), args)


def make_model(module, backbone, seed=0, state_dim=11, act_dim=3, max_timestep=1000):
    """The model that a script would start training from, in evaluation mode.

    `backbone` is a name, or a Backbone.
    """
    if isinstance(backbone, str):
        backbone = module.load_backbone(sample_args(module, backbone=backbone))
    data = SimpleNamespace(
        states=torch.zeros(1, state_dim),
        actions=torch.zeros(1, act_dim),
        state_mean=torch.zeros(state_dim),
        state_std=torch.ones(state_dim),
    )
    return module.make_model(sample_args(module, seed=seed), backbone, data, max_timestep).eval()


def pytest_configure(config):
    # The paper's -v4; the scripts ignore this warning, too.
    config.addinivalue_line("filterwarnings", "ignore:.*is out of date.*")


@pytest.fixture(autouse=True)
def interrupt_handler():
    """Scripts say how to go on after Ctrl-C; pytest is to have its own way afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def figures_as_dots(monkeypatch):
    """Figures are made but neither laid out nor painted, which takes seconds; a dot is saved."""

    def savefig(figure, path, **options):
        imageio.imwrite(path, np.zeros((1, 1, 3), dtype=np.uint8))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    monkeypatch.setattr("matplotlib.figure.Figure.tight_layout", lambda *args, **options: None)
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda canvas: None)


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """Run `python script.py arguments` in an empty folder; returns its exit status and output."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):  # what Python itself would do with it
                print(status, file=sys.stderr)
                status = 1
        output = capfd.readouterr()
        return SimpleNamespace(status=status, out=output.out, err=output.err)

    return run


def start(folder, *arguments, program=("dt_pretrained.py",), **options):
    """Start `python program arguments` in `folder`, on one thread."""
    program = [str(ROOT / part) if part.endswith(".py") else part for part in program]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def without_progress_bars(text):
    lines = text.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "|" not in line]


def finish(process):
    """Wait for a program; returns its exit status, its output and its errors, line by line."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, without_progress_bars(err)


def assert_one_sentence(result, *words):
    """A script has ended with a status that is not 0 and one sentence with these words."""
    lines = without_progress_bars(result.err)
    assert result.status != 0 and len(lines) == 1 and "Traceback" not in result.err, result.err
    assert all(word in lines[0] for word in words), lines[0]
