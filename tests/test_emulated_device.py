"""All scripts on a device that is not the CPU: a tensor on the wrong device, a missing .cpu(), or
a float64 fails here as it would on a GPU or on Apple's mps."""

import pytest
import torch
from launcher import ROOT, shared_launcher

# Episodes of five steps, since the emulation is slow, and no figures, which are not its matter.
SCRIPT = """
import runpy, sys
import gymnasium
from emulated_device import EmulatedDevice
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
gymnasium.spec("Hopper-v5").max_episode_steps = 5
nothing = lambda *args, **options: None
Figure.savefig = Figure.tight_layout = FigureCanvasAgg.draw = SummaryWriter.add_figure = nothing
sys.argv = sys.argv[1:]
with EmulatedDevice():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIZE = [
    "--sample",
    "--env",
    "Hopper-v5",
    "--device",
    "npy",
    "--num-epochs",
    "1",
    "--batch-size",
    "2",
]
SIZE += ["--steps-per-epoch", "2", "--num-eval-episodes", "1", "--context-length", "2"]
SIZE += ["--dropout", "0.1", "--run-name", "npy"]
OF_SCRIPT = {
    "dt_pretrained.py": ["--backbone", "random"],
    "dt_no_context.py": ["--backbone", "random", "--attention-windows", "2"],
    "analyze_grads.py": [
        "--backbones",
        "random",
        "--norm-windows",
        "2",
        "--confusion-windows",
        "2",
    ],
    "analyze_repr.py": ["--backbones", "random", "--cka-windows", "4", "--mine-windows", "10"],
}
OF_SCRIPT["analyze_repr.py"] += [
    "--mine-batch-size",
    "5",
    "--mine-passes",
    "1",
    "--mine-steps",
    "1",
]


@pytest.fixture(scope="module")
def launcher():
    return shared_launcher()


@pytest.mark.parametrize("script", OF_SCRIPT)
def test_a_script_on_another_device(launcher, tmp_path, script):
    result = launcher.run(tmp_path, SCRIPT, ROOT / script, *SIZE, *OF_SCRIPT[script])
    assert result.status == 0, result.err


MISTAKES = """
import torch
from emulated_device import EmulatedDevice
with EmulatedDevice():
    x = torch.ones(2, device="npy")
    assert (x.cpu().numpy() == 1).all() and (x + x).device.type == "npy"
    for mistake in (lambda: x + torch.ones(2), lambda: x.numpy(), lambda: x.double()):
        try:
            mistake()
        except (RuntimeError, TypeError) as error:
            print(error)
"""


def test_mistakes_fail(launcher, tmp_path):
    result = launcher.run(tmp_path, MISTAKES)
    mixed, no_numpy, no_float64 = result.out.splitlines()
    assert "mixes" in mixed and "numpy" in no_numpy and "float64" in no_float64
