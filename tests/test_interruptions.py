"""Runs that are killed at any moment and go on, damaged folders, and several processes.

As often as you like: python tests/test_interruptions.py FOLDER KILLS
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_sentence, load_data, without_progress_bars
from launcher import TRAIN, shared_launcher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dt_pretrained as dt

COMMAND = ["--sample", "--backbone", "random", "--run-name", "whole", "--num-epochs", "2"]
COMMAND += ["--steps-per-epoch", "10", "--context-length", "5", "--num-eval-episodes", "2"]
COMMAND += ["--dropout", "0.2"]

# Before TRAIN: the process kills itself halfway through the n-th write of a file, or right before
# the n-th write if that is a replacement.
KILL_IN_SAVE = """
import os, signal, sys
from pathlib import Path
import pandas, torch

writes_left = int(sys.argv.pop(1))

def killing(write):
    def wrapper(content, path, **options):
        global writes_left
        writes_left -= 1
        if writes_left == 0:
            if write is not replace:
                write(content, path, **options)
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(content, path, **options)
    return wrapper

replace = Path.replace
torch.save = killing(torch.save)
pandas.DataFrame.to_csv = killing(pandas.DataFrame.to_csv)
Path.replace = killing(replace)
"""


@pytest.fixture(scope="module")
def launcher():
    return shared_launcher()


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    result = launcher.run(folder, TRAIN, *COMMAND)
    assert result.status == 0, result.err
    return folder / "runs" / "whole"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that folder; what is started in tmp_path goes on with it."""
    return Path(shutil.copytree(whole, tmp_path / "runs" / "whole"))


def assert_same(folder, reference):
    """All that must not depend on what happened to a run is the same, bit for bit."""
    assert (folder / "log.csv").read_bytes() == (reference / "log.csv").read_bytes()
    names = sorted(path.name for path in reference.glob("*.pt"))
    assert names == sorted(path.name for path in folder.glob("*.pt"))
    for name in names:
        ours = torch.load(folder / name, weights_only=True)
        theirs = torch.load(reference / name, weights_only=True)
        assert ours.keys() == theirs.keys() and ours["epoch"] == theirs["epoch"]
        for part in ("model", "optimizer"):
            torch.testing.assert_close(ours.get(part), theirs.get(part), rtol=0, atol=0)


def scalars(folder):
    """{tag: {step: value}} as TensorBoard shows them; no step is there twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
        assert len(found[tag]) == len(events.Scalars(tag)), f"{tag} is doubled"
    return found


def assert_tensorboard_shows_the_log(folder):
    log = pd.read_csv(folder / "log.csv")
    columns = {f"train/{name}": name for name in dt.METRICS}
    columns |= {f"eval/{name}": name for name in ("return", "length", "score")}
    shown = scalars(folder)
    assert shown.keys() == columns.keys()
    for tag, column in columns.items():
        expected = log.dropna(subset=column).groupby("step")[column].mean()
        assert shown[tag] == pytest.approx(expected.to_dict(), rel=1e-6), tag


def start_training(launcher, folder, command):
    """Start the script and wait until it begins to train; returns the id of the process."""
    before = len(list(folder.rglob("events*")))
    process = launcher.start(folder, TRAIN, *command)
    while len(list(folder.rglob("events*"))) == before:
        time.sleep(0.005)
    return process


def kill_and_go_on(launcher, folder, moments, command):
    """SIGKILL the script at moments ("write", n-th) or ("time", seconds), then let it finish.

    Each time the same command goes on.
    """
    for kind, moment in moments:
        if kind == "write":
            launcher.start(folder, KILL_IN_SAVE + TRAIN, moment, *command)
        else:
            process = start_training(launcher, folder, command)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        result = launcher.wait()
        if kind == "write":
            assert result.status == -signal.SIGKILL, f"{kind} {moment}: {result.err}"
        for latest in folder.rglob("latest.pt"):
            torch.load(latest, weights_only=True)  # whole, whenever it was
    assert launcher.run(folder, TRAIN, *command).status == 0


def test_killed_again_and_again_even_while_saving(launcher, whole, tmp_path):
    """Within each file of an epoch: log.csv, epoch_N.pt, (best.pt,) latest.tmp; and before
    latest.tmp replaces latest.pt."""
    before_training = [("write", n) for n in (1, 2, 3, 4)]
    while_training = [("write", 5), ("time", 0.05), ("write", 2), ("write", 3), ("write", 4)]
    moments = [*before_training, *while_training, ("write", 5), ("write", 6)]
    kill_and_go_on(launcher, tmp_path, moments, COMMAND)
    assert_same(tmp_path / "runs" / "whole", whole)
    assert_tensorboard_shows_the_log(tmp_path / "runs" / "whole")


def test_tensorboard_shows_the_log(whole):
    assert_tensorboard_shows_the_log(whole)


def test_a_finished_run_is_trained_on(launcher, whole, run, tmp_path):
    """Two epochs and one more are three epochs; the first two stay, on the screen as well."""
    result = launcher.run(tmp_path, TRAIN, *COMMAND, "--num-epochs", "3")
    assert result.status == 0 and "goes on after epoch 2" in result.out
    log = pd.read_csv(run / "log.csv")
    pd.testing.assert_frame_equal(log[log.epoch < 3], pd.read_csv(whole / "log.csv"))
    assert log.step.max() == 30 and (run / "epoch_3.pt").exists()
    assert_tensorboard_shows_the_log(run)


def test_another_argument_is_refused_by_name(launcher, run, tmp_path):
    result = launcher.run(tmp_path, TRAIN, *COMMAND, "--batch-size", "16")
    assert_one_sentence(result, "batch_size = 8, not 16", "--run-name")


def test_after_a_divergence_a_lower_learning_rate_goes_on(launcher, tmp_path):
    blow_up = [*COMMAND, "--learning-rate", "1e30", "--warmup-steps", "0", "--max-grad-norm", "inf"]
    result = launcher.run(tmp_path, TRAIN, *blow_up)
    assert_one_sentence(result, "not finite", "--run-name whole", "lower --learning-rate")
    result = launcher.run(tmp_path, TRAIN, *blow_up, "--learning-rate", "1e-3")
    assert result.status == 0 and "goes on after epoch 0" in result.out, result.err
    log = pd.read_csv(tmp_path / "runs" / "whole" / "log.csv")
    assert log.step.max() == 20 and np.isfinite(log.loss.dropna()).all()
    assert_tensorboard_shows_the_log(tmp_path / "runs" / "whole")


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_damaged_checkpoint_is_refused(launcher, run, tmp_path, share):
    path = run / "latest.pt"
    os.truncate(path, int(share * path.stat().st_size))
    assert_one_sentence(launcher.run(tmp_path, TRAIN, *COMMAND), "latest.pt", "damaged")


def test_no_pickled_code_is_run(launcher, run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"model": Evil()}, run / "latest.pt")
    assert_one_sentence(launcher.run(tmp_path, TRAIN, *COMMAND), "latest.pt")
    assert not (tmp_path / "evil").exists()


def test_control_c_says_how_to_go_on(launcher, tmp_path):
    os.kill(start_training(launcher, tmp_path, [*COMMAND, "--num-epochs", "9"]), signal.SIGINT)
    result = launcher.wait()
    (sentence,) = without_progress_bars(result.err)
    assert result.status == 1 and "goes on" in sentence and "--run-name whole" in sentence


# torchrun's agent with two processes that run the script; one plain gradient step in each.
TWO_PROCESSES = """
import contextlib, runpy, sys
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

