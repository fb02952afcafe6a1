"""What several test files need: the scripts on the path, small models and runs, and ways to run a script."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
sys.path.insert(0, str(ROOT))
os.environ.update(TOKENIZERS_PARALLELISM="false", TF_CPP_MIN_LOG_LEVEL="3")

TINY = ["--sample", "--steps-per-epoch", "6", "--num-eval-episodes", "2", "--batch-size", "8", "--precision", "fp32"]
TINY += ["--dropout", "0.2"]
SHAPE = dict(state_dim=11, act_dim=3, max_timestep=1000)


def sample_args(module, **changes):
    """Arguments of a script for the bundled Hopper data, as parse_arguments fills them in."""
    defaults = dict(env="Hopper-v5", dataset="sample/hopper/medium-v0", sample=True, device="cpu", precision="fp32")
    return module.Args(**defaults | dict(target_return=3600.0) | changes)


def make_model(module, backbone, load=None, **shape):
    """The model that a script would start training from, in evaluation mode."""
    torch.manual_seed(0)
    args = sample_args(module)
    args.backbone = backbone
    blocks, final_norm, weights, _ = (load or module.load_backbone)(args)
    model = module.DecisionTransformer(blocks, final_norm, **SHAPE | shape)
    model.transformer.load_state_dict(model.transformer.state_dict() | weights)
    return model.eval()


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """Run a script as `python script.py arguments` would, in an empty folder; returns its exit status and output."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
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


def finish(process):
    """Wait for a program; returns its exit status and its output, errors without progress bars."""
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "|" not in line]
    return process.returncode, out, lines


def sentence(result, *words):
    """Check that a script has ended with exit status 2 and one sentence with these words."""
    lines = [line for line in result.err.replace("\r", "\n").splitlines() if line.strip() and "|" not in line]
    assert result.status == 2 and len(lines) == 1 and "Traceback" not in result.err, result.err
    assert all(word in lines[0] for word in words), lines[0]
