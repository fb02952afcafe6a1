"""Data sets as tensors, and windows, against plain loops over trajectories."""

import json
import shutil

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ASSETS, load_data, sample_args

import dt_pretrained as dt

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
HOPPER = ASSETS / "minari" / "sample" / "hopper" / "medium-v0"


def load(dataset, env="Hopper-v5", **changes):
    return load_data(dt, sample_args(dt, env=env, dataset=str(dataset), **changes))


def refused(dataset, env="Hopper-v5"):
    """The sentence that a data set is refused with."""
    with pytest.raises(SystemExit, match=r"^[^\n]+\.$") as end:
        load(dataset, env)
    return end.value.code


def write_d4rl(path, episodes, unfinished=0):
    """Write (observations, actions, rewards, terminated) episodes as D4RL does.

    `unfinished` steps of one more episode, which has no end, stand behind them.
    """
    columns = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for observations, actions, rewards, terminated in episodes:
        last = np.arange(len(rewards)) == len(rewards) - 1
        columns["observations"].append(observations)
        columns["actions"].append(actions)
        columns["rewards"].append(rewards)
        columns["terminals"].append(last & terminated)
        columns["timeouts"].append(last & (not terminated))
    for name in columns:
        first = columns[name][0][:unfinished]
        columns[name].append(first * 0 if name in ("terminals", "timeouts") else first)
    with h5py.File(path, "w") as file:
        for name, parts in columns.items():
            file[name] = np.concatenate(parts)
    return path


def made_up_episodes(lengths, state_dim=11, act_dim=3):
    """Episodes of these lengths; every second one is terminated, the others truncated."""
    rng = np.random.default_rng(0)
    episodes = []
    for i, length in enumerate(lengths):
        observations = rng.normal(3, 2, (length, state_dim)).astype("f4")
        actions = rng.uniform(-1, 1, (length, act_dim)).astype("f4")
        episodes.append((observations, actions, rng.normal(size=length), i % 2 == 0))
    return episodes


def bundled_episodes(name):
    data = minari.MinariDataset(ASSETS / "minari" / "sample" / name / "medium-v0" / "data")
    return [
        (e.observations[:-1], e.actions, e.rewards, e.terminations[-1])
        for e in data.iterate_episodes()
    ]


def plain_window(episodes, start, K, scale=1000):
    """The window from transition `start` of all on, of a list of trajectories, padded with 0."""
    states = np.concatenate([episode[0] for episode in episodes]).astype(np.float64)
    mean, std = states.mean(0), states.std(0) + 1e-6
    episode = 0
    while start >= len(episodes[episode][2]):
        start -= len(episodes[episode][2])
        episode += 1
    observations, actions, rewards, _ = episodes[episode]
    window = []
    for t in range(start, start + K):
        if t < len(rewards):
            state = (observations[t] - mean) / std
            window.append((sum(rewards[t:]) / scale, state, actions[t], t, True))
        else:
            window.append((0.0, 0 * mean, 0 * actions[0], 0, False))
    return [np.array(column) for column in zip(*window)]


def assert_windows_equal_a_plain_loop(data, episodes, starts, K, scale=1000):
    windows = data.windows(torch.as_tensor(starts), K)
    for i, start in enumerate(starts):
        *columns, valid = [field[i] for field in windows]
        columns[0] = columns[0].squeeze(-1)  # the returns-to-go
        *expected_columns, expected_valid = plain_window(episodes, start, K, scale)
        np.testing.assert_array_equal(valid, expected_valid)
        for column, expected in zip(columns, expected_columns):
            # What lies beyond the end may be anything.
            np.testing.assert_allclose(column[valid], expected[expected_valid], atol=1e-5)


@pytest.mark.parametrize("K", [1, 5, 20])
def test_windows_equal_a_plain_loop(K, tmp_path):
    episodes = made_up_episodes([1, 7, 30, 2, 19])
    data = load(write_d4rl(tmp_path / "d.hdf5", episodes), return_scale=10)
    assert len(data.states) == 59
    assert_windows_equal_a_plain_loop(data, episodes, list(range(59)), K, scale=10)


