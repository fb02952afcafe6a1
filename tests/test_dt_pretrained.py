"""`dt_pretrained.py` run whole: loss, optimizer, log, files, seeds, and how it ends where it must."""

import re
import shutil
import signal
from types import SimpleNamespace

import gymnasium as gym
import h5py
import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    TINY,
    assert_one_sentence,
    finish,
    load_data,
    make_model,
    sample_args,
    start,
)
from launcher import shared_launcher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dt_pretrained as dt

SCRIPT = "dt_pretrained.py"
COMMAND = [*TINY, "--backbone", "random", "--num-epochs", "2", "--warmup-steps", "4"]
COMMAND += ["--max-grad-norm", "0.001", "--device", "cpu", "--no-compile"]
BLOCK = dt.BlockConfig(32, 1, 64, "relu")


class OwnEnv(gym.Env):
    """Spaces as given; the rewards of 20 steps are the first action's, between 0 and 5 in all."""

    def __init__(self, observations, actions):
        self.observation_space = observations
        self.action_space = actions

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        return self.reset()[0], float(action[0] + 1) / 8, False, False, {}


spaces = {"observations": gym.spaces.Box(0, 1, (2,)), "actions": gym.spaces.Box(-1, 1, (1,))}
gym.register(id="Vectors-v0", entry_point=OwnEnv, kwargs=spaces, max_episode_steps=20)
hopper = gym.spec("Hopper-v5").entry_point
gym.register(id="BriefHopper-v5", entry_point=hopper, max_episode_steps=20)


def parse(*arguments):
    args = tyro.cli(dt.Args, args=arguments, default=dt.SAMPLE)
    dt.complete_arguments(args, args.backbone)
    return args


