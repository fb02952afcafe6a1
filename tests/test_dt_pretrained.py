"""`dt_pretrained.py` run whole: its loss, its records and files, its seed, and how it refuses bad input."""

import json
import math
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ASSETS, ROOT, TINY
from PIL import Image

import dt_pretrained as dt

SCRIPT = "dt_pretrained.py"
TIMES = ("steps_per_second", "train_seconds", "eval_seconds")


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def test_loss_counts_valid_steps_only(generator):
    """Against a loop; what stands behind the end of an episode changes neither loss nor gradient."""
    predicted = torch.rand(4, 6, 3, generator=generator, requires_grad=True)
    actions = torch.rand(4, 6, 3, generator=generator)
    valid = torch.arange(6) < torch.tensor([6, 1, 3, 6])[:, None]
    predicted.data[0, 0, 0], predicted.data[1, 5, 0] = -0.995, 0.999  # saturated: one valid, one not
    loss, saturated = dt.training_loss(lambda *window: predicted, (None, None, actions, None, valid), valid.sum())
    errors = [(predicted[b, t, d] - actions[b, t, d]) ** 2 for b in range(4) for t in range(6) for d in range(3) if valid[b, t]]
    over = [abs(predicted[b, t, d].item()) > 0.99 for b in range(4) for t in range(6) for d in range(3) if valid[b, t]]
    torch.testing.assert_close(loss, sum(errors) / len(errors))
    assert abs(saturated.item() - np.mean(over)) < 1e-6 and any(over)
    loss.backward()
    assert not predicted.grad[~valid].any() and predicted.grad[valid].all()


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------
def test_run_leaves_everything_that_was_promised(run_script, tmp_path):
    result = run_script(SCRIPT, "--sample", "--backbone", "random", *TINY, "--run-name", "a", "--max-grad-norm", "2")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    summary = json.loads((folder / "summary.json").read_text())
    args = json.loads((folder / "args.json").read_text())
    assert summary["sample"] and "not the paper" in result.out
    assert (args["n_layer"], args["n_head"], args["activation"], args["learning_rate"]) == (2, 1, "relu", 2e-3)
    assert summary["steps"] == 12 and summary["parameters"] > 10_000 and summary["dataset_steps"] >= 20_000
    assert [r["epoch"] for r in summary["epochs"]] == [0, 1, 2] and summary["epochs"][0]["loss"] is None
    for record in summary["epochs"][1:]:
        assert 0 < record["loss"] < 4 and 0 <= record["clipped_fraction"] <= 1 and 0 <= record["saturated_fraction"] <= 1
    scores = [r["normalized_score"] for r in summary["epochs"]]
    assert summary["best_normalized_score"] == max(scores[1:]) and summary["final_normalized_score"] == scores[-1]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "epoch_0.pt",
        "epoch_1.pt",
        "epoch_2.pt",
        "latest.pt",
    ]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "best" in result.out and "| mean over the last quarter" not in result.err

    checkpoint = torch.load(folder / "checkpoints" / "epoch_2.pt", weights_only=True)
    architecture = checkpoint["architecture"]
    model = dt.DecisionTransformer(dt.GPTConfig(**architecture.pop("config")), **architecture)
    model.load_state_dict(checkpoint["model"])
    assert checkpoint["script"] == "dt_pretrained" and checkpoint["step"] == 12 and checkpoint["state_mean"].shape == (11,)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    train = {f"train/{n}" for n in ("loss", "grad_norm", "clipped_fraction", "saturated_fraction", "learning_rate")}
    assert train | {"train/steps_per_second", "eval/return_mean", "eval/normalized_score"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["learning_curve"]
    rates = [e.value for e in events.Scalars("train/learning_rate")]
    np.testing.assert_allclose(rates, [2e-3 * min(step / 400, 1) for step in range(1, 13)], rtol=1e-5)
    assert math.isclose(
        np.mean([e.value for e in events.Scalars("train/loss")][:6]), summary["epochs"][1]["loss"], rel_tol=1e-5
    )


def test_same_command_same_numbers(run_script, tmp_path):
    summaries = []
    for name in ("first", "second", "other"):
        seed = ["--seed", "1"] if name == "other" else []
        assert run_script(SCRIPT, "--sample", "--backbone", "igpt", *TINY[4:], *seed, "--run-name", name).status == 0
        summaries.append(json.loads((tmp_path / "runs" / name / "summary.json").read_text()))
        for key in TIMES:
            del summaries[-1][key]
    assert summaries[0] == summaries[1]
    assert summaries[0]["epochs"] != summaries[2]["epochs"]


@pytest.mark.parametrize("max_grad_norm", [0.001, 0])
def test_clipping_on_and_off(max_grad_norm, run_script, tmp_path, monkeypatch):
    """After every backward pass the gradient is at most the threshold long; with 0 it is left alone."""
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        assert [(group["eps"], group["weight_decay"]) for group in self.param_groups] == [(1e-8, 1e-4)]
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert (
        run_script(
            SCRIPT, "--sample", "--backbone", "random", *TINY, "--max-grad-norm", max_grad_norm, "--run-name", "a"
        ).status
        == 0
    )
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert len(norms) == 12
    if max_grad_norm:
        np.testing.assert_allclose(norms, max_grad_norm, rtol=1e-2)
        assert all(r["clipped_fraction"] == 1 for r in summary["epochs"][1:])
    else:
        assert all(r["clipped_fraction"] == 0 for r in summary["epochs"][1:])
        np.testing.assert_allclose(np.mean(norms[:6]), summary["epochs"][1]["grad_norm"], rtol=1e-4)


def test_the_sample_learns(run_script, tmp_path):
    """Sixty steps from the bundled language model bring the loss well below that of the first ones."""
    size = [
        "--num-epochs",
        "3",
        "--steps-per-epoch",
        "20",
        "--num-eval-episodes",
        "2",
        "--warmup-steps",
        "5",
        "--learning-rate",
        "1e-3",
    ]
    assert run_script(SCRIPT, "--sample", *size, "--run-name", "a").status == 0
    epochs = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())["epochs"]
    assert epochs[3]["loss"] < 0.7 * epochs[1]["loss"]


