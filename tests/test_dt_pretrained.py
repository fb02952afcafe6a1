"""`dt_pretrained.py` run whole: its loss, its records and files, its seed, and how it refuses bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ASSETS, TINY, assert_one_sentence, load_data, make_model, sample_args
from PIL import Image

import dt_pretrained as dt

SCRIPT = "dt_pretrained.py"


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def test_loss_counts_valid_steps_only():
    """Against a loop; what stands behind the end of an episode changes neither loss nor gradient."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(4, 6, 3, generator=generator, requires_grad=True)
    actions = torch.rand(4, 6, 3, generator=generator)
    valid = torch.arange(6) < torch.tensor([6, 1, 3, 6])[:, None]
    predicted.data[0, 0, 0], predicted.data[1, 5, 0] = (
        -0.995,
        0.999,
    )  # saturated: one valid, one not
    windows = dt.Windows(None, None, actions, None, valid)
    loss, saturated = dt.training_loss(lambda *window: predicted, windows)
    errors, over = [], []
    for b, t in valid.nonzero().tolist():
        for d in range(3):
            errors.append((predicted[b, t, d] - actions[b, t, d]) ** 2)
            over.append(abs(predicted[b, t, d].item()) > 0.99)
    torch.testing.assert_close(loss, sum(errors) / len(errors))
    assert abs(saturated.item() - np.mean(over)) < 1e-6 and any(over)
    loss.backward()
    assert not predicted.grad[~valid].any() and predicted.grad[valid].all()


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------
def test_run_leaves_everything_that_was_promised(run_script, tmp_path):
    run = [
        *TINY,
        "--num-epochs",
        "2",
        "--backbone",
        "random",
        "--max-grad-norm",
        "2",
        "--run-name",
        "a",
    ]
    result = run_script(SCRIPT, *run)
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    _, args, records, history = dt.read_run(folder)
    saved = json.loads((folder / "args.json").read_text())
    assert (
        saved == args
        and saved["learning_rate"] == 1e-3
        and saved["dataset"] == "sample/hopper/medium-v0"
    )
    assert [(r["epoch"], r["step"]) for r in records] == [(0, 0), (1, 6), (2, 12)] and math.isnan(
        records[0]["loss"]
    )
    for record in records[1:]:
        assert (
            0 < record["loss"] < 4
            and 0 <= record["clipped_fraction"] <= 1
            and 0 <= record["saturated_fraction"] <= 1
        )
    np.testing.assert_allclose(
        np.mean([line["loss"] for line in history[:6]]), records[1]["loss"], rtol=1e-5
    )
    assert [line["step"] for line in history] == list(range(1, 13))
    names = (
        "args.json",
        "best.pt",
        "epoch_0.pt",
        "epoch_1.pt",
        "epoch_2.pt",
        "latest.pt",
        "learning_curve.png",
    )
    assert sorted(p.name for p in folder.iterdir() if "events" not in p.name) == [
        *names,
        "summary.json",
    ]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    best = max(records[1:], key=lambda record: record["return_mean"])
    assert f"{best['normalized_score']:.1f}" in result.out
    assert all(
        record["return_low"] <= record["return_mean"] <= record["return_high"] for record in records
    )
    assert torch.load(folder / "best.pt")["epoch"] == best["epoch"]

    model = dt.load_model(folder / "epoch_2.pt", "cpu")
    checkpoint = dt.read_checkpoint(folder / "epoch_2.pt", "cpu")
    assert (
        checkpoint["step"] == 12 and checkpoint["state_mean"].shape == (11,) and not model.training
    )
    untrained = dt.load_model(folder / "epoch_0.pt", "cpu")
    assert not torch.equal(model.embed_state.weight, untrained.embed_state.weight)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = {f"train/{name}" for name in dt.METRICS} | {"eval/return_mean", "eval/normalized_score"}
    assert tags <= set(events.Tags()["scalars"]) and events.Tags()["images"] == ["learning_curve"]
    np.testing.assert_allclose(
        [e.value for e in events.Scalars("train/loss")], [h["loss"] for h in history], rtol=1e-6
    )


