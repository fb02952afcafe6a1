"""What may happen to a run: signals, kills, a full disk, numbers that blow up, checkpoints that do not fit; torchrun."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import dt_pretrained as dt

SCRIPT = ROOT / "dt_pretrained.py"
COMMAND = [
    "--sample",
    "--backbone",
    "random",
    *TINY[:4],
    "--num-epochs",
    "3",
    "--steps-per-epoch",
    "40",
    "--num-eval-episodes",
    "2",
]
TIMES = ("steps_per_second", "train_seconds", "eval_seconds")


def start(folder, *arguments, program=(SCRIPT,), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return process.returncode, out, [line for line in err.splitlines() if line.startswith(("error", "interrupted"))]


def results(run):
    """Everything of a run that must not depend on what happened to it."""
    summary = json.loads((run / "summary.json").read_text())
    for name in TIMES:
        del summary[name]
    return summary, torch.load(run / "checkpoints" / "epoch_3.pt", weights_only=True)["model"]


def same(run, reference):
    (summary, weights), (expected_summary, expected_weights) = results(run), results(reference)
    return summary == expected_summary and all(torch.equal(weights[k], expected_weights[k]) for k in expected_weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, *COMMAND, "--run-name", "whole"))[0] == 0
    return folder / "runs" / "whole"


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_bit_for_bit(number, whole, tmp_path):
    process = start(tmp_path, *COMMAND, "--run-name", "a")
    run = tmp_path / "runs" / "a"
    wait_for(run / "checkpoints" / "latest.pt", process)
    time.sleep(0.3)
    process.send_signal(number)
    status, _, said = finish(process)
    assert status == 128 + number and len(said) == 1 and "--resume runs/a" in said[0]
    step = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)["step"]
    assert 0 < step < 120 and not (run / "summary.json").exists()
    status, out, _ = finish(start(tmp_path, "--resume", "runs/a"))
    assert status == 0 and f"after step {step}" in out
    assert same(run, whole)


KILL_IN_SAVE = """
import os, runpy, signal, sys
saves_left, fsync = int(sys.argv.pop(1)), os.fsync
def killing_fsync(file):
    global saves_left
    saves_left -= 1
    if saves_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = killing_fsync
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_again_and_again_even_while_saving(whole, tmp_path):
    """SIGKILL inside a save, at moments in between, and resumed each time: nothing is lost."""
    run = tmp_path / "runs" / "whole"
    moments = [("save", 5), ("save", 3), ("time", 0.05), ("save", 4), ("time", 0.25), ("save", 2), ("save", 5)]
    kills, arguments = 0, [*COMMAND, "--run-name", "whole"]
    for kind, moment in moments:
        if kind == "save":
            process = start(tmp_path, moment, SCRIPT, *arguments, program=("-c", KILL_IN_SAVE))
        else:
            process = start(tmp_path, *arguments)
            events = len(list(run.glob("events*")))
            while len(list(run.glob("events*"))) == events and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moment)
            process.kill()
        if process.wait(timeout=200) == -signal.SIGKILL:
            kills += 1
            torch.load(run / "checkpoints" / "latest.pt", weights_only=True)  # whole, whenever it was
            arguments = ["--resume", "runs/whole"]
        process.communicate()
    print(f"{kills} kills")
    assert kills >= 5
    assert finish(start(tmp_path, *arguments))[0] == 0
    assert same(run, whole) and not list(run.rglob("*.tmp"))