def train(folder, args, backbone=None):
    """Train; returns the log and what reached the optimizer and the model in each step."""
    optimizers, norms, starts = [], [], []
    step, windows = torch.optim.AdamW.step, dt.OfflineData.windows

    def watched_step(self):
        (group,) = self.param_groups
        optimizers.append({name: group[name] for name in ("lr", "eps", "weight_decay")})
        norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).double().norm().item())
        return step(self)

    def watched_windows(self, window_starts, context_length):
        starts.append(tuple(window_starts.tolist()))
        return windows(self, window_starts, context_length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched_step)
        patch.setattr(dt.OfflineData, "windows", watched_windows)
        dt.train(args, folder, backbone or dt.load_backbone(args))
    return SimpleNamespace(
        folder=folder,
        args=args,
        log=pd.read_csv(folder / "log.csv"),
        optimizers=pd.DataFrame(optimizers),
        norms=norms,
        starts=starts,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("folder") / "runs"


@pytest.fixture(scope="module")
def run(runs):
    """A run of two epochs."""
    return train(runs / "a", parse(*COMMAND, "--run-name", "a"))


# --------------------------------------------------------------------------------------------------
# Loss and optimizer
# --------------------------------------------------------------------------------------------------
def test_loss_counts_valid_steps_only():
    """Against a loop; what stands behind the end of an episode changes neither loss nor gradient."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(4, 6, 3, generator=generator, requires_grad=True)
    actions = torch.rand(4, 6, 3, generator=generator)
    valid = torch.arange(6) < torch.tensor([6, 1, 3, 6])[:, None]
    predicted.data[0, 0, 0] = -0.995  # saturated and valid
    predicted.data[1, 5, 0] = 0.999  # saturated and not valid
    windows = dt.Windows(None, None, actions, None, valid)
    loss, saturated_fraction = dt.training_loss(lambda *window: predicted, windows)
    errors, saturated = [], []
    for b, t in valid.nonzero().tolist():
        for d in range(3):
            errors.append((predicted[b, t, d] - actions[b, t, d]) ** 2)
            saturated.append(abs(predicted[b, t, d].item()) > 0.99)
    torch.testing.assert_close(loss, sum(errors) / len(errors))
    assert saturated_fraction.item() == pytest.approx(np.mean(saturated)) and any(saturated)
    loss.backward()
    assert not predicted.grad[~valid].any() and predicted.grad[valid].all()


def test_bf16_stays_close_to_fp32():
    """The same loss of the same windows, and weights and gradients that stay float32."""
    args = sample_args(dt)
    windows = load_data(dt, args).windows(torch.arange(16) * 900, 20)
    losses = {}
    for precision in ("fp32", "bf16"):
        model = make_model(dt, "random-gpt2")
        with dt.autocast(sample_args(dt, precision=precision)):
            loss, _ = dt.training_loss(model, windows)
        loss.backward()
        losses[precision] = loss.item()
        assert {x.dtype for p in model.parameters() for x in (p, p.grad)} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_the_optimizer_of_random_weights_and_a_gradient_that_is_clipped(run):
    learning_rates = [1e-3 * min(i / 4, 1) for i in range(1, 13)]
    np.testing.assert_allclose(run.optimizers["lr"], learning_rates, rtol=1e-6)
    assert set(run.optimizers["eps"]) == {1e-8} and set(run.optimizers["weight_decay"]) == {1e-4}
    np.testing.assert_allclose(run.norms, 0.001, rtol=1e-2)
    assert run.log["grad_norm"].min() > 0.001  # before it was clipped
    assert set(run.log["clipped_fraction"].dropna()) == {1}


def test_the_optimizer_of_pretrained_weights_and_a_gradient_that_is_not(runs):
    """As it is where --backbone says gpt2; how its weights are loaded is of no matter here."""
    options = ("--backbone", "gpt2", "--max-grad-norm", "inf", "--num-epochs", "1")
    args = parse(*COMMAND, *options, "--weight-decay", "0")
    run = train(runs / "gpt2", args, dt.Backbone([BLOCK], "layernorm", {}))
    assert set(run.optimizers["eps"]) == {1e-6} and set(run.optimizers["weight_decay"]) == {0}
    np.testing.assert_allclose(run.norms, run.log["grad_norm"].dropna(), rtol=1e-4)
    assert set(run.log["clipped_fraction"].dropna()) == {0}


# --------------------------------------------------------------------------------------------------
# Log and files
# --------------------------------------------------------------------------------------------------
EPISODES = ["return", "length", "score"]


def test_the_log_is_tidy(run):
    """A row for each step of so short an epoch, and one for each episode of an evaluation."""
    log = run.log
    of_run = {"env": "Hopper-v4", "dataset": "sample/hopper/medium-v0", "K": 20}
    of_run |= {"return_scale": 1000.0}
    of_run |= {"backbone": "random", "head_std": 0.02, "max_grad_norm": 0.001, "seed": 666}
    assert set(log.columns) == {"epoch", "step", *dt.METRICS, *EPISODES, *of_run}
    assert log[list(of_run)].drop_duplicates().to_dict("records") == [of_run]
    training, evaluation = log[log["loss"].notna()], log[log["return"].notna()]
    assert len(training) + len(evaluation) == len(log)
    assert training[[*dt.METRICS]].notna().all(axis=None) and training[EPISODES].isna().all(
        axis=None
    )
    assert evaluation[EPISODES].notna().all(axis=None)
    assert list(training["step"]) == list(range(1, 13))
    assert list(training["epoch"]) == [1] * 6 + [2] * 6
    assert list(evaluation["step"]) == [0, 0, 6, 6, 12, 12]
    assert list(evaluation["epoch"]) == [0, 0, 1, 1, 2, 2]
    score = (evaluation["return"] + 20.272305) / (3234.3 + 20.272305) * 100
    np.testing.assert_allclose(evaluation["score"], score)


def assert_tensorboard_equals(log, folder):
    """The newest value of each step, as TensorBoard shows it; none is there twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in (*dt.METRICS, *EPISODES):
        part = "train" if name in dt.METRICS else "eval"
        scalars = {scalar.step: scalar.value for scalar in events.Scalars(f"{part}/{name}")}
        assert len(scalars) == len(events.Scalars(f"{part}/{name}"))
        expected = log.groupby("step")[name].mean().dropna()
        assert list(scalars) == list(expected.index)
        np.testing.assert_allclose(list(scalars.values()), expected, rtol=1e-6)


def test_files_that_a_run_leaves(run):
    assert_tensorboard_equals(run.log, run.folder)
    files = {path.name for path in run.folder.iterdir() if "tfevents" not in path.name}
    models = {"epoch_0.pt", "epoch_1.pt", "epoch_2.pt", "best.pt", "latest.pt"}
    assert files == {"log.csv", *models}
    returns = run.log[run.log["epoch"] > 0].groupby("epoch")["return"].mean()
    assert dt.read_checkpoint(run.folder / "best.pt", "cpu")["epoch"] == returns.idxmax()

    model, args = dt.load_model(run.folder / "epoch_2.pt", "cpu")
    assert args == run.args and not model.training
    data = load_data(dt, run.args)
    assert torch.equal(model.state_mean, data.state_mean)
    assert torch.equal(model.state_std, data.state_std)
    # It is the model that was evaluated last.
    returns, lengths = dt.evaluate(model, dt.make_env(args, 2), args)
    last = run.log[(run.log["epoch"] == 2) & run.log["return"].notna()]
    np.testing.assert_allclose(last["return"], returns)
    assert list(last["length"]) == list(lengths)


def test_the_command_of_a_finished_run_shows_it_again(run, run_script, tmp_path):
    """Nothing is trained; the table and the picture are those of the log."""
    folder = shutil.copytree(run.folder, tmp_path / "runs" / "a")
    result = run_script(SCRIPT, *COMMAND, "--run-name", "a")
    assert result.status == 0, result.err
    pd.testing.assert_frame_equal(pd.read_csv(folder / "log.csv"), run.log)
    assert_tensorboard_equals(run.log, folder)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["learning_curve"]
    header, _, *rows, _ = result.out.splitlines()[-6:]
    names = [*dt.METRICS, *EPISODES]
    assert header.split() == names
    for epoch, row in enumerate(rows):
        expected = run.log[run.log["epoch"] == epoch][names].mean()
        shown = [np.nan if x == "-" else float(x) for x in row.split()]
        assert shown[0] == epoch
        np.testing.assert_allclose(shown[1:], expected, atol=6e-4)


def test_same_command_same_numbers_other_seed_other_numbers(run, runs):
    again = train(runs / "again", parse(*COMMAND, "--run-name", "again"))
    pd.testing.assert_frame_equal(again.log, run.log)
    options = ("--seed", "667", "--num-epochs", "1")
    other = train(runs / "other", parse(*COMMAND, *options))
    for name in ("loss", "return"):
        assert not set(other.log[name].dropna()) & set(run.log[name].dropna())
    starts = [*run.starts, *other.starts]
    assert len(set(starts)) == len(starts) == 18  # no two steps saw the same windows


def test_a_run_of_a_gpu_goes_on_and_opens_on_a_cpu(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "runs" / "a")
    for name in ("latest.pt", "epoch_2.pt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        checkpoint["args"] |= {"device": "cuda", "compile": True}
        del checkpoint["args"]["weight_decay"]  # as if a fork had added this argument since
        torch.save(checkpoint, folder / name)
    model, args = dt.load_model(folder / "epoch_2.pt", "cpu")
    assert args.device == "cpu" and {p.device.type for p in model.parameters()} == {"cpu"}
    longer = train(folder, dt.replace(run.args, num_epochs=3))
    assert len(longer.norms) == 6
    pd.testing.assert_frame_equal(longer.log[: len(run.log)], run.log)
    assert_tensorboard_equals(longer.log, folder)


def test_other_arguments_are_refused_by_name(run):
    """But for a lower learning rate, which may go on after a training that diverged."""
    earlier = run.args
    for name, value in (("seed", 3), ("learning_rate", 2e-3), ("return_scale", 1.0)):
        with pytest.raises(SystemExit, match=f"a has {name} = {getattr(earlier, name)},"):
            dt.check_arguments(dt.replace(run.args, **{name: value}), earlier, "runs/a")
    dt.check_arguments(dt.replace(run.args, learning_rate=1e-5), earlier, "runs/a")


def test_two_runs_without_a_name_have_different_folders():
    folders = {dt.complete_arguments(sample_args(dt), "gpt2") for _ in range(10)}
    assert len(folders) == 10
    for folder in folders:
        assert str(folder).startswith("runs/Hopper-v5__dt_pretrained__gpt2__666__")


def test_small_returns_are_asked_for_in_their_own_scale(tmp_path):
    """An environment of one's own, whose data are policies that always take the same action.

    Trained on them the model takes the action that gives what it is asked for; not so with returns
    divided by 1000, of which it sees nothing. What remains of an epoch's steps is logged, too.
    """
    actions = np.random.default_rng(0).uniform(-1, 1, 300).astype("f4").repeat(20)[:, None]
    with h5py.File(tmp_path / "small.hdf5", "w") as file:
        file["observations"] = np.zeros((6000, 2), "f4")
        file["actions"] = actions
        file["rewards"] = (actions[:, 0] + 1) / 8
        file["terminals"] = np.zeros(6000, bool)
        file["timeouts"] = np.arange(6000) % 20 == 19
    backbone = dt.Backbone([BLOCK], "layernorm", {})
    env = dt.make_env(sample_args(dt, env="Vectors-v0"), 1)
    args = sample_args(
        dt,
        backbone="random",
        env="Vectors-v0",
        dataset=str(tmp_path / "small.hdf5"),
        context_length=1,
        dropout=0,
        head_std=0.02,
        learning_rate=3e-3,
        warmup_steps=50,
        num_epochs=1,
        steps_per_epoch=201,
        num_eval_episodes=1,
    )
    returns = {}
    for scale in (5, 1000):
        folder = tmp_path / "runs" / str(scale)
        dt.train(dt.replace(args, return_scale=scale), folder, backbone)
        model, args_of_run = dt.load_model(folder / "best.pt", "cpu")
        for target in (1, 4):
            asked = dt.replace(args_of_run, target_return=target)
            returns[scale, target] = dt.evaluate(model, env, asked)[0][0]
    assert returns[5, 1] == pytest.approx(1, abs=0.4) and returns[5, 4] == pytest.approx(4, abs=0.4)
    assert abs(returns[1000, 4] - returns[1000, 1]) < 0.2
    steps = pd.read_csv(folder / "log.csv").dropna(subset="loss")["step"]
    assert list(steps) == [*range(8, 201, 8), 201]


# --------------------------------------------------------------------------------------------------
# Figure and video
# --------------------------------------------------------------------------------------------------
def test_what_the_learning_curve_shows_is_the_log(run):
    """Also where returns are negative, as those of HalfCheetah at first are."""
    log = run.log.assign(**{"return": run.log["return"] - 600})
    figure = dt.plot_learning_curve(log, run.args)
    axes_of = {re.split(r", | \(", axes.get_ylabel())[0]: axes for axes in figure.axes}
    for label, name in (
        ("return of 2 episodes", "return"),
        ("mean squared action error", "loss"),
        ("share of |action| > 0.99", "saturated_fraction"),
        ("gradient norm", "grad_norm"),
    ):
        axes = axes_of[label]
        expected = log.groupby("step")[name].mean().dropna()
        np.testing.assert_allclose(axes.lines[0].get_xdata(), expected.index)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), expected)
        low, high = axes.get_ylim()
        assert low < expected.min() and expected.max() < high
        assert axes.get_xlabel() == "training step"
    assert axes_of["return of 2 episodes"].get_ylim()[1] < 0
    threshold = axes_of["gradient norm"].lines[1]
    assert set(threshold.get_ydata()) == {0.001}
    title = figure.get_suptitle()
    assert all(part in title for part in ("Hopper-v4", "random", "K = 20", "seed 666"))