def test_learning_rate_rises_linearly_and_adamw_is_the_papers(run_script, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments):
        seen.append(
            [(group["lr"], group["eps"], group["weight_decay"]) for group in self.param_groups]
        )
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    for backbone, epsilon in (("igpt", 1e-6), ("random", 1e-8)):
        run = [
            *TINY,
            "--num-epochs",
            "1",
            "--backbone",
            backbone,
            "--warmup-steps",
            "4",
            "--run-name",
            backbone,
        ]
        assert run_script(SCRIPT, *run).status == 0
        expected = [[1e-3 * min(i / 4, 1), epsilon, 1e-4] for i in range(1, 7)]
        np.testing.assert_allclose(np.squeeze(seen), expected, rtol=1e-6)
        seen.clear()


def test_same_command_same_numbers(run_script, tmp_path):
    results = []
    for name in ("first", "second", "other"):
        seed = ["--seed", "1"] if name == "other" else []
        assert run_script(SCRIPT, *TINY, "--num-epochs", "1", *seed, "--run-name", name).status == 0
        _, _, records, history = dt.read_run(tmp_path / "runs" / name)
        results.append(([record["return_mean"] for record in records], history))
    assert (
        results[0] == results[1]
        and results[0][0] != results[2][0]
        and results[0][1] != results[2][1]
    )


def test_seeds_and_epochs_do_not_share_windows():
    """Seed 42's first epoch is not seed 43's start; and starts are uniform: chi-square below its 99.9 % quantile."""
    draws = {}
    for key in ((42, 1), (43, 0), (42, 2), (1, 42)):
        draws[key] = tuple(np.random.default_rng(list(key)).integers(400, size=400_000)[:50])
    assert len(set(draws.values())) == 4
    counts = np.bincount(np.random.default_rng([666, 1]).integers(400, size=400_000))
    assert ((counts - 1000) ** 2 / 1000).sum() < 493.1


@pytest.mark.parametrize("max_grad_norm", [0.001, 0])
def test_clipping_on_and_off(max_grad_norm, run_script, tmp_path, monkeypatch):
    """After every backward pass the gradient is at most the threshold long; with 0 it is left alone."""
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run = [
        *TINY,
        "--num-epochs",
        "1",
        "--backbone",
        "random",
        "--max-grad-norm",
        max_grad_norm,
        "--run-name",
        "a",
    ]
    assert run_script(SCRIPT, *run).status == 0
    records = dt.read_run(tmp_path / "runs" / "a").records
    assert len(norms) == 6
    if max_grad_norm:
        np.testing.assert_allclose(norms, max_grad_norm, rtol=1e-2)
        assert records[1]["clipped_fraction"] == 1
    else:
        assert records[1]["clipped_fraction"] == 0
        np.testing.assert_allclose(np.mean(norms), records[1]["grad_norm"], rtol=1e-4)


def test_the_sample_learns(run_script, tmp_path):
    """Sixty steps from the bundled language model bring the loss well below that of the first ones."""
    size = [
        "--num-epochs",
        "3",
        "--steps-per-epoch",
        "20",
        "--num-eval-episodes",
        "2",
        "--batch-size",
        "16",
    ]
    rate = ["--warmup-steps", "5", "--learning-rate", "1e-3"]
    assert run_script(SCRIPT, "--sample", *size, *rate, "--run-name", "a").status == 0
    records = dt.read_run(tmp_path / "runs" / "a").records
    assert records[3]["loss"] < 0.7 * records[1]["loss"]


def test_bf16_stays_close_to_fp32():
    """The same loss of the same windows, and weights and gradients that stay float32."""
    args = sample_args(dt)
    data = load_data(dt, args)
    windows, losses = data.windows(torch.arange(16) * 900, 20), {}
    for precision in ("fp32", "bf16"):
        model = make_model(dt, "gpt2")
        with dt.autocast(replace(args, precision=precision), torch.device("cpu")):
            loss, _ = dt.training_loss(model, windows)
        loss.backward()
        losses[precision] = loss.item()
        assert loss.dtype == torch.float32 and all(
            p.grad.dtype == torch.float32 for p in model.parameters()
        )
    assert losses["bf16"] != losses["fp32"] and abs(losses["bf16"] / losses["fp32"] - 1) < 0.02


