"""Evaluation of all episodes at once against one episode at a time, as the reference plays them."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_data, make_model, sample_args

import dt_pretrained as dt


def setup(env_id="Hopper-v5", context_length=20, num_episodes=4):
    dataset = f"sample/{env_id[:-3].lower()}/medium-v0"
    args = sample_args(
        dt, backbone="gpt2", env=env_id, dataset=dataset, context_length=context_length
    )
    env = dt.make_env(args, num_episodes)
    data = load_data(dt, args)
    shape = {"state_dim": data.states.shape[1], "act_dim": data.actions.shape[1]}
    model = make_model(dt, "gpt2", seed=7, **shape)
    model.embed_action.weight.data *= 0.02  # away from saturation, so that episodes differ
    return model, env, data, args


def evaluate(model, env, data, args):
    return dt.evaluate(model, env, data.state_mean, data.state_std, args)


@torch.no_grad()
def play_one(model, data, args, seed, max_steps):
    """One episode, growing lists, the last K steps stacked anew each time; returns its actions and rewards."""
    env = gym.make(args.env)
    observation, _ = env.reset(seed=seed)
    returns_to_go, states, actions, rewards = [args.target_return / 1000], [], [], []
    for t in range(max_steps):
        states.append(
            (torch.tensor(observation, dtype=torch.float32) - data.state_mean) / data.state_std
        )
        past = slice(-args.context_length, None)
        padded_actions = torch.stack([*actions, torch.zeros(data.actions.shape[1])])[past]
        predicted = model(
            torch.tensor(returns_to_go, dtype=torch.float32)[past, None][None],
            torch.stack(states)[past][None],
            padded_actions[None],
            torch.arange(t + 1)[past][None],
        )
        actions.append(predicted[0, -1])
        observation, reward, terminated, truncated, _ = env.step(actions[-1].numpy())
        rewards.append(reward)
        returns_to_go.append(returns_to_go[-1] - reward / 1000)
        if terminated or truncated:
            break
    return torch.stack(actions).numpy(), np.array(rewards)


@pytest.mark.parametrize(
    "env_id,context_length", [("Hopper-v5", 20), ("Hopper-v4", 1), ("Walker2d-v5", 5)]
)
def test_same_actions_and_rewards_as_one_episode_at_a_time(env_id, context_length):
    model, env, data, args = setup(env_id, context_length)
    seen = []
    step = env.step
    env.step = lambda actions: seen.append((actions.copy(), step(actions))) or seen[-1][1]
    returns, lengths = evaluate(model, env, data, args)
    assert len(set(lengths)) > 1  # copies end at different times
    for i in range(env.num_envs):
        actions, rewards = play_one(model.eval(), data, args, args.seed + i, 1000)
        assert len(rewards) == lengths[i]
        horizon = min(25, len(rewards))  # rounding differences grow with time
        np.testing.assert_allclose([a[i] for a, _ in seen[:horizon]], actions[:horizon], atol=1e-4)
        np.testing.assert_allclose(
            [r[1][i] for _, r in seen[:horizon]], rewards[:horizon], atol=1e-3
        )
        np.testing.assert_allclose(returns[i], rewards.sum(), rtol=1e-2)


def test_what_a_copy_does_after_its_end_is_not_counted():
    """Copies told to end after 2, 5 and 8 steps go on and are rewarded, but only those steps are counted and seen."""
    model, env, data, args = setup("HalfCheetah-v5", 3, num_episodes=3)
    ends, rewards, batches = np.array([2, 5, 8]), [], []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[1])))
    step = env.step

    def ending_step(actions):
        observations, reward, terminated, truncated, infos = step(actions)
        rewards.append(reward)
        return observations, reward, terminated | (ends == len(rewards)), truncated, infos

    env.step = ending_step
    returns, lengths = evaluate(model, env, data, args)
    assert list(lengths) == [2, 5, 8] and batches == [3, 3, 2, 2, 2, 1, 1, 1]
    np.testing.assert_allclose(
        returns, [np.array(rewards)[:end, i].sum() for i, end in enumerate(ends)], rtol=1e-9
    )
    assert np.all(np.array(rewards)[-1] != 0)


def test_full_length_episodes_and_return_to_go():
    """HalfCheetah never ends early; the return-to-go that the model sees falls by exactly the rewards."""
    model, env, data, args = setup("HalfCheetah-v5", 2, num_episodes=2)
    seen, rewards = [], []
    model.register_forward_pre_hook(lambda module, inputs: seen.append([x.clone() for x in inputs]))
    step = env.step
    env.step = lambda actions: rewards.append((r := step(actions))[1]) or r
    returns, lengths = evaluate(model, env, data, args)
    assert list(lengths) == [1000, 1000] and len(seen) == 1000
    np.testing.assert_allclose(returns, np.sum(rewards, axis=0), rtol=1e-6)
    expected = args.target_return / 1000 - np.cumsum(rewards, axis=0) / 1000
    for t in (1, 2, 500, 999):
        returns_to_go, _, _, timesteps = seen[t]
        np.testing.assert_allclose(returns_to_go[:, 1, 0], expected[t - 1], rtol=1e-3, atol=1e-3)
        assert timesteps[:, 1].tolist() == [t, t]


def test_same_seed_same_returns_and_model_left_in_eval_mode():
    model, env, data, args = setup(num_episodes=3)
    model.train()
    first, second = (evaluate(model, env, data, args)[0] for _ in range(2))
    assert not model.training and np.array_equal(first, second)
    other, _ = evaluate(model, env, data, replace(args, seed=1))
    assert not np.array_equal(first, other)


def test_normalized_score_is_d4rls():
    assert (
        dt.normalized_score("Hopper-v4", -20.272305) == 0
        and dt.normalized_score("Hopper-v5", 3234.3) == 100
    )
    assert abs(dt.normalized_score("HalfCheetah-v4", 4770.3) - 40.68) < 0.01
    assert abs(dt.normalized_score("Walker2d-v4", 2297) - 50) < 0.1
    assert math.isnan(dt.normalized_score("Ant-v5", 0.0))
