"""Time this repository's way of training and evaluating against the released code's, in one process.

    python tests/tools/benchmark.py --device cpu --size sample     # a minute on two cores
    python tests/tools/benchmark.py --size small                   # GPT-2 small, wants a GPU

The released way is written out below: transformers' GPT2Model in eager float32, windows cut in Python with the
return-to-go of the whole rest of the episode recomputed for each, left padding with a mask, a loss read with .item() in
every step, and one episode at a time in evaluation. The estimators of mutual information of analyze_repr.py are timed
one at a time, as the released code trains them, and side by side.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import analyze_repr as ar
import dt_pretrained as dt


@dataclass
class Args:
    device: str = "auto"
    """as in dt_pretrained.py"""
    size: Literal["sample", "small"] = "sample"
    """sample: 4 blocks, 128 wide, 10 episodes; small: GPT-2 small, 100 episodes"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of our way; the released way is float32"""
    steps: int | None = None
    """timed training steps of each way; if not given, 10 on a CPU and 50 on a GPU"""
    eval_steps: int | None = None
    """time steps of each timed evaluation; if not given, 100 on a CPU and 1000 on a GPU"""


# ---------------------------------------------------------------------------------------------------------------
# The released way
# ---------------------------------------------------------------------------------------------------------------
class ReleasedModel(torch.nn.Module):
    """The Decision Transformer around transformers' GPT2Model, with attention mask and left padding."""

    def __init__(self, block, n_layer, state_dim, act_dim):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        sizes = dict(
            n_embd=block.n_embd,
            n_layer=n_layer,
            n_head=block.n_head,
            activation_function=block.activation,
        )
        gpt2 = GPT2Config(
            **sizes, resid_pdrop=0.2, vocab_size=1, bos_token_id=None, eos_token_id=None
        )
        gpt2._attn_implementation = "eager"
        self.transformer = GPT2Model(gpt2)
        self.embed_timestep = torch.nn.Embedding(1000, block.n_embd)
        self.embed_return = torch.nn.Linear(1, block.n_embd)
        self.embed_state = torch.nn.Linear(state_dim, block.n_embd)
        self.embed_action = torch.nn.Linear(act_dim, block.n_embd)
        self.embed_ln = torch.nn.LayerNorm(block.n_embd)

    def forward(self, states, actions, returns_to_go, timesteps, mask):
        batch, length = mask.shape
        tokens = torch.stack(
            (
                self.embed_return(returns_to_go),
                self.embed_state(states),
                self.embed_action(actions),
            ),
            dim=1,
        )
        tokens = self.embed_ln(tokens.permute(0, 2, 1, 3).reshape(batch, 3 * length, -1))
        tokens = tokens + self.embed_timestep(timesteps).repeat_interleave(3, dim=1)
        hidden = self.transformer(
            inputs_embeds=tokens, attention_mask=mask.repeat_interleave(3, dim=1), use_cache=False
        )
        hidden = hidden.last_hidden_state.reshape(batch, length, 3, -1)[:, :, 1]
        return torch.tanh(F.linear(hidden, self.embed_action.weight.T))


def released_batch(episodes, mean, std, batch_size, K, device, rng):
    """Cut windows one after the other, as get_batch of the released experiment.py does."""
    lengths = np.array([len(rewards) for _, _, rewards in episodes])
    columns = [[] for _ in range(5)]
    for i in rng.choice(len(episodes), size=batch_size, p=lengths / lengths.sum()):
        observations, actions, rewards = episodes[i]
        start = rng.integers(len(rewards))
        states = (observations[start : start + K] - mean) / std
        pad = K - len(states)
        returns_to_go = (
            np.array([rewards[t:].sum() for t in range(start, start + len(states))])[:, None] / 1000
        )
        window = (
            states,
            actions[start : start + K],
            returns_to_go,
            np.arange(start, start + len(states)),
            np.ones(len(states)),
        )
        for column, x in zip(columns, window):
            column.append(np.concatenate([np.zeros((pad, *x.shape[1:])), x]))
    states, actions, returns_to_go, timesteps, mask = (
        torch.from_numpy(np.stack(c)).to(device) for c in columns
    )
    return states.float(), actions.float(), returns_to_go.float(), timesteps.long(), mask.long()