def test_another_environment(run_script, tmp_path, monkeypatch):
    """Ant, which D4RL's scores are not given for, with a Minari data set made on the spot."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env = gym.make("Swimmer-v5")
    env.action_space.seed(0)
    episodes = []
    for i in range(3):
        observation, _ = env.reset(seed=i)
        episode = EpisodeBuffer(id=i, observations=[observation], actions=[])
        for _ in range(30):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            episode.observations.append(observation)
            episode.actions.append(action)
            episode.rewards.append(reward)
            episode.terminations.append(terminated)
            episode.truncations.append(truncated)
        episodes.append(episode)
    described = ("code_permalink", "author", "author_email", "algorithm_name", "description")
    minari.create_dataset_from_buffers(
        "swimmer/random-v0",
        buffer=episodes,
        env=env,
        eval_env=env,
        data_format="hdf5",
        **dict.fromkeys(described, "made up for this test"),
    )
    run = [
        *TINY,
        "--num-epochs",
        "1",
        "--backbone",
        "random",
        "--env",
        "Swimmer-v5",
        "--dataset",
        "swimmer/random-v0",
    ]
    result = run_script(
        SCRIPT, *run, "--target-return", "300", "--context-length", "2", "--run-name", "a"
    )
    assert result.status == 0, result.err
    records = dt.read_run(tmp_path / "runs" / "a").records
    assert math.isnan(records[1]["normalized_score"]) and records[0]["length_mean"] == 1000


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit status 2
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--env", "Hoper-v4"], ["Hoper-v4", "--dataset"]),
        (["--env", "Ant-v5", "--dataset", "x"], ["--target-return"]),
        (
            [
                "--backbone",
                "random",
                "--env",
                "Nothing-v9",
                "--dataset",
                "x",
                "--target-return",
                "1",
            ],
            ["Nothing-v9"],
        ),
        (["--backbone", "random", "--env", "Hopper-v1"], ["Hopper-v1"]),
        (
            [
                "--backbone",
                "random",
                "--env",
                "CartPole-v1",
                "--dataset",
                "x",
                "--target-return",
                "1",
            ],
            ["Discrete"],
        ),
        (
            [
                "--backbone",
                "random",
                "--env",
                "Pendulum-v1",
                "--dataset",
                "x",
                "--target-return",
                "1",
            ],
            ["from -1 to 1"],
        ),
        (["--sample", "--env", "Ant-v5"], ["Ant-v5", "--dataset"]),
        (["--backbone", "random", "--dataset", "missing.hdf5"], ["missing.hdf5"]),
        (
            ["--sample", "--env", "Walker2d-v5", "--dataset", "sample/hopper/medium-v0"],
            ["Hopper-v5", "Walker2d-v5"],
        ),
        (["--sample", "--backbone", str(ASSETS / "policies")], ["policies", "GPT-2"]),
        (["--context-length", "0"], ["--context-length"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--num-epochs", "0"], ["--num-epochs"]),
        (["--max-grad-norm", "-1"], ["--max-grad-norm"]),
        (["--learning-rate", "-0.1"], ["--learning-rate"]),
        (["--learning-rate", "nan"], ["--learning-rate"]),
        (["--dropout", "1.5"], ["--dropout"]),
        (["--head-std", "0"], ["--head-std"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--sample", "--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["--sample", "--device", "gpu"], ["--device gpu", "cpu"]),
        (["--sample", "--device", "meta"], ["--device meta", "cpu"]),
        (["--run-name", "../x"], ["../x"]),
        (["--run-name", "a/b"], ["a/b"]),
        (["--run-name", ".."], [".."]),
        (["--sample", "--context-length", "5000"], ["5000", "1000"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script):
    assert_one_sentence(run_script(SCRIPT, *arguments), *said)


@pytest.mark.parametrize(
    "env,backbone,expected",
    [
        (
            "my_envs:lab/Task-v0",
            "openai-community/gpt2",
            "my_envs-lab-Task-v0__dt_pretrained__gpt2",
        ),
        ("Hopper-v4", "/a/folder/", "Hopper-v4__dt_pretrained__folder"),
    ],
)
def test_run_folders_have_flat_names(env, backbone, expected):
    args = dt.Args(env=env, backbone=backbone, dataset="x", target_return=1.0)
    dt.complete_arguments(args)
    assert args.run_name.startswith(f"{expected}__666__")


def test_runs_that_cannot_be_written_are_said(run_script, tmp_path):
    (tmp_path / "runs").touch()
    run = [*TINY, "--num-epochs", "1", "--backbone", "random", "--run-name", "a"]
    assert_one_sentence(run_script(SCRIPT, *run), "runs/a", "cannot be made")


def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on(run_script, tmp_path, monkeypatch):
    run = [*TINY, "--num-epochs", "2", "--backbone", "random", "--run-name", "a"]
    save = torch.save

    def full_disk(checkpoint, path):
        if checkpoint["epoch"] == 2:
            path.write_bytes(b"the first bytes")
            raise OSError(28, "No space left on device")
        save(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        result = run_script(SCRIPT, *run)
    assert result.status == 2 and "No space left" in result.err and "runs/a" in result.err
    assert "Traceback" not in result.err and not list((tmp_path / "runs/a").glob(".*"))
    assert run_script(SCRIPT, *run).status == 0
    assert len(dt.read_run(tmp_path / "runs" / "a").records) == 3


def test_checks_hold_without_asserts(tmp_path):
    """`python -O` drops asserts; what users bring is checked all the same."""
    shutil.copytree(ASSETS / "text-gpt2", tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    command = [sys.executable, "-O", dt.__file__, *TINY, "--backbone", "broken"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "h.4." in result.stderr and "Traceback" not in result.stderr


def test_a_run_with_other_arguments_is_not_overwritten(run_script):
    run = [*TINY, "--num-epochs", "1", "--backbone", "random", "--run-name", "a"]
    assert run_script(SCRIPT, *run).status == 0
    assert_one_sentence(run_script(SCRIPT, *run, "--seed", "3"), "runs/a", "seed", "666", "3")
    assert_one_sentence(run_script(SCRIPT, "--sample", "--run-name", "a"), "runs/a", "--run-name")


def test_a_finished_run_says_so(run_script, tmp_path):
    run = [*TINY, "--num-epochs", "1", "--backbone", "random", "--run-name", "a"]
    first = run_script(SCRIPT, *run)
    before = (tmp_path / "runs" / "a" / "summary.json").read_text()
    again = run_script(SCRIPT, *run)
    assert "finished" in again.out and "finished" not in first.out
    assert again.out.splitlines()[-3:] == first.out.splitlines()[-3:]  # the table again
    assert (tmp_path / "runs" / "a" / "summary.json").read_text() == before


@pytest.mark.parametrize(
    "arguments", [["--sample", "--backbone", "gpt2-medium"], ["--backbone", "random"]]
)
def test_an_unreachable_hub_is_said_in_one_sentence(arguments, tmp_path):
    """As a user would see it: a process of its own, without a network, empty caches."""
    places = {
        "HF_HOME": str(tmp_path / "hf"),
        "MINARI_DATASETS_PATH": str(tmp_path / "minari"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, dt.__file__, *arguments]
    result = subprocess.run(
        command, env=os.environ | places, cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        result.returncode == 2 and "Traceback" not in result.stderr and "--sample" in result.stderr
    )


# ---------------------------------------------------------------------------------------------------------------
# Video
# ---------------------------------------------------------------------------------------------------------------
def test_videos_of_the_best_and_the_last_model(run_script, tmp_path, monkeypatch):
    program = "import gymnasium as gym; env = gym.make('Hopper-v5', render_mode='rgb_array'); env.reset(); env.render()"
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    if subprocess.run([sys.executable, "-c", program], capture_output=True).returncode:
        pytest.skip("nothing to render with here, EGL is missing")
    run = [
        *TINY,
        "--num-epochs",
        "2",
        "--backbone",
        "random",
        "--seed",
        "3",
        "--capture-video",
        "--run-name",
        "a",
    ]
    result = run_script(SCRIPT, *run)
    assert result.status == 0, result.err
    records = dt.read_run(tmp_path / "runs" / "a").records
    for name in ("best", "last"):
        with Image.open(tmp_path / "runs" / "a" / f"{name}.gif") as video:
            assert video.size == (240, 240) and video.info["duration"] == 40
            assert (
                1 < video.n_frames < max(record["length_mean"] for record in records)
            )  # 125 steps a second, 25 pictures
            first = np.asarray(video.convert("RGB"), dtype=int)
            video.seek(video.n_frames - 1)
            assert (
                np.abs(np.asarray(video.convert("RGB"), dtype=int) - first).max() > 50
            )  # something moves


def test_where_nothing_can_be_rendered_it_says_so(tmp_path):
    """In a process of its own, as a renderer is chosen once. GLFW cannot work without a screen; the run is kept."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DISPLAY", "WAYLAND_DISPLAY")
    }
    run = [*TINY, "--num-epochs", "1", "--backbone", "random", "--capture-video", "--run-name", "a"]
    result = subprocess.run(
        [sys.executable, dt.__file__, *run],
        env=environment | {"MUJOCO_GL": "glfw"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode == 2
        and "--capture-video" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert (tmp_path / "runs" / "a" / "learning_curve.png").exists()