def test_videos(run, tmp_path):
    """125 steps a second, of which 25 are shown."""
    args = dt.replace(run.args, env="BriefHopper-v5")
    try:
        dt.capture_video(run.folder / "best.pt", tmp_path / "best.gif", args)
    except SystemExit as end:
        assert "--capture-video cannot render" in end.code and "EGL" in end.code
        pytest.skip(end.code)
    pictures = imageio.imread(tmp_path / "best.gif").astype(int)
    model, _ = dt.load_model(run.folder / "best.pt", "cpu")
    _, lengths = dt.evaluate(model, dt.make_env(args, 1), args)
    assert abs(len(pictures) - lengths[0] / 5) <= 1 and pictures.shape[1:3] == (240, 240)
    assert imageio.immeta(tmp_path / "best.gif")["duration"] == 40
    assert np.abs(pictures[-1] - pictures[0]).max() > 50  # something moves


def test_each_process_of_torchrun_takes_its_own_gpu_first(monkeypatch):
    """Before anything is put on a device: else all would begin on the first GPU."""
    calls = []
    zeros = torch.zeros
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(dt, "WORLD_SIZE", 4)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda timeout: None)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: calls.append(device) or zeros(*size))
    dt.complete_arguments(dt.Args(device="cuda"), "gpt2")
    assert calls == [3, "cuda"]


