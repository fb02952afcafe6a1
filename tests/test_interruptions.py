"""Runs that are killed at any moment and resumed, damaged folders, and several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_sentence, finish, load_data, sample_args, start

import dt_pretrained as dt

COMMAND = [
    *TINY,
    "--backbone",
    "random",
    "--num-epochs",
    "3",
    "--steps-per-epoch",
    "40",
    "--context-length",
    "5",
]


def same(run, reference):
    """Whether everything that must not depend on what happened to a run is the same, bit for bit."""
    names = sorted(path.name for path in reference.glob("*.pt"))
    if names != sorted(path.name for path in run.glob("*.pt")):
        return False
    for name in names:
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, reference))
        if not all(torch.equal(ours["model"][k], theirs["model"][k]) for k in theirs["model"]):
            return False
    for record in (*ours.get("records", ()), *theirs.get("records", ())):
        del record["seconds"]
    ours, theirs = dt.read_run(run), dt.read_run(reference)
    for record in (*ours.records, *theirs.records):
        del record["seconds"]
    return json.dumps(ours[2:]) == json.dumps(theirs[2:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, *COMMAND, "--run-name", "whole"))[0] == 0
    return folder / "runs" / "whole"


KILL_IN_SAVE = """
import os, runpy, signal, sys
saves_left, replace = int(sys.argv.pop(1)), os.replace
def killing_replace(*paths):
    global saves_left
    saves_left -= 1
    if saves_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = killing_replace
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_and_go_on(folder, moments, script="dt_pretrained.py", command=COMMAND):
    """SIGKILL a script in `folder` at the moments ("save", n-th) or ("time", seconds), then finish it.

    Each time the same command goes on. Returns the number of kills.
    """
    run, kills, arguments = folder / "runs" / "whole", 0, [*command, "--run-name", "whole"]
    for kind, moment in moments:
        if kind == "save":
            program = ("-c", KILL_IN_SAVE)
            process = start(folder, moment, ROOT / script, *arguments, program=program)
        else:
            process = start(folder, *arguments, program=(script,))
            events = len(list(run.rglob("events*")))
            while len(list(run.rglob("events*"))) == events and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moment)
            process.kill()
        kills += process.wait(timeout=200) == -signal.SIGKILL
        process.communicate()
        for latest in run.rglob("latest.pt"):
            torch.load(latest, weights_only=True)  # whole, whenever it was
    assert finish(start(folder, *arguments, program=(script,)))[0] == 0
    return kills


def test_killed_again_and_again_even_while_saving(whole, tmp_path):
    moments = [("save", 3), ("time", 0.3)]
    assert kill_and_go_on(tmp_path, moments) >= 1
    assert same(tmp_path / "runs" / "whole", whole)


def test_a_finished_run_is_trained_on(whole, run_script, tmp_path):
    """Three epochs and one more are four epochs; the first three stay."""
    shutil.copytree(whole, tmp_path / "runs" / "whole")
    longer = [*COMMAND, "--run-name", "whole", "--num-epochs", "4"]
    result = run_script("dt_pretrained.py", *longer)
    assert result.status == 0 and "goes on after epoch 3" in result.out
    four = dt.read_run(tmp_path / "runs" / "whole").records
    three = dt.read_run(whole).records
    assert json.dumps(four[:4]) == json.dumps(three) and four[4]["step"] == 160
    assert (tmp_path / "runs" / "whole" / "epoch_4.pt").exists()


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    with dt.replacing(path) as temporary:
        temporary.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), dt.replacing(path) as temporary:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"


def test_numbers_that_blow_up_end_the_run(run_script, tmp_path):
    blow_up = [
        "--learning-rate",
        "1e30",
        "--warmup-steps",
        "0",
        "--max-grad-norm",
        "0",
        "--run-name",
        "a",
    ]
    assert_one_sentence(
        run_script("dt_pretrained.py", *COMMAND, *blow_up), "--learning-rate", "not finite"
    )
    latest = torch.load(tmp_path / "runs" / "a" / "latest.pt", weights_only=True)
    assert latest["step"] == 0 and all(v.isfinite().all() for v in latest["model"].values())


def test_damaged_checkpoints_are_refused(whole, run_script, tmp_path):
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    content = (run / "latest.pt").read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:-10], b"nonsense"):
        (run / "latest.pt").write_bytes(damage)
        longer = [*COMMAND, "--num-epochs", "4", "--run-name", "whole"]
        assert_one_sentence(run_script("dt_pretrained.py", *longer), "latest.pt", "damaged")


