"""Data sets as tensors, and windows, against plain loops over trajectories."""

import json
import shutil

import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ASSETS, load_data, sample_args
from torch.utils._python_dispatch import TorchDispatchMode

import dt_pretrained as dt

ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}


def load(dataset, env="Hopper-v5"):
    return load_data(dt, sample_args(dt, env=env, dataset=str(dataset), context_length=1))


def write_d4rl(path, episodes, unfinished=0, **changes):
    """Write (observations, actions, rewards, terminated) episodes as D4RL does, then steps of an unfinished one."""
    columns = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for observations, actions, rewards, terminated in episodes:
        last = np.arange(len(rewards)) == len(rewards) - 1
        for name, x in zip(
            columns, (observations, actions, rewards, last & terminated, last & (not terminated))
        ):
            columns[name].append(x)
    if unfinished:
        observations, actions, rewards, _ = episodes[0]
        flags = np.zeros(len(rewards), bool)
        for name, x in zip(columns, (observations, actions, rewards, flags, flags)):
            columns[name].append(x[:unfinished])
    with h5py.File(path, "w") as file:
        for name, parts in columns.items():
            file[name] = changes.get(name, np.concatenate(parts))
    return path


def made_up_episodes(lengths, state_dim=11, act_dim=3):
    """Episodes of these lengths; every second one is terminated, the others truncated."""
    rng = np.random.default_rng(0)
    episodes = []
    for i, n in enumerate(lengths):
        observations, actions = rng.normal(3, 2, (n, state_dim)), rng.uniform(-1, 1, (n, act_dim))
        episodes.append(
            (observations.astype("f4"), actions.astype("f4"), rng.normal(size=n), i % 2 == 0)
        )
    return episodes


EPISODES = made_up_episodes([5, 6])


def bundled_episodes(name):
    raw = minari.MinariDataset(ASSETS / "minari" / "sample" / name / "medium-v0" / "data")
    return [
        (e.observations[:-1], e.actions, e.rewards, e.terminations[-1])
        for e in raw.iterate_episodes()
    ]


def plain_window(episodes, start, K):
    """The window that starts at transition `start` of all, from a list of trajectories, padded on the right with 0."""
    every_state = np.concatenate([e[0] for e in episodes]).astype(np.float64)
    mean, std = every_state.mean(0), every_state.std(0) + 1e-6
    episode = 0
    while start >= len(episodes[episode][2]):
        start -= len(episodes[episode][2])
        episode += 1
    observations, actions, rewards, _ = episodes[episode]
    window = []
    for t in range(start, start + K):
        if t < len(rewards):
            window.append(
                (sum(rewards[t:]) / 1000, (observations[t] - mean) / std, actions[t], t, True)
            )
        else:
            window.append((0.0, 0 * mean, 0 * actions[0], 0, False))
    return [np.array(column) for column in zip(*window)]


@pytest.mark.parametrize("K", [1, 5, 20])
def test_windows_equal_a_plain_loop(K, tmp_path):
    episodes = made_up_episodes([1, 7, 30, 2, 19])
    data = load(write_d4rl(tmp_path / "d.hdf5", episodes))
    assert len(data.states) == 59
    starts = torch.arange(59)
    returns_to_go, states, actions, timesteps, valid = data.windows(starts, K)
    for i in starts:
        plain = plain_window(episodes, i.item(), K)
        for ours, theirs in zip(
            (returns_to_go[i, :, 0], states[i], actions[i], timesteps[i], valid[i]), plain
        ):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