def test_another_environment(run_script, tmp_path, monkeypatch):
    """Pendulum: actions in [-2, 2], no reference returns, a Minari data set made on the spot."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env = gym.make("Pendulum-v1")
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
            for column, value in (
                (episode.rewards, reward),
                (episode.terminations, terminated),
                (episode.truncations, truncated),
            ):
                column.append(value)
        episodes.append(episode)
    minari.create_dataset_from_buffers("pendulum/random-v0", buffer=episodes, env=env, data_format="hdf5")
    arguments = ["--backbone", "random", "--sample", "--env", "Pendulum-v1", "--dataset", "pendulum/random-v0", *TINY]
    result = run_script(SCRIPT, *arguments, "--target-return", "-200", "--run-name", "a")
    assert result.status == 0, result.err
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert summary["best_normalized_score"] is None and summary["dataset_steps"] == 90
    assert summary["epochs"][0]["length_mean"] == 200 and summary["epochs"][0]["return_mean"] < -100


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit status 2, no run folder
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--env", "Hoper-v4"], ["Hoper-v4", "--dataset"]),
        (["--env", "Ant-v5", "--dataset", "x"], ["--target-return"]),
        (["--env", "Nothing-v9", "--dataset", "x", "--target-return", "1"], ["Nothing-v9"]),
        (["--env", "Hopper-v1"], ["Hopper-v1"]),
        (["--env", "CartPole-v1", "--dataset", "x", "--target-return", "1"], ["Discrete", "Box"]),
        (["--sample", "--env", "Ant-v5"], ["Ant-v5", "--dataset"]),
        (["--dataset", "missing.hdf5"], ["missing.hdf5"]),
        (["--sample", "--env", "Walker2d-v5", "--dataset", str(ASSETS / "hopper-medium")], ["(11,)", "(17,)"]),
        (["--sample", "--backbone", str(ASSETS / "policies")], ["policies", "GPT-2"]),
        (["--context-length", "0"], ["--context-length"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--num-epochs", "0"], ["--num-epochs"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--max-grad-norm", "-1"], ["--max-grad-norm"]),
        (["--backbone", "random", "--n-head", "7"], ["--n-head"]),
        (["--backbone", "gpt2", "--n-layer", "7"], ["--n-layer", "random"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--device", "nonsense"], ["nonsense", "--device cpu"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    result = run_script(SCRIPT, *arguments)
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert result.status == 2 and len(errors) == 1 and errors[0].startswith("error: "), result.err
    assert all(word in errors[0] for word in said) and not (tmp_path / "runs").exists()


def test_a_run_folder_is_not_overwritten(run_script, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    result = run_script(SCRIPT, "--sample", "--run-name", "a")
    assert result.status == 2 and "--run-name" in result.err and not list((tmp_path / "runs" / "a").iterdir())


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--sample", "--backbone", "openai-community/gpt2-medium"], ["openai-community/gpt2-medium", "HF_HOME", "--sample"]),
        (["--backbone", "random"], ["mujoco/hopper/medium-v0", "MINARI_DATASETS_PATH", "--sample"]),
    ],
    ids=["hub", "minari"],
)
def test_unreachable_hub_is_said_without_retries(arguments, said, tmp_path):
    """As a user would see it: a process of its own, a hub that refuses connections, empty caches."""
    places = {"HF_HOME": str(tmp_path / "HF_HOME"), "MINARI_DATASETS_PATH": str(tmp_path / "MINARI_DATASETS_PATH")}
    environment = {**os.environ, **places, "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, ROOT / SCRIPT, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode == 2 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in errors[0] for word in said) and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------
# Video
# ---------------------------------------------------------------------------------------------------------------
def can_render():
    program = "import gymnasium as gym; env = gym.make('Hopper-v5', render_mode='rgb_array'); env.reset(); env.render()"
    environment = os.environ | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("script", ["dt_pretrained.py", "dt_no_context.py"])
def test_videos_of_the_best_and_the_last_model(script, run_script, tmp_path, monkeypatch):
    if not can_render():
        pytest.skip("nothing to render with here, EGL is missing")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    size = ["--sample", "--backbone", "random", *TINY, "--num-eval-episodes", "1", "--seed", "3"]
    size += ["--capture-video", "--run-name", "a"]
    result = run_script(script, *size)
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    summary = json.loads((folder / "summary.json").read_text())
    best, last = (torch.load(folder / "checkpoints" / f"{name}.pt") for name in ("best", "epoch_2"))
    assert best["epoch"] == summary["best_epoch"] and last["epoch"] == 2
    for name in ("best", "last"):
        with Image.open(folder / f"{name}.gif") as video:
            steps = summary["epochs"][{"best": best, "last": last}[name]["epoch"]]["length_mean"]
            assert video.size == (240, 240) and video.info["duration"] == 40
            assert video.n_frames == math.ceil(steps / 5) > 1  # Hopper makes 125 steps a second, the video shows 25
            first = np.asarray(video.convert("RGB"), dtype=int)
            video.seek(video.n_frames - 1)
            assert np.abs(np.asarray(video.convert("RGB"), dtype=int) - first).max() > 50  # something moves
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert {"video/best", "video/last"} <= set(events.Tags()["images"])
    assert events.Images("video/last")[0].encoded_image_string == (folder / "last.gif").read_bytes()


@pytest.mark.parametrize("renderer,said", [("nonsense", "MUJOCO_GL=nonsense"), ("glfw", "--capture-video cannot render")])
def test_where_nothing_can_be_rendered_it_says_so_before_training(renderer, said, tmp_path):
    """In a process of its own, because a renderer is chosen once; GLFW cannot work without a screen."""
    command = [sys.executable, str(ROOT / "dt_pretrained.py"), "--sample", "--backbone", "random", *TINY, "--capture-video"]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"MUJOCO_GL": renderer}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr and not (tmp_path / "runs").exists(), result.stderr
    assert "Traceback" not in result.stderr and len([x for x in result.stderr.splitlines() if x.startswith("error:")]) == 1