def released_step(model, optimizer, episodes, mean, std, batch_size, K, device, rng):
    batch = released_batch(episodes, mean, std, batch_size, K, device, rng)
    mask = batch[-1].reshape(-1) > 0
    predicted, actions = (x.reshape(-1, x.shape[-1])[mask] for x in (model(*batch), batch[1]))
    loss = ((predicted - actions) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
    return loss.detach().cpu().item()


@torch.no_grad()
def released_episode(model, args, data, num_steps, seed):
    """One episode, its tensors grown step by step; returns the number of steps played."""
    import gymnasium as gym

    env = gym.make(args.env)
    observation, _ = env.reset(seed=seed)
    mean, std = data.state_mean, data.state_std
    states, actions, returns_to_go = [], [], [args.target_return / 1000]
    for t in range(num_steps):
        states.append(
            (torch.tensor(observation, dtype=torch.float32, device=data.state_mean.device) - mean)
            / std
        )
        last = slice(-args.context_length, None)
        padded = torch.stack(
            [*actions, torch.zeros(data.actions.shape[1], device=data.state_mean.device)]
        )[last][None]
        R = torch.tensor(returns_to_go, dtype=torch.float32, device=data.state_mean.device)[last][
            None, :, None
        ]
        timesteps = torch.arange(t + 1, device=data.state_mean.device)[last][None]
        actions.append(
            model(
                torch.stack(states)[last][None], padded, R, timesteps, torch.ones_like(timesteps)
            )[0, -1]
        )
        observation, reward, terminated, truncated, _ = env.step(actions[-1].cpu().numpy())
        returns_to_go.append(returns_to_go[-1] - reward / 1000)
        if terminated or truncated:
            break
    return t + 1


# ---------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------
def median_seconds(step, warmup, repeats, device):
    """Median time of one call, the device's work included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warmup:]))


def mine_seconds(device, count, alone, width, passes):
    """Seconds per estimator of I(state; T): `alone` of them one at a time, `count` side by side."""
    generator = torch.Generator().manual_seed(0)
    args = ar.Args(mine_passes=passes)
    x = torch.randn(1, 2 * args.mine_windows, 17, generator=generator)
    t = torch.randn(1, 2 * args.mine_windows, width, generator=generator)
    seconds = []
    for group, repeats in ((1, alone), (count, 1)):
        many_x, many_t = x.expand(group, -1, -1), t.expand(group, -1, -1)
        ar.mine(many_x, many_t, replace(args, mine_passes=1), device)  # warm-up
        started = time.perf_counter()
        for _ in range(repeats):
            ar.mine(many_x, many_t, args, device)  # ends with the estimates on the CPU
        seconds.append((time.perf_counter() - started) / (group * repeats))
    return seconds


def our_step(model, trained_model, optimizer, data, args, window_starts):
    """The body of the loop in dt_pretrained.train."""
    windows = data.windows(window_starts, args.context_length)
    with dt.autocast(args, window_starts.device):
        loss, _ = dt.training_loss(trained_model, windows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def main(options):
    small = options.size == "small"
    args = dt.Args(
        backbone="random-gpt2",
        env="HalfCheetah-v5",
        dataset="sample/halfcheetah/medium-v0",
        sample=not small,
        device=options.device,
        precision=options.precision,
        target_return=6000.0,
        num_eval_episodes=100 if small else 10,
    )
    device = dt.find_device(args)
    on_gpu = device.type == "cuda"
    repeats = options.steps or (50 if on_gpu else 10)
    eval_steps = options.eval_steps or (1000 if on_gpu else 100)
    gpu_or_cpu = f"CPU, {torch.get_num_threads()} threads"
    if on_gpu:
        gpu_or_cpu = torch.cuda.get_device_name()
    rows = []

    started = time.perf_counter()
    env = dt.make_env(args, args.num_eval_episodes)
    episodes = dt.load_episodes(args, env)
    data = dt.OfflineData(episodes, device)
    load_seconds = time.perf_counter() - started
    mean, std = data.state_mean.cpu().numpy(), data.state_std.cpu().numpy()
    backbone = dt.load_backbone(args)
    block = backbone.blocks[0]
    shape = (data.states.shape[1], data.actions.shape[1])
    print(f"{gpu_or_cpu}; {len(backbone.blocks)} blocks, {block.n_embd} wide")
    print(f"environments and {len(data.states):,} steps of data loaded in {load_seconds:.1f} s")

    torch.manual_seed(0)
    for K in (20, 1):
        args.context_length = K
        released = ReleasedModel(block, len(backbone.blocks), *shape).to(device)
        optimizer = torch.optim.AdamW(released.parameters(), 1e-4)
        rng = np.random.default_rng(0)
        inputs = (released, optimizer, episodes, mean, std, args.batch_size, K, device, rng)
        theirs = median_seconds(partial(released_step, *inputs), 3, repeats, device)
        model = dt.make_model(args, backbone, *shape, 1000).to(device).train()
        trained_model = torch.compile(model, mode="reduce-overhead") if args.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        starts = torch.randint(len(data.states), (args.batch_size,), device=device)
        step = partial(our_step, model, trained_model, optimizer, data, args, starts)
        ours = median_seconds(step, 10 if on_gpu else 3, repeats, device)
        rows.append((f"training step, K = {K}", theirs * 1e3, ours * 1e3, "ms"))
        if K == 20:
            released.eval()
            started = time.perf_counter()
            played = released_episode(released, args, data, eval_steps, args.seed)
            theirs_evaluation = (time.perf_counter() - started) / played
            evaluated = model

    args.context_length = 20
    env.spec.max_episode_steps = eval_steps
    started = time.perf_counter()
    _, lengths = dt.evaluate(evaluated, env, data.state_mean, data.state_std, args)
    ours_evaluation = (time.perf_counter() - started) / lengths.sum()
    name = "evaluation, one environment step, K = 20"
    rows.append((name, theirs_evaluation * 1e3, ours_evaluation * 1e3, "ms"))

    count, alone, passes = (60, 10, 20) if on_gpu else (12, 3, 5)
    alone_seconds, together_seconds = mine_seconds(device, count, alone, block.n_embd, passes)
    name = f"MINE, one estimator of {count}, {passes} passes"
    rows.append((name, alone_seconds * 1e3, together_seconds * 1e3, "ms"))

    print(f"\n{'median':<42}{'released way':>14}{'ours':>14}{'ratio':>9}")
    for name, theirs, ours, unit in rows:
        print(f"{name:<42}{theirs:>11.2f} {unit}{ours:>11.2f} {unit}{theirs / ours:>8.1f}×")
    seconds = ours_evaluation * args.num_eval_episodes * 1000
    print(f"{args.num_eval_episodes} episodes of 1,000 steps: {seconds:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