def test_bundled_windows_equal_a_plain_loop():
    episodes = bundled_episodes("hopper")
    assert any(e[3] for e in episodes) and any(not e[3] for e in episodes)  # both ways to end
    data = load("sample/hopper/medium-v0")
    starts = torch.tensor([0, 5, 990, len(data.states) // 2, len(data.states) - 3])
    for i, start in enumerate(starts):
        plain = plain_window(episodes, start.item(), 20)
        for ours, theirs in zip(data.windows(starts, 20), plain):
            np.testing.assert_allclose(
                ours[i].squeeze(-1) if ours.shape[-1] == 1 else ours[i], theirs, atol=1e-5
            )


@pytest.mark.parametrize("name", ENVS)
def test_minari_and_d4rl_of_the_same_trajectories_give_the_same_tensors(name, tmp_path):
    path = write_d4rl(
        tmp_path / "d4rl.hdf5", bundled_episodes(name), unfinished=4
    )  # D4RL's last one is cut off
    from_minari, from_d4rl = load(f"sample/{name}/medium-v0", ENVS[name]), load(path, ENVS[name])
    assert 20_000 <= len(from_minari.states) < 40_000
    for field, expected in vars(from_minari).items():
        assert torch.equal(getattr(from_d4rl, field), expected), field


def test_states_are_normalized_and_actions_in_range():
    data = load("sample/walker2d/medium-v0", "Walker2d-v5")
    assert data.states.mean(0).abs().max() < 1e-4 and (data.states.std(0) - 1).abs().max() < 1e-3
    assert data.actions.abs().max() <= 1


def test_minari_id_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shutil.copytree(
        ASSETS / "minari/sample/hopper/medium-v0", tmp_path / "mujoco" / "hopper" / "medium-v0"
    )
    data = load(dt.TASKS["Hopper"].dataset)
    assert torch.equal(data.states, load("sample/hopper/medium-v0").states)


class NoFloat64(TorchDispatchMode):
    """Fail where a float64 tensor comes into being anywhere but on the CPU, as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            assert not (
                torch.is_tensor(x) and x.dtype == torch.float64 and x.device.type != "cpu"
            ), func
        return out


def test_no_float64_reaches_the_device():
    """The meta device stands for one that has none."""
    args = sample_args(dt)
    episodes = dt.load_episodes(args, dt.make_env(args, 1))
    with NoFloat64():
        data = dt.OfflineData(episodes, torch.device("meta"))
    assert {x.dtype for x in vars(data).values()} == {torch.float32, torch.int64}
    assert {x.device.type for x in vars(data).values()} == {"meta"}
    with pytest.raises(AssertionError), NoFloat64():  # and it would be noticed
        torch.zeros(2, device="meta").double()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        load(*arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2 and len(message.strip().splitlines()) == 1
    return message


def test_data_of_another_environment_are_refused(tmp_path, capsys):
    """A Minari set says where it was recorded; HalfCheetah's shapes are Walker2d's."""
    message = refused(capsys, "sample/halfcheetah/medium-v0", "Walker2d-v5")
    assert "HalfCheetah-v5" in message and "Walker2d-v5" in message
    load("sample/halfcheetah/medium-v0", "HalfCheetah-v4")  # another version is fine
    path = write_d4rl(tmp_path / "hopper.hdf5", EPISODES)
    message = refused(capsys, path, "Walker2d-v5")
    assert all(shape in message for shape in ("(11,)", "(17,)"))


def test_files_are_what_they_are_whatever_their_name(tmp_path):
    """A D4RL file of any ending, and a Minari folder given as a path."""
    expected = load(write_d4rl(tmp_path / "d4rl.hdf5", EPISODES))
    for name in ("data.h5", "data.HDF5", "data"):
        data = load(write_d4rl(tmp_path / name, EPISODES))
        assert torch.equal(data.states, expected.states)
    data = load(ASSETS / "minari/sample/hopper/medium-v0")
    assert torch.equal(data.states, load("sample/hopper/medium-v0").states)


def test_without_timeouts_terminals_end_the_episodes(tmp_path, capsys):
    """As in D4RL's first files: the second episode, which was truncated, has no end here."""
    path = write_d4rl(tmp_path / "v0.hdf5", made_up_episodes([5, 6, 7]))
    with h5py.File(path, "a") as file:
        del file["timeouts"]
    data = load(path)
    assert "no timeouts" in capsys.readouterr().out
    assert data.episode_ends.unique().tolist() == [5, 18]


def test_dimensions_that_are_constant_keep_their_scale(tmp_path):
    """A state of 0.5 that was always 0 in the data is 0.5 to the model, not half a million."""
    observations = np.concatenate([episode[0] for episode in EPISODES])
    observations[:, 3] = 0.1  # whose mean in float64 is not exactly itself
    data = load(write_d4rl(tmp_path / "d.hdf5", EPISODES, observations=observations))
    assert data.state_std[3] == 1 and data.states[:, 3].abs().max() < 1e-6
    others = np.delete(np.arange(11), 3)
    std = observations[:, others].std(axis=0, dtype=np.float64) + 1e-6
    np.testing.assert_allclose(data.state_std[others], std, rtol=1e-6)


def test_no_code_from_a_data_set_is_run(minari_copy, capsys, tmp_path):
    """Without an observation space Minari would make the environment, of any entry point."""
    metadata = minari_copy.with_name("metadata.json")
    content = json.loads(metadata.read_text())
    spec = json.loads(content["env_spec"])
    spec["entry_point"] = "os:mkdir"
    spec["kwargs"] = {"path": str(tmp_path / "evil")}
    content["env_spec"] = json.dumps(spec)
    for space in ("observation_space", "action_space"):
        changed = {name: value for name, value in content.items() if name != space}
        metadata.write_text(json.dumps(changed))
        assert "not opened" in refused(capsys, "local/hopper/medium-v0")
        assert not (tmp_path / "evil").exists()


def test_a_context_beyond_the_longest_episode_is_refused(tmp_path, capsys):
    path = write_d4rl(tmp_path / "d.hdf5", EPISODES)
    args = sample_args(dt, dataset=str(path), context_length=7)
    with pytest.raises(SystemExit):
        load_data(dt, args)
    assert "longest episode, 6" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_hdf5_is_refused(keep, tmp_path, capsys):
    content = write_d4rl(tmp_path / "whole.hdf5", made_up_episodes([300, 200])).read_bytes()
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert "cut.hdf5" in refused(capsys, cut)


@pytest.fixture
def minari_copy(tmp_path, monkeypatch):
    """A copy of the bundled Hopper data as local/hopper/medium-v0, to be damaged; returns its file."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    shutil.copytree(
        ASSETS / "minari/sample/hopper/medium-v0", tmp_path / "local" / "hopper" / "medium-v0"
    )
    return tmp_path / "local" / "hopper" / "medium-v0" / "data" / "main_data.hdf5"


def test_truncated_minari_data_is_refused(minari_copy, capsys):
    minari_copy.write_bytes(minari_copy.read_bytes()[:1_000_000])
    assert "local/hopper" in refused(capsys, "local/hopper/medium-v0")


def test_zero_length_episode_is_refused(minari_copy, capsys):
    with h5py.File(minari_copy, "a") as file:
        for name in ("actions", "rewards", "terminations", "truncations"):
            file[f"episode_2/{name}"].resize(0, axis=0)
    assert "without a step" in refused(capsys, "local/hopper/medium-v0")


@pytest.mark.parametrize(
    "changes,said",
    [
        (dict(rewards=np.full(11, np.nan)), "not finite"),
        (dict(observations=np.full((11, 11), np.inf)), "not finite"),
        (dict(terminals=np.zeros(11, bool), timeouts=np.zeros(11, bool)), "no episode"),
        (dict(observations=EPISODES[0][0]), "length"),
        (dict(terminals=np.zeros(9, bool)), "length"),
        (dict(timeouts=np.ones(14, bool)), "length"),
        (dict(observations=np.full((11, 11), b"12")), "numbers"),
        (dict(actions=np.full((11, 3), 1 + 1j)), "numbers"),
        (dict(rewards=np.full(11, b"1.5")), "numbers"),
        (dict(actions=np.zeros(11)), "shape"),
        (dict(observations=np.zeros((11, 11, 2))), "shape"),
        (dict(rewards=np.zeros((11, 2))), "shape"),
        (dict(terminals=np.float64(3)), "yes or no"),
        (dict(terminals=np.full(11, b"no")), "yes or no"),
        (dict(timeouts=np.full((11, 1), True)), "yes or no"),
        (dict(actions=np.full((11, 3), 5.0)), "beyond -1 to 1"),
        (dict(rewards=np.full(11, 3e38)), "1e30"),
    ],
)
def test_malformed_d4rl_files_end_with_one_sentence(changes, said, tmp_path, capsys):
    assert said in refused(capsys, write_d4rl(tmp_path / "bad.hdf5", EPISODES, **changes))


def test_missing_columns_and_files(tmp_path, capsys):
    with h5py.File(tmp_path / "few.hdf5", "w") as file:
        file["observations"] = np.zeros((3, 11))
    assert "few.hdf5" in refused(capsys, tmp_path / "few.hdf5")
    assert "missing.hdf5" in refused(capsys, tmp_path / "missing.hdf5")