# In a process of its own: a renderer that is collected while another one draws takes its textures.
WALK_AWAY = """
import sys
import numpy as np
import dt_pretrained as dt

def walk_away(model, env, args):
    robot = env.envs[0].unwrapped
    qpos = robot.data.qpos.copy()
    qpos[0] = 20
    robot.set_state(qpos, robot.data.qvel)
    for _ in range(2 * env.metadata["render_fps"] // 25):
        env.step(np.zeros(env.action_space.shape, dtype=np.float32))

dt.evaluate = walk_away
checkpoint, env_id = sys.argv[1:]
_, args = dt.load_model(checkpoint, "cpu")
dt.capture_video(checkpoint, "far.gif", dt.replace(args, env=env_id))
"""


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v5", "Walker2d-v5"])
def test_the_camera_follows(env_id, run, tmp_path):
    """Twenty metres further on the robot is still in the picture, the only thing redder than green."""
    result = shared_launcher().run(tmp_path, WALK_AWAY, run.folder / "best.pt", env_id)
    if "--capture-video cannot render" in result.err:
        pytest.skip(result.err)
    assert result.status == 0, result.err
    # HalfCheetah is drawn twenty times a second, the others 125 times: shown as fast as it ran.
    duration = 50 if "HalfCheetah" in env_id else 40
    assert imageio.immeta(tmp_path / "far.gif")["duration"] == duration
    last = imageio.imread(tmp_path / "far.gif")[-1].astype(int)
    assert (last[..., 0] > last[..., 1] + 10).sum() > 500  # none where the camera stays behind