class SGD(torch.optim.SGD):
    def __init__(self, parameters, **others):
        super().__init__(parameters)

def script():
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")

torch.optim.AdamW = SGD
sys.argv = sys.argv[1:]
options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **options), script)()
"""


def test_gradients_of_two_processes_are_averaged(launcher, tmp_path):
    """The new weights follow from both processes' windows."""
    one_step = ["--num-epochs", "1", "--steps-per-epoch", "1", "--learning-rate", "1"]
    one_step += ["--warmup-steps", "0", "--max-grad-norm", "inf", "--dropout", "0"]
    result = launcher.run(tmp_path, TWO_PROCESSES, dt.__file__, *COMMAND, *one_step)
    assert result.status == 0 and result.out.count("epoch 1: return") == 1, result.err
    run = tmp_path / "runs" / "whole"
    before, args = dt.load_model(run / "epoch_0.pt", "cpu")
    after, _ = dt.load_model(run / "epoch_1.pt", "cpu")
    data = load_data(dt, args)
    gradients = []
    for rank in (0, 1):
        rng = np.random.default_rng([666, 1, rank])
        rng.integers(2**60)
        starts = torch.as_tensor(rng.integers(len(data.states), size=(1, 4))[0])
        loss, _ = dt.training_loss(before, data.windows(starts, 5))
        gradients.append(torch.autograd.grad(loss, list(before.parameters())))
    for old, new, first, second in zip(before.parameters(), after.parameters(), *gradients):
        torch.testing.assert_close(new - old, -(first + second) / 2, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    parent, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    rng = random.Random(0)
    moments = []
    for _ in range(count):
        # An epoch writes three to five times: after the seventh it has come further.
        write = ("write", rng.randint(1, 7))
        moments.append(rng.choice([write, ("time", rng.uniform(0, 1.5))]))
    command = [*COMMAND, "--steps-per-epoch", "100", "--num-epochs", str(2 * count)]
    launcher = shared_launcher()
    for name in ("alone", "killed"):
        (parent / name).mkdir(parents=True)
        kill_and_go_on(launcher, parent / name, moments if name == "killed" else [], command)
    assert_same(parent / "killed" / "runs" / "whole", parent / "alone" / "runs" / "whole")
    assert_tensorboard_shows_the_log(parent / "killed" / "runs" / "whole")
    print(f"{count} kills: the same")
