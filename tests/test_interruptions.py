"""Runs that are killed at any moment and resumed, damaged folders, and several processes."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, finish, sentence, start

import dt_pretrained as dt

COMMAND = [*TINY, "--backbone", "random", "--num-epochs", "3", "--steps-per-epoch", "40", "--context-length", "5"]


def same(run, reference):
    """Whether everything that must not depend on what happened to a run is the same, bit for bit."""
    for name in ("latest.pt", "best.pt", "epoch_0.pt", "epoch_1.pt", "epoch_3.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, reference))
        if not all(torch.equal(ours["model"][k], theirs["model"][k]) for k in theirs["model"]):
            return False
    for record in (*ours.get("records", ()), *theirs.get("records", ())):
        del record["seconds"]
    (_, records, history), (_, expected_records, expected_history) = dt.read_run(run), dt.read_run(reference)
    for record in (*records, *expected_records):
        del record["seconds"]
    return json.dumps([records, history]) == json.dumps([expected_records, expected_history])


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


def kill_and_resume(folder, moments, seed=0):
    """Run COMMAND in `folder`, SIGKILL it at the moments ("save", n-th) or ("time", seconds), resume to the end.

    Returns the number of kills.
    """
    run, kills, arguments = folder / "runs" / "whole", 0, [*COMMAND, "--run-name", "whole"]
    for kind, moment in moments:
        if kind == "save":
            process = start(folder, moment, dt.__file__, *arguments, program=("-c", KILL_IN_SAVE))
        else:
            process = start(folder, *arguments)
            events = len(list(run.glob("events*")))
            while len(list(run.glob("events*"))) == events and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moment)
            process.kill()
        kills += process.wait(timeout=200) == -signal.SIGKILL
        process.communicate()
        if (run / "args.json").exists():
            arguments = ["--resume", "runs/whole"]
        if (run / "latest.pt").exists():
            torch.load(run / "latest.pt", weights_only=True)  # whole, whenever it was
    assert finish(start(folder, *arguments))[0] == 0
    return kills


def test_killed_again_and_again_even_while_saving(whole, tmp_path):
    moments = [("save", 3), ("time", 0.3)]
    assert kill_and_resume(tmp_path, moments) >= 1
    assert same(tmp_path / "runs" / "whole", whole)


def test_a_finished_run_is_trained_on(whole, run_script, tmp_path):
    """Three epochs and one more are four epochs; the first three stay."""
    shutil.copytree(whole, tmp_path / "runs" / "whole")
    assert run_script("dt_pretrained.py", "--resume", "runs/whole", "--num-epochs", "4").status == 0
    (_, four, _), (_, three, _) = (dt.read_run(folder) for folder in (tmp_path / "runs" / "whole", whole))
    assert json.dumps(four[:4]) == json.dumps(three) and four[4]["step"] == 160
    assert (tmp_path / "runs" / "whole" / "epoch_4.pt").exists()


def test_save_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    dt.save(path, lambda temporary: temporary.write_bytes(b"old"))

    def fail(temporary):
        temporary.write_bytes(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        dt.save(path, fail)
    assert path.read_bytes() == b"old"


def test_numbers_that_blow_up_end_the_run(run_script, tmp_path):
    blow_up = ["--learning-rate", "1e30", "--warmup-steps", "0", "--max-grad-norm", "0", "--run-name", "a"]
    sentence(run_script("dt_pretrained.py", *COMMAND, *blow_up), "--learning-rate", "not finite")
    latest = torch.load(tmp_path / "runs" / "a" / "latest.pt", weights_only=True)
    assert latest["step"] == 0 and all(v.isfinite().all() for v in latest["model"].values())


def test_other_arguments_than_the_runs_are_refused(whole, run_script):
    sentence(run_script("dt_pretrained.py", "--resume", whole, "--batch-size", "16"), "--num-epochs")


def test_folders_that_do_not_fit_are_refused(whole, run_script, tmp_path):
    sentence(run_script("dt_pretrained.py", "--resume", tmp_path), "args.json")
    sentence(run_script("dt_no_context.py", "--resume", whole), "args.json")
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    content = (run / "latest.pt").read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:-10], b"nonsense"):
        (run / "latest.pt").write_bytes(damage)
        sentence(run_script("dt_pretrained.py", "--resume", run), "latest.pt", "damaged")


def test_no_pickled_code_is_run(whole, run_script, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    torch.save({"model": Evil()}, run / "latest.pt")
    sentence(run_script("dt_pretrained.py", "--resume", run), "latest.pt")
    assert not (tmp_path / "evil").exists()


def test_two_processes_give_the_numbers_of_one(run_script, tmp_path):
    """torchrun with gloo on the CPU, without dropout, in float32: losses, gradient norms and returns agree."""
    arguments = [*COMMAND, "--dropout", "0", "--num-epochs", "1"]
    assert run_script("dt_pretrained.py", *arguments, "--run-name", "one").status == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "dt_pretrained.py")
    status, out, _ = finish(start(tmp_path, *arguments, "--run-name", "two", program=torchrun))
    assert status == 0 and out.count("epoch 1: return") == 1
    (_, one, _), (_, two, _) = (dt.read_run(tmp_path / "runs" / name) for name in ("one", "two"))
    for name in ("loss", "grad_norm", "saturated_fraction", "return_mean", "return_low", "return_high", "length_mean"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-3, err_msg=name)
    weights = [torch.load(tmp_path / "runs" / n / "epoch_1.pt", weights_only=True)["model"] for n in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":  # as often as you like: python tests/test_interruptions.py FOLDER KILLS
    import sys
    from pathlib import Path

    folder, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    (folder / "left_alone").mkdir(parents=True)
    assert finish(start(folder / "left_alone", *COMMAND, "--run-name", "whole"))[0] == 0
    rng = random.Random(0)
    (folder / "killed").mkdir()
    moments = [("save", rng.randint(1, 3)) if i % 3 == 0 else ("time", rng.uniform(0, 1)) for i in range(count)]
    print(kill_and_resume(folder / "killed", moments), "kills")
    print("same:", same(folder / "killed" / "runs" / "whole", folder / "left_alone" / "runs" / "whole"))