def test_bundled_windows_equal_a_plain_loop():
    episodes = bundled_episodes("hopper")
    assert {bool(episode[3]) for episode in episodes} == {True, False}  # both ways to end
    data = load("sample/hopper/medium-v0")
    starts = [0, 5, 990, len(data.states) // 2, len(data.states) - 3]
    assert_windows_equal_a_plain_loop(data, episodes, starts, 20)


@pytest.mark.parametrize("name", ENVS)
def test_minari_and_d4rl_of_the_same_trajectories_give_the_same_tensors(name, tmp_path):
    path = write_d4rl(tmp_path / "d4rl.h5", bundled_episodes(name), unfinished=4)
    from_minari = load(f"sample/{name}/medium-v0", ENVS[name])
    from_d4rl = load(path, ENVS[name])
    assert 20_000 <= len(from_minari.states) < 40_000
    assert from_minari.states.mean(0).abs().max() < 1e-4
    assert (from_minari.states.std(0) - 1).abs().max() < 1e-3
    for field, expected in vars(from_minari).items():
        assert torch.equal(getattr(from_d4rl, field), expected), field


def test_dimensions_that_are_constant_keep_their_scale(tmp_path):
    """A state of 0.5 that was always 0 in the data is 0.5 to the model, not half a million."""
    episodes = made_up_episodes([50, 60])
    for observations, *_ in episodes:
        observations[:, 3] = 0.1  # whose mean in float64 is not exactly itself
    data = load(write_d4rl(tmp_path / "d.hdf5", episodes))
    assert data.state_std[3] == 1 and data.states[:, 3].abs().max() < 1e-6
    std = np.concatenate([episode[0] for episode in episodes]).std(axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.delete(data.state_std.numpy(), 3), np.delete(std, 3), rtol=1e-5)


def test_data_of_another_shape_are_refused(tmp_path):
    path = write_d4rl(tmp_path / "hopper.hdf5", made_up_episodes([5, 6]))
    said = refused(path, "Walker2d-v5")
    assert str(path) in said and "(11,)" in said and "(17,)" in said


def test_actions_beyond_1_are_refused(tmp_path):
    episodes = made_up_episodes([5, 6])
    episodes[1][1][2, 0] = 1.5
    assert "beyond -1 to 1" in refused(write_d4rl(tmp_path / "d.hdf5", episodes))


def test_nan_in_the_data_end_the_training(tmp_path):
    episodes = made_up_episodes([5, 6])
    episodes[0][2][-1] = np.nan
    path = write_d4rl(tmp_path / "d.hdf5", episodes)
    args = sample_args(dt, backbone="random", dataset=str(path), num_eval_episodes=1)
    args = dt.replace(args, target_return=1.0, batch_size=2, steps_per_epoch=2, run_name="mine")
    backbone = dt.Backbone([dt.BlockConfig(8, 1, 8, "relu")], "layernorm", {})
    with pytest.raises(SystemExit, match=r"not finite.*NaN in the data.*--run-name mine"):
        dt.train(args, tmp_path / "run", backbone)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_file_that_was_cut_or_is_not_there_is_refused(keep, tmp_path):
    whole = write_d4rl(tmp_path / "whole.hdf5", made_up_episodes([300, 200]))
    cut = tmp_path / "cut.hdf5"
    assert f"--dataset {cut} is no D4RL file" in refused(cut)
    cut.write_bytes(whole.read_bytes()[:keep])
    assert f"--dataset {cut} is no D4RL file" in refused(cut)


# --------------------------------------------------------------------------------------------------
# Minari
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def kept_by_minari(tmp_path, monkeypatch):
    """The bundled Hopper data as mujoco/hopper/medium-v0 where Minari keeps them."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return shutil.copytree(HOPPER, tmp_path / "mujoco/hopper/medium-v0")


def change_metadata(folder, remove=(), **spec):
    """Change the spec of the environment in a data set's metadata, and remove some of these."""
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["env_spec"] = json.dumps(json.loads(metadata["env_spec"]) | spec)
    for name in remove:
        del metadata[name]
    path.write_text(json.dumps(metadata))


def test_an_id_and_a_folder_are_the_same_data(kept_by_minari):
    bundled = load("sample/hopper/medium-v0").states
    assert torch.equal(load("mujoco/hopper/medium-v0").states, bundled)
    assert torch.equal(load(kept_by_minari).states, bundled)


def test_data_of_another_environment_are_refused():
    """HalfCheetah's shapes are Walker2d's."""
    said = refused("sample/halfcheetah/medium-v0", "Walker2d-v5")
    assert "recorded in HalfCheetah-v5, not in Walker2d-v5" in said


def test_another_version_of_the_environment_is_said(capsys):
    """Walker2d-v4 is not Walker2d-v5: a foot has another friction."""
    load("sample/walker2d/medium-v0", "Walker2d-v5")
    assert not capsys.readouterr().out
    load("sample/walker2d/medium-v0", "Walker2d-v4")
    (line,) = capsys.readouterr().out.splitlines()
    assert "recorded in Walker2d-v5" in line and "evaluated in Walker2d-v4" in line


@pytest.mark.parametrize("recorded_in", ["Mine-v0", None])
def test_data_of_an_environment_of_ones_own(recorded_in, kept_by_minari, capsys):
    """Minari keeps the name of an environment without its module, or no name."""
    change_metadata(kept_by_minari, () if recorded_in else ["env_spec"], id=recorded_in)
    gym.register("Mine-v0", gym.spec("Hopper-v5").entry_point, max_episode_steps=1000)
    args = sample_args(dt, env="gymnasium:Mine-v0", dataset=str(kept_by_minari))
    assert len(dt.load_episodes(args, dt.make_env(args, 1))) > 1
    assert not capsys.readouterr().out
    if recorded_in:
        assert "Mine-v0, not in Hopper-v5" in refused(kept_by_minari)


@pytest.mark.parametrize("space", ["observation_space", "action_space"])
def test_no_code_that_a_data_set_names_is_run(space, kept_by_minari, tmp_path):
    """Without a space Minari would make the environment, of any entry point."""
    kwargs = {"path": str(tmp_path / "evil")}
    change_metadata(kept_by_minari, [space], entry_point="os:mkdir", kwargs=kwargs)
    assert "not opened" in refused(kept_by_minari)
    assert not (tmp_path / "evil").exists()


def test_a_download_that_was_cut_is_refused(kept_by_minari, tmp_path):
    """And the sentence says where Minari keeps it."""
    data = kept_by_minari / "data" / "main_data.hdf5"
    data.write_bytes(data.read_bytes()[:1_000_000])
    assert f"delete its folder under {tmp_path};" in refused("mujoco/hopper/medium-v0")


@pytest.mark.parametrize("dataset", ["/home", ".", "{}/data", "{}/.."])
def test_folders_that_are_no_data_set_are_not_to_be_deleted(dataset, tmp_path, monkeypatch):
    """Of a level too deep or too high, too: what is to be deleted is what Minari has downloaded."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(HOPPER, tmp_path / "copy")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "kept by minari"))
    dataset = dataset.format(copy)
    said = refused(dataset)
    assert f"--dataset {dataset} is no D4RL file and no folder" in said
    advice = f"if a download was cut, delete its folder under {tmp_path / 'kept by minari'};"
    assert said.count("delete") == 1 and advice in said
