"""Evaluation of all episodes at once against one episode at a time, as the reference plays them."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_data, make_model, sample_args

import dt_pretrained as dt

for name, version in (
    ("Hopper", "v5"),
    ("Hopper", "v4"),
    ("Walker2d", "v5"),
    ("HalfCheetah", "v5"),
):
    gym.register(
        id=f"Short{name}-{version}",
        entry_point=gym.spec(f"{name}-{version}").entry_point,
        max_episode_steps=60,
    )


def setup(env_id, context_length, num_episodes=3):
    """A model, an environment whose episodes end after 60 steps, and arguments."""
    name = env_id[:-3]
    args = sample_args(
        dt,
        env=env_id,
        dataset=f"sample/{name.lower()}/medium-v0",
        context_length=context_length,
        return_scale=100,
        head_std=0.01,  # not saturated, so that episodes differ
        seed=4,
    )
    data = load_data(dt, args)
    backbone = dt.load_backbone(dt.replace(args, backbone="random-gpt2"))
    model = dt.make_model(args, backbone, data, max_timestep=60)
    args = dt.replace(args, env=f"Short{env_id}")
    return model, dt.make_env(args, num_episodes), args


def watch(env):
    """What goes into and comes out of the steps of a vector environment."""
    seen = []
    step = env.step

    def watched_step(actions):
        result = step(actions)
        seen.append((actions.copy(), result[1]))
        return result

    env.step = watched_step
    return seen


@torch.no_grad()
def play_one(model, args, seed):
    """One episode, growing lists, the last K steps stacked anew each time; its actions, rewards."""
    env = gym.make(args.env)
    observation, _ = env.reset(seed=seed)
    returns_to_go, states, actions, rewards = [args.target_return / args.return_scale], [], [], []
    over = False
    while not over:
        state = torch.tensor(observation, dtype=torch.float32)
        states.append((state - model.state_mean) / model.state_std)
        past = slice(-args.context_length, None)
        actions.append(torch.zeros(env.action_space.shape))
        predicted = model(
            torch.tensor(returns_to_go, dtype=torch.float32)[past, None][None],
            torch.stack(states)[past][None],
            torch.stack(actions)[past][None],
            torch.arange(len(states))[past][None],
        )
        actions[-1] = predicted[0, -1]
        observation, reward, terminated, truncated, _ = env.step(actions[-1].numpy())
        rewards.append(reward)
        returns_to_go.append(returns_to_go[-1] - reward / args.return_scale)
        over = terminated or truncated
    return torch.stack(actions).numpy(), np.array(rewards)


@pytest.mark.parametrize(
    "env_id,K", [("Hopper-v5", 20), ("Hopper-v4", 1), ("Walker2d-v5", 5), ("HalfCheetah-v5", 3)]
)
def test_same_actions_and_rewards_as_one_episode_at_a_time(env_id, K):
    model, env, args = setup(env_id, K)
    seen = watch(env)
    returns, lengths = dt.evaluate(model, env, args)
    if env_id == "HalfCheetah-v5":  # which never ends before its time
        assert list(lengths) == [60] * 3
    else:
        assert len(set(lengths)) > 1  # copies end at different times
    for i in range(3):
        actions, rewards = play_one(model, args, args.seed + i)
        assert len(rewards) == lengths[i]
        ours = np.array([actions[i] for actions, _ in seen[: lengths[i]]])
        # Rounding differences grow with time.
        np.testing.assert_allclose(ours[:25], actions[:25], atol=1e-4)
        np.testing.assert_allclose(returns[i], rewards.sum(), rtol=1e-3)


def test_what_a_copy_does_after_its_end_is_not_counted():
    """Copies told to end after 2, 5 and 8 steps go on and are rewarded, which counts no more."""
    model, env, args = setup("HalfCheetah-v5", 3)
    ends = np.array([2, 5, 8])
    batches = []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[1])))
    seen = watch(env)
    watched_step = env.step

    def ending_step(actions):
        observations, rewards, terminated, truncated, infos = watched_step(actions)
        over = ends == len(seen)
        terminated = terminated | (over & [True, False, True])
        truncated = truncated | (over & [False, True, False])
        return observations, rewards, terminated, truncated, infos

    env.step = ending_step
    returns, lengths = dt.evaluate(model, env, args)
    assert list(lengths) == [2, 5, 8] and batches == [3, 3, 2, 2, 2, 1, 1, 1]
    rewards = np.array([reward for _, reward in seen])
    expected = [rewards[:end, i].sum() for i, end in enumerate(ends)]
    np.testing.assert_allclose(returns, expected, rtol=1e-9)
    assert np.all(rewards[-1] != 0)


def test_the_model_is_asked_for_what_is_still_to_come():
    """What it sees of the return-to-go is what was asked for, less the rewards so far."""
    model, env, args = setup("HalfCheetah-v5", 2)
    args = dt.replace(args, target_return=10)  # of which rewards are more than a rounding
    inputs = []
    model.register_forward_pre_hook(lambda module, x: inputs.append([field.clone() for field in x]))
    seen = watch(env)
    dt.evaluate(model, env, args)
    assert len(inputs) == 60
    received = np.cumsum([rewards for _, rewards in seen], axis=0)
    assert np.abs(received[-1]).min() > 0.1
    for t in (1, 2, 30, 59):
        returns_to_go, _, _, timesteps = inputs[t]
        expected = (args.target_return - received[t - 1]) / args.return_scale
        np.testing.assert_allclose(returns_to_go[:, 1, 0], expected, rtol=1e-6)
        assert timesteps.tolist() == [[t - 1, t]] * 3


def test_same_seed_same_returns_and_no_dropout():
    model, env, args = setup("Hopper-v5", 5)
    dropping = make_model(dt, dt.load_backbone(dt.replace(args, backbone="random", dropout=0.5)))
    for played in (model, dropping.train()):
        first, second = (dt.evaluate(played, env, args)[0] for _ in range(2))
        assert not played.training and np.array_equal(first, second)
        assert not np.array_equal(first, dt.evaluate(played, env, dt.replace(args, seed=1))[0])


def test_normalized_score_is_d4rls():
    assert dt.normalized_score("Hopper-v4", -20.272305) == 0
    assert dt.normalized_score("Hopper-v5", 3234.3) == 100
    assert dt.normalized_score("HalfCheetah-v4", 4770.3) == pytest.approx(40.68, abs=0.01)
    assert dt.normalized_score("Walker2d-v4", 2297) == pytest.approx(50, abs=0.1)
    assert math.isnan(dt.normalized_score("Ant-v5", 0.0))
