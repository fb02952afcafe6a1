"""What several test files need: the scripts on the path, small models, and a way to run a script in this process."""

import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
sys.path.insert(0, str(ROOT))
os.environ.update(TOKENIZERS_PARALLELISM="false", TF_CPP_MIN_LOG_LEVEL="3")

TINY = ["--n-layer", "2", "--n-embd", "32", "--num-epochs", "2", "--steps-per-epoch", "6", "--num-eval-episodes", "2"]


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """Run a script as `python script.py arguments` would, in an empty folder; returns its exit status and output."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        output = capfd.readouterr()
        return SimpleNamespace(status=status, out=output.out, err=output.err)

    return run


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
