"""Data sets as tensors, and windows, against plain loops over trajectories."""

import h5py
import numpy as np
import pytest
import torch
from conftest import ASSETS

import dt_pretrained as dt

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}


def load(dataset, env_id="Hopper-v5"):
    args = dt.resolve(dt.Args(env=env_id, dataset=str(dataset), device="cpu", target_return=1.0))
    return dt.load_data(args, dt.make_env(args, 1))


def write_d4rl(path, episodes, unfinished=0, **changes):
    """Write (observations, actions, rewards, terminated) episodes as D4RL does, then steps of an unfinished one."""
    columns = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for observations, actions, rewards, terminated in episodes:
        last = np.arange(len(rewards)) == len(rewards) - 1
        for name, x in zip(columns, (observations, actions, rewards, last & terminated, last & (not terminated))):
            columns[name].append(x)
    if unfinished:
        observations, actions, rewards, _ = episodes[0]
        for name, x in zip(
            columns, (observations, actions, rewards, np.zeros(len(rewards), bool), np.zeros(len(rewards), bool))
        ):
            columns[name].append(x[:unfinished])
    with h5py.File(path, "w") as file:
        for name, parts in columns.items():
            file[name] = changes.get(name, np.concatenate(parts))
    return path


def made_up_episodes(lengths, state_dim=11, act_dim=3):
    """Episodes of these lengths; every second one is terminated, the others truncated."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.normal(3, 2, (n, state_dim)).astype("f4"),
            rng.uniform(-1, 1, (n, act_dim)).astype("f4"),
            rng.normal(size=n),
            i % 2 == 0,
        )
        for i, n in enumerate(lengths)
    ]


def plain_window(episodes, start, K):
    """The window that starts at transition `start` of all, by a loop over trajectories, padded on the right with zeros."""
    every_state = np.concatenate([e[0] for e in episodes]).astype(np.float64)
    mean, std = every_state.mean(0), every_state.std(0) + 1e-6
    for observations, actions, rewards, _ in episodes:
        if start < len(rewards):
            break
        start -= len(rewards)
    window = []
    for t in range(start, start + K):
        if t < len(rewards):
            window.append((sum(rewards[t:]) / 1000, (observations[t] - mean) / std, actions[t], t, True))
        else:
            window.append((0.0, 0 * mean, 0 * actions[0], 0, False))
    return [np.array(column) for column in zip(*window)]


@pytest.mark.parametrize("K", [1, 5, 20])
def test_windows_equal_a_plain_loop(K, tmp_path):
    episodes = made_up_episodes([1, 7, 30, 2, 19])
    data = load(write_d4rl(tmp_path / "d.hdf5", episodes))
    assert data.num_episodes == 5 and len(data.states) == 59
    starts = torch.arange(59)
    returns_to_go, states, actions, timesteps, valid = data.windows(starts, K)
    for i in starts:
        plain = plain_window(episodes, i.item(), K)
        for ours, theirs in zip((returns_to_go[i, :, 0], states[i], actions[i], timesteps[i], valid[i]), plain):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


def test_bundled_windows_equal_a_plain_loop():
    import minari

    raw = minari.MinariDataset(ASSETS / "hopper-medium" / "data")
    episodes = [(e.observations[:-1], e.actions, e.rewards, e.terminations[-1]) for e in raw.iterate_episodes()]
    assert any(e[3] for e in episodes) and any(not e[3] for e in episodes)  # both ways to end
    data = load(ASSETS / "hopper-medium")
    starts = torch.tensor([0, 5, 990, len(data.states) // 2, len(data.states) - 3])
    for i, start in enumerate(starts):
        plain = plain_window(episodes, start.item(), 20)
        for ours, theirs in zip(data.windows(starts, 20), plain):
            np.testing.assert_allclose(ours[i].squeeze(-1) if ours.shape[-1] == 1 else ours[i], theirs, atol=1e-5)


def test_starts_are_uniform_over_transitions():
    """As drawn by the training loop; chi-square of 400 cells below its 99.9 % quantile."""
    starts = torch.randint(400, (400_000,), generator=torch.Generator().manual_seed(666))
    counts = torch.bincount(starts, minlength=400).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 493.1


@pytest.mark.parametrize("name", ENVS)
def test_minari_and_d4rl_of_the_same_trajectories_give_the_same_tensors(name, tmp_path):
    import minari

    folder = ASSETS / f"{name}-medium"
    raw = minari.MinariDataset(folder / "data")
    episodes = [(e.observations[:-1], e.actions, e.rewards, e.terminations[-1]) for e in raw.iterate_episodes()]
    path = write_d4rl(tmp_path / f"{name}_medium-v2.hdf5", episodes, unfinished=4)  # D4RL's last episode is cut off
    from_minari, from_d4rl = load(folder, ENVS[name]), load(path, ENVS[name])
    assert 20_000 <= len(from_minari.states) < 40_000
    for field, expected in vars(from_minari).items():
        value = getattr(from_d4rl, field)
        assert field == "dataset_id" or (torch.equal(value, expected) if torch.is_tensor(value) else value == expected), field


def test_states_are_normalized_and_actions_in_range():
    data = load(ASSETS / "walker2d-medium", "Walker2d-v5")
    assert data.states.mean(0).abs().max() < 1e-4 and (data.states.std(0) - 1).abs().max() < 1e-3
    assert data.actions.abs().max() <= 1


def test_minari_id_in_the_local_folder(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shutil.copytree(ASSETS / "hopper-medium", tmp_path / "mujoco" / "hopper" / "medium-v0")
    data = load(dt.TASKS["Hopper"].dataset)
    assert torch.equal(data.states, load(ASSETS / "hopper-medium").states)


def test_another_version_of_the_environment_is_a_one_line_warning(capsys):
    load(ASSETS / "hopper-medium", "Hopper-v4")
    warning = capsys.readouterr().err.strip().splitlines()
    assert len(warning) == 1 and "Hopper-v5" in warning[0] and "Hopper-v4" in warning[0]
    load(ASSETS / "hopper-medium", "Hopper-v5")
    assert not capsys.readouterr().err


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        load(*arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and len(message.strip().splitlines()) == 1
    return message


def test_shapes_that_do_not_fit_are_both_named(capsys):
    message = refused(capsys, ASSETS / "hopper-medium", "Walker2d-v5")
    assert all(shape in message for shape in ("(11,)", "(3,)", "(17,)", "(6,)"))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_hdf5_is_refused(keep, tmp_path, capsys):
    path = write_d4rl(tmp_path / "whole.hdf5", made_up_episodes([300, 200]))
    content = path.read_bytes()
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert "damaged" in refused(capsys, cut)


def test_truncated_minari_folder_is_refused(tmp_path, capsys):
    import shutil

    shutil.copytree(ASSETS / "hopper-medium", tmp_path / "d")
    file = tmp_path / "d" / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1_000_000])
    assert "damaged" in refused(capsys, tmp_path / "d")


def test_other_faults_of_a_data_set(tmp_path, capsys):
    assert "no data set file" in refused(capsys, tmp_path / "missing.hdf5")
    assert "Minari" in refused(capsys, tmp_path)
    episodes = made_up_episodes([5, 6])
    for name, column in (("rewards", 2), ("observations", 0), ("actions", 1)):
        values = np.concatenate([e[column] for e in episodes]).copy()
        values[3] = np.nan
        assert f"non-finite {name}" in refused(capsys, write_d4rl(tmp_path / "nan.hdf5", episodes, **{name: values}))
    none = write_d4rl(tmp_path / "none.hdf5", episodes, terminals=np.zeros(11, bool), timeouts=np.zeros(11, bool))
    assert "no episode" in refused(capsys, none)
    short = write_d4rl(tmp_path / "short.hdf5", episodes, observations=episodes[0][0])
    assert "observations" in refused(capsys, short)


def test_zero_length_episode_is_refused(tmp_path, capsys):
    import shutil

    shutil.copytree(ASSETS / "hopper-medium", tmp_path / "d")
    with h5py.File(tmp_path / "d" / "data" / "main_data.hdf5", "a") as file:
        for name in ("actions", "rewards", "terminations", "truncations"):
            file[f"episode_2/{name}"].resize(0, axis=0)
    assert "without a step" in refused(capsys, tmp_path / "d")