def test_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path):
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    before = (run / "checkpoints" / "latest.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4,) * 2)  # noqa: E731
    status, _, said = finish(start(tmp_path, "--resume", "runs/whole", "--num-epochs", "4", preexec_fn=limit))
    assert status == 2 and len(said) == 1 and "disk" in said[0] and "--resume" in said[0]
    assert (run / "checkpoints" / "latest.pt").read_bytes() == before and not list(run.rglob("*.tmp"))
    assert finish(start(tmp_path, "--resume", "runs/whole", "--num-epochs", "4"))[0] == 0  # with room again
    assert len(json.loads((run / "summary.json").read_text())["epochs"]) == 5


def test_save_leaves_the_old_file_when_writing_fails(tmp_path, capsys):
    path = tmp_path / "file"
    dt.save(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as end:
        dt.save(path, fail)
    assert end.value.code == 2 and path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert "No space left" in capsys.readouterr().err


def test_json_holds_arrays_and_null_for_nan(tmp_path):
    content = {"array": np.array([1.5, np.nan]), "tensor": torch.tensor([[1, 2]]), "scalar": np.float32(0.5), "nan": math.nan}
    dt.save_json(tmp_path / "file", content)
    read = json.loads((tmp_path / "file").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"array": [1.5, None], "tensor": [[1, 2]], "scalar": 0.5, "nan": None}


def test_numbers_that_blow_up_end_the_run(run_script, tmp_path):
    blow_up = ["--learning-rate", "1e30", "--warmup-steps", "0", "--max-grad-norm", "0", "--steps-per-epoch", "100"]
    result = run_script("dt_pretrained.py", *COMMAND, *blow_up, "--run-name", "a")
    said = [line for line in result.err.splitlines() if line.startswith("error")]
    assert result.status == 2 and len(said) == 1 and "--learning-rate" in said[0] and "Traceback" not in result.err
    step = int(said[0].split("in step ")[1].split(";")[0])
    assert 1 < step <= 8  # noticed within the second logging interval of 4 steps
    latest = torch.load(tmp_path / "runs" / "a" / "checkpoints" / "latest.pt", weights_only=True)
    assert latest["step"] == 0 and all(v.isfinite().all() for v in latest["model"].values())


def test_out_of_memory_names_what_to_lower(run_script):
    said = refused(run_script, *COMMAND, "--batch-size", 10**13, "--run-name", "a")
    assert "memory" in said and "--batch-size (now 10000000000000)" in said and "--context-length (now 20)" in said


# ---------------------------------------------------------------------------------------------------------------
# Resuming what does not fit
# ---------------------------------------------------------------------------------------------------------------
def refused(run_script, *arguments):
    result = run_script("dt_pretrained.py", *arguments)
    said = [line for line in result.err.splitlines() if line.startswith("error")]
    assert result.status == 2 and len(said) == 1 and "Traceback" not in result.err, result.err
    return said[0]


def test_changed_arguments_are_refused_and_named(whole, run_script):
    said = refused(run_script, "--resume", whole, "--batch-size", "16", "--env", "Walker2d-v4", "--device", "cpu")
    assert "--batch-size" in said and "--env" in said and "--device" not in said


def test_checkpoints_that_do_not_fit_are_refused(whole, run_script, tmp_path):
    assert "latest.pt" in refused(run_script, "--resume", tmp_path)
    assert "nowhere" in refused(run_script, "--resume", tmp_path / "nowhere")
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    latest = run / "checkpoints" / "latest.pt"
    content = latest.read_bytes()
    for damage in (b"", content[:1000], content[: len(content) // 2], content[:-10], b"nonsense"):
        latest.write_bytes(damage)
        assert "damaged" in refused(run_script, "--resume", run)
    shutil.copy(run / "checkpoints" / "epoch_1.pt", latest)  # a checkpoint for analysis, without the optimizer
    assert "optimizer" in refused(run_script, "--resume", run)
    checkpoint = torch.load(whole / "checkpoints" / "latest.pt", weights_only=True)
    torch.save({**checkpoint, "script": "dt_no_context"}, latest)
    assert "dt_no_context" in refused(run_script, "--resume", run)
    torch.save({**checkpoint, "args": {**checkpoint["args"], "env": "Walker2d-v4", "n_layer": 3}}, latest)
    said = refused(run_script, "--resume", run)
    assert "env" in said and "n_layer" in said
    torch.save({**checkpoint, "state_mean": checkpoint["state_mean"] + 1}, latest)
    assert "data" in refused(run_script, "--resume", run)


def test_no_pickled_code_is_run(whole, run_script, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    torch.save({"script": "dt_pretrained", "model": Evil()}, run / "checkpoints" / "latest.pt")
    assert "damaged" in refused(run_script, "--resume", run)
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------------------------------------------------------
# Precision, and several processes
# ---------------------------------------------------------------------------------------------------------------
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """torchrun with gloo on the CPU, dropout 0, float32: losses, gradient norms and returns agree."""
    no_dropout = ["--dropout", "0", "--attention-dropout", "0", "--embedding-dropout", "0", "--precision", "fp32"]
    arguments = [*COMMAND, *no_dropout, "--num-eval-episodes", "3"]
    assert finish(start(tmp_path, *arguments, "--run-name", "one"))[0] == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT))
    status, out, _ = finish(start(tmp_path, *arguments, "--run-name", "two", program=torchrun))
    assert status == 0 and out.count("This is the bundled sample") == 1
    one, two = (json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    largest = 0.0
    for a, b in zip(one["epochs"], two["epochs"]):
        for name in ("loss", "grad_norm", "saturated_fraction", "return_mean", "return_std", "length_mean"):
            if a[name] is not None:
                largest = max(largest, abs(a[name] - b[name]) / (abs(a[name]) + 1e-3))
    print(f"largest relative difference {largest:.1e}")
    assert largest < 1e-3
    weights = [
        torch.load(tmp_path / "runs" / n / "checkpoints" / "epoch_3.pt", weights_only=True)["model"] for n in ("one", "two")
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


def test_bf16_and_fp32_learn_alike(run_script, tmp_path):
    """Their losses differ by less than those of two seeds."""
    losses = {}
    for name, options in {"fp32": [], "bf16": ["--precision", "bf16"], "seed": ["--seed", "1"]}.items():
        arguments = [*COMMAND, "--steps-per-epoch", "30", "--precision", "fp32", *options, "--run-name", name]
        assert run_script("dt_pretrained.py", *arguments).status == 0
        epochs = json.loads((tmp_path / "runs" / name / "summary.json").read_text())["epochs"]
        losses[name] = [record["loss"] for record in epochs[1:]]
    for fp32, bf16, seed in zip(*losses.values()):
        assert abs(bf16 - fp32) < max(abs(seed - fp32), 0.02 * fp32)