# --------------------------------------------------------------------------------------------------
# Mistakes
# --------------------------------------------------------------------------------------------------
def own(env):
    return ["--env", env, "--dataset", "x", "--target-return", "1", "--backbone", "random"]


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--env", "Hoper-v4"], ["Hoper-v4", "Hopper", "--dataset and --target-return"]),
        (["--env", "Ant-v5", "--dataset", "x"], ["Ant-v5", "--target-return"]),
        (own("Nothing-v9"), ["--env Nothing-v9 cannot be made"]),
        (own("CartPole-v1"), ["CartPole-v1", "Discrete"]),
        (own("Pendulum-v1"), ["Pendulum-v1", "from -1 to 1"]),
        (own("FrozenLake-v1"), ["FrozenLake-v1", "Discrete"]),
        (["--backbone", "random", "--dataset", "missing.hdf5"], ["missing.hdf5"]),
        (["--device", "cuda:99"], ["--device cuda:99 cannot be used"]),
        (["--device", "gpu"], ["--device gpu cannot be used"]),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, said, run_script):
    result = run_script(SCRIPT, "--sample", *arguments)
    assert_one_sentence(result, *said)
    assert result.status == 1


@pytest.mark.parametrize(
    "option,value",
    [
        ("--dropout", "1.5"),
        ("--batch-size", "0"),
        ("--context-length", "0"),
        ("--max-grad-norm", "0"),
        ("--learning-rate", "nan"),
        ("--target-return", "nan"),
        ("--seed", "-1"),
        ("--precision", "fp16"),
    ],
)
def test_values_out_of_range_are_said_by_tyro(option, value, run_script):
    result = run_script(SCRIPT, "--sample", option, value)
    assert result.status == 2 and "Traceback" not in result.err
    name = option.strip("-")
    assert name in result.err.replace("_", "-") and value in result.err, result.err


def test_one_script_alone_says_that_the_sample_is_missing(run_script, tmp_path):
    copy = shutil.copy(ROOT / SCRIPT, tmp_path / "alone.py")
    assert_one_sentence(run_script(copy, "--sample"), "--sample needs", "comes with the repository")


SEVERAL = """
import runpy, sys
script, *commands = sys.argv[1:]
for command in commands:
    sys.argv = [script, *command.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_without_a_network_as_a_user_sees_it(run, tmp_path, monkeypatch):
    """Empty caches; and a notebook's MPLBACKEND, whose module is not there, for a finished run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MPLBACKEND", "module://nothing")
    folder = shutil.copytree(run.folder, tmp_path / "runs" / "a")
    refused = {
        "--backbone gpt2-medium": "--backbone gpt2-medium cannot be used",
        "--backbone random": "--dataset mujoco/hopper/medium-v0 is no D4RL file and no folder or id",
        "--backbone random --dataset no/such-v0": "--dataset no/such-v0 is no D4RL file",
    }
    finished = " ".join([*COMMAND, "--run-name", "a"])
    program = ("-c", SEVERAL)
    _, out, _ = finish(start(tmp_path, ROOT / SCRIPT, finished, *refused, program=program))
    assert (folder / "learning_curve.png").exists()
    for sentence, said in zip(out.splitlines()[-3:], refused.values()):
        assert sentence.startswith(said) and "--sample needs no network" in sentence


def test_ctrl_c_says_how_to_go_on(run_script, tmp_path, monkeypatch):
    """In the middle of an epoch."""
    step = torch.optim.AdamW.step
    steps = []

    def interrupted_step(self):
        steps.append(step(self))
        if len(steps) == 9:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted_step)
    result = run_script(SCRIPT, *COMMAND)
    (folder,) = tmp_path.glob("runs/*")
    assert result.status == 1 and "Traceback" not in result.err
    sentence = f"Interrupted; training goes on by the same command with --run-name {folder.name}."
    assert result.err.endswith(sentence + "\n")
    assert dt.read_checkpoint(folder / "latest.pt", "cpu")["step"] == 6
