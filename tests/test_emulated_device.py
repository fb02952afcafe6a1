"""All scripts on a device that is not the CPU: a tensor on the wrong device, a missing .cpu(), or
a float64 fails here as it would on a GPU or on Apple's mps."""

import pytest
from launcher import ROOT, shared_launcher

# Episodes of two steps, since the emulation is slow, and figures that are not really drawn.
SCRIPT = """
import runpy, sys
import gymnasium, imageio.v3, numpy
from emulated_device import EmulatedDevice
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

def save_a_dot(figure, path, **options):
    imageio.v3.imwrite(path, numpy.zeros((1, 1, 3), numpy.uint8))

gymnasium.spec("Hopper-v5").max_episode_steps = 2
FigureCanvasAgg.draw = Figure.tight_layout = lambda *args, **options: None
Figure.savefig = save_a_dot
sys.argv = sys.argv[1:]
with EmulatedDevice():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIZE = "--sample --env Hopper-v5 --device npy --num-epochs 1 --steps-per-epoch 1 --batch-size 2 "
SIZE += "--num-eval-episodes 1 --context-length 2 --dropout 0.1"
OF_SCRIPT = {
    "dt_pretrained.py": "--backbone random",
    "dt_no_context.py": "--backbone random --attention-windows 2",
    "analyze_grads.py": "--backbones random --norm-windows 2 --confusion-windows 2",
    "analyze_repr.py": "--backbones random --cka-windows 4 --mine-windows 10 "
    "--mine-batch-size 5 --mine-passes 1 --mine-steps 1",
}


@pytest.fixture(scope="module")
def launcher():
    return shared_launcher()


@pytest.mark.parametrize("script", OF_SCRIPT)
def test_a_script_on_another_device(launcher, tmp_path, script):
    arguments = f"{SIZE} {OF_SCRIPT[script]}".split()
    result = launcher.run(tmp_path, SCRIPT, ROOT / script, *arguments)
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