def test_no_pickled_code_is_run(whole, run_script, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    torch.save({"model": Evil()}, run / "latest.pt")
    longer = [*COMMAND, "--num-epochs", "4", "--run-name", "whole"]
    assert_one_sentence(run_script("dt_pretrained.py", *longer), "latest.pt")
    assert not (tmp_path / "evil").exists()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_train_one_model(tmp_path):
    """torchrun with gloo on the CPU: one evaluation and one set of files, as from one process."""
    arguments = [*COMMAND, "--num-epochs", "2"]
    program = (*TORCHRUN, "dt_pretrained.py")
    status, out, _ = finish(start(tmp_path, *arguments, "--run-name", "two", program=program))
    assert status == 0 and out.count("epoch 1: return") == 1
    records = dt.read_run(tmp_path / "runs" / "two").records
    assert records[2]["step"] == 80 and 0 < records[2]["loss"] < 2


SLOW_FIRST_PROCESS = """
import os, runpy, sys, time
if os.environ["RANK"] == "0":
    time.sleep(3)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_processes_cannot_share_is_said_once(tmp_path):
    """Also where the process that says it is the last to know."""
    (tmp_path / "slow.py").write_text(SLOW_FIRST_PROCESS)
    program = (*TORCHRUN, str(tmp_path / "slow.py"), "dt_pretrained.py")
    process = start(tmp_path, *TINY, "--batch-size", "3", program=program)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and err.count("--batch-size 3 cannot be shared evenly by 2") == 1


def test_two_processes_of_one_name_do_not_take_each_others_files(tmp_path):
    path = tmp_path / "file"
    with dt.replacing(path) as ours:
        ours.write_text("ours")
        command = "import sys, pathlib, dt_pretrained as dt\n"
        command += "with dt.replacing(pathlib.Path(sys.argv[1])) as theirs: theirs.write_text('x')"
        subprocess.run([sys.executable, "-c", command, str(path)], cwd=ROOT, check=True)
    assert path.read_text() == "ours"


ONE_STEP = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import dt_pretrained as dt
from conftest import load_data, sample_args
args = sample_args(dt, batch_size=8, num_epochs=1, steps_per_epoch=1, num_eval_episodes=1,
                   backbone="random", dropout=0.0, learning_rate=1.0, warmup_steps=0, max_grad_norm=0.0)
class SGD(torch.optim.SGD):
    def __init__(self, parameters, lr, **others):
        super().__init__(parameters, lr=lr)
torch.optim.AdamW = SGD
device = dt.find_device(args)
dt.train(args, dt.Path("run"), dt.load_backbone(args), device)
"""


def test_gradients_of_two_processes_are_averaged(tmp_path):
    """One plain gradient step: the new weights follow from both processes' windows."""
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, "one_step.py", str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before = dt.load_model(tmp_path / "run" / "epoch_0.pt", "cpu")
    after = dt.load_model(tmp_path / "run" / "epoch_1.pt", "cpu")
    data = load_data(dt, sample_args(dt))
    gradients = []
    for rank in (0, 1):
        rng = np.random.default_rng([666, 1, rank])
        rng.integers(2**60)
        starts = torch.as_tensor(rng.integers(len(data.states), size=(1, 4))[0])
        loss, _ = dt.training_loss(before, data.windows(starts, 20))
        gradients.append(torch.autograd.grad(loss, list(before.parameters())))
    for old, new, first, second in zip(before.parameters(), after.parameters(), *gradients):
        torch.testing.assert_close(new - old, -(first + second) / 2, rtol=1e-3, atol=1e-5)


STUDY = [*TINY, "--backbones", "random", "igpt", "--num-epochs", "3", "--steps-per-epoch", "40"]
STUDY += ["--context-length", "5", "--norm-windows", "4", "--confusion-windows", "2"]


if __name__ == "__main__":  # as often as you like: python tests/test_interruptions.py FOLDER KILLS
    from pathlib import Path

    folder, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    rng = random.Random(0)
    moments = []
    for i in range(count):
        save = ("save", rng.randint(1, 7))
        moments.append(save if i % 3 == 0 else ("time", rng.uniform(0, 1.5)))
    long_run = [*COMMAND, "--num-epochs", str(count)]  # so that it is not finished too soon
    long_study = [*STUDY, "--num-epochs", str(count // 2)]
    study_runs = ["random_clip_0.25", "igpt_clip_0.25"]
    cases = {
        "dt_pretrained.py": (long_run, [""], moments[: count // 2]),
        "analyze_grads.py": (long_study, study_runs, moments[count // 2 :]),
    }
    for script, (command, runs, when) in cases.items():
        alone, killed = folder / script / "alone", folder / script / "killed"
        alone.mkdir(parents=True)
        killed.mkdir()
        arguments = [*command, "--run-name", "whole"]
        assert finish(start(alone, *arguments, program=(script,)))[0] == 0
        kills = kill_and_go_on(killed, when, script, command)
        for run in runs:
            equal = same(killed / "runs" / "whole" / run, alone / "runs" / "whole" / run)
            print(f"{script} {run}: {kills} kills, {'the same' if equal else 'DIFFERENT'}")
        results = [part / "runs" / "whole" / "results.json" for part in (alone, killed)]
        if results[0].exists():
            rows = [json.loads(path.read_text()) for path in results]
            print("results.json:", "the same" if str(rows[0]) == str(rows[1]) else "DIFFERENT")
