"""Forks that a researcher makes on a Friday afternoon: each is a few changed lines of a copy.

Each fork is trained for a few steps, and is seen to do what it is for. README.md shows some.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, sample_args

import dt_pretrained

# Each is a list of (lines to replace, lines to put there).
FORKS = {
    "another optimizer": [
        ("    optimizer = torch.optim.AdamW(\n", "    optimizer = torch.optim.SGD(\n"),
        (
            "        # As released: torch's AdamW (1e-8) for random weights, transformers' (1e-6) for pre-trained\n"
            "        # ones. [utils.py#L60]\n"
            '        eps=1e-8 if args.backbone.startswith("random") else 1e-6,\n',
            "",
        ),
    ],
    "another loss": [
        (
            "    squared_error = (predicted - windows.actions).square()\n",
            "    squared_error = (predicted - windows.actions).abs()\n",
        ),
    ],
    "a new metric": [
        (
            'METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")\n',
            'METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction", "head_norm")\n',
        ),
        (
            "            metrics.append(torch.stack([loss.detach(), saturated_fraction, grad_norm, clipped]))\n",
            "            head_norm = model.embed_action.weight.detach().norm()\n"
            "            values = [loss.detach(), saturated_fraction, grad_norm, clipped, head_norm]\n"
            "            metrics.append(torch.stack(values))\n",
        ),
    ],
    "another data format": [
        ("    with h5py.File(path) as file:\n", "    with np.load(path) as file:\n"),
        (
            '        is_last = np.logical_or(file["terminals"], file["timeouts"])\n',
            '        is_last = file["ends"]\n',
        ),
    ],
    "another activation": [
        (
            '            config = replace(config, n_head=1, activation="relu")\n',
            '            config = replace(config, n_head=1, activation="gelu")\n',
        ),
    ],
    "no warm-up": [
        (
            "            learning_rate = args.learning_rate * min((step + 1) / max(1, args.warmup_steps), 1)\n",
            "            learning_rate = args.learning_rate\n",
        ),
    ],
    "three blocks": [
        (
            "        return Backbone([config] * num_blocks, ",
            "        return Backbone([config] * 3, ",
        ),
    ],
}
IN_README = ("another optimizer", "another loss", "a new metric", "another data format")


def train(module, folder, **changes):
    """Two steps and an evaluation; returns what latest.pt holds, and the losses of the log."""
    args = sample_args(
        module, backbone="random", num_epochs=1, steps_per_epoch=2, num_eval_episodes=1,
        batch_size=4, context_length=5, **changes,
    )  # fmt: skip
    module.train(args, folder / "run", module.load_backbone(args))
    latest = torch.load(folder / "run" / "latest.pt", weights_only=True)
    latest["log"] = pd.read_csv(folder / "run" / "log.csv")
    return SimpleNamespace(losses=latest["log"].loss.dropna().tolist(), **latest)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return train(dt_pretrained, tmp_path_factory.mktemp("original"))


@pytest.fixture
def fork(request, monkeypatch):
    """The script with the changed lines, as a module."""
    text = (ROOT / "dt_pretrained.py").read_text()
    for old, new in FORKS[request.param]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    module = ModuleType("fork")
    module.__file__ = dt_pretrained.__file__
    monkeypatch.setitem(sys.modules, "fork", module)
    exec(compile(text, "fork.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_is_at_most_five_lines(name):
    """Of a diff those with a plus, or with a minus where nothing takes their place."""
    lines = sum(max(old.count("\n"), new.count("\n")) for old, new in FORKS[name])
    assert lines <= 5


@pytest.mark.parametrize("fork", ["another optimizer"], indirect=True)
def test_another_optimizer(fork, original, tmp_path):
    run = train(fork, tmp_path)
    assert "momentum" in run.optimizer["param_groups"][0]  # SGD's
    assert run.losses[0] == original.losses[0] and run.losses[1] != original.losses[1]


@pytest.mark.parametrize("fork", ["another loss"], indirect=True)
def test_another_loss(fork, original, tmp_path):
    run = train(fork, tmp_path)
    assert run.losses[0] != original.losses[0]
    predicted, actions = torch.tensor([[[0.1]], [[0.9]]])
    valid = torch.ones(1, 1, dtype=bool)
    windows = dt_pretrained.Windows(None, None, actions[None], None, valid)
    loss, _ = fork.training_loss(lambda *inputs: predicted[None], windows)
    assert loss.item() == pytest.approx(0.8)


@pytest.mark.parametrize("fork", ["a new metric"], indirect=True)
def test_a_new_metric(fork, original, tmp_path):
    run = train(fork, tmp_path)
    norm = run.model["embed_action.weight"].norm().item()
    assert run.log.head_norm.dropna().iloc[-1] == pytest.approx(norm)
    assert run.losses == original.losses


@pytest.mark.parametrize("fork", ["another data format"], indirect=True)
def test_another_data_format(fork, original, tmp_path):
    """A .npz of the columns observations, actions, rewards and ends."""
    args = sample_args(dt_pretrained)
    episodes = dt_pretrained.load_episodes(args, dt_pretrained.make_env(args, 1))
    columns = {}
    for name in ("observations", "actions", "rewards"):
        columns[name] = np.concatenate([getattr(episode, name) for episode in episodes])
    ends = np.zeros(len(columns["rewards"]), bool)
    ends[np.cumsum([len(episode.rewards) for episode in episodes]) - 1] = True
    np.savez(tmp_path / "data.npz", ends=ends, **columns)
    run = train(fork, tmp_path, dataset=str(tmp_path / "data.npz"))
    assert run.losses == original.losses


@pytest.mark.parametrize("fork", ["another activation"], indirect=True)
def test_another_activation(fork, original, tmp_path):
    run = train(fork, tmp_path)
    assert {block["activation"] for block in run.architecture["configs"]} == {"gelu"}
    assert run.losses[0] != original.losses[0]


@pytest.mark.parametrize("fork", ["no warm-up"], indirect=True)
def test_no_warm_up(fork, original, tmp_path):
    run = train(fork, tmp_path)
    assert run.optimizer["param_groups"][0]["lr"] == 1e-4
    assert run.losses[0] == original.losses[0] and run.losses[1] != original.losses[1]


@pytest.mark.parametrize("fork", ["three blocks"], indirect=True)
def test_three_blocks(fork, tmp_path):
    weights = train(fork, tmp_path).model
    assert {name.split(".")[2] for name in weights if ".h." in name} == {"0", "1", "2"}


@pytest.mark.parametrize("name", IN_README)
def test_the_readme_shows_the_same_lines(name):
    shown = (ROOT / "README.md").read_text().splitlines()
    for old, new in FORKS[name]:
        for sign, lines in (("-", old), ("+", new)):
            assert all(sign + line in shown for line in lines.splitlines())
