"""Time this repository's way of training and evaluating against the released code's, in one process.

    python tests/benchmark.py --device cpu --size sample     # a minute on two cores
    python tests/benchmark.py --size small                   # GPT-2 small, wants a GPU

The released way is written out below: transformers' GPT2Model in eager float32, windows cut in Python with the
return-to-go of the whole rest of the episode recomputed for each, left padding with a mask, a loss read with .item() in
every step, and one episode at a time in evaluation. The estimators of mutual information of analyze_repr.py are timed
one at a time, as the released code trains them, and side by side.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import analyze_repr as ar  # noqa: E402
import dt_pretrained as dt  # noqa: E402


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

    def __init__(self, config, state_dim, act_dim):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        gpt2 = GPT2Config(
            n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head, activation_function=config.activation,
            resid_pdrop=0.2, vocab_size=1, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )  # fmt: skip
        self.transformer = GPT2Model(gpt2)
        self.embed_timestep = torch.nn.Embedding(1000, config.n_embd)
        self.embed_return = torch.nn.Linear(1, config.n_embd)
        self.embed_state = torch.nn.Linear(state_dim, config.n_embd)
        self.embed_action = torch.nn.Linear(act_dim, config.n_embd)
        self.embed_ln = torch.nn.LayerNorm(config.n_embd)

    def forward(self, states, actions, returns_to_go, timesteps, mask):
        batch, length = mask.shape
        tokens = torch.stack((self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions)), dim=1)
        tokens = self.embed_ln(tokens.permute(0, 2, 1, 3).reshape(batch, 3 * length, -1))
        tokens = tokens + self.embed_timestep(timesteps).repeat_interleave(3, dim=1)
        hidden = self.transformer(inputs_embeds=tokens, attention_mask=mask.repeat_interleave(3, dim=1), use_cache=False)
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
        returns_to_go = np.array([rewards[t:].sum() for t in range(start, start + len(states))])[:, None] / 1000
        window = (
            states,
            actions[start : start + K],
            returns_to_go,
            np.arange(start, start + len(states)),
            np.ones(len(states)),
        )
        for column, x in zip(columns, window):
            column.append(np.concatenate([np.zeros((pad, *x.shape[1:])), x]))
    states, actions, returns_to_go, timesteps, mask = (torch.from_numpy(np.stack(c)).to(device) for c in columns)
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
        states.append((torch.tensor(observation, dtype=torch.float32, device=args.device) - mean) / std)
        last = slice(-args.context_length, None)
        padded = torch.stack([*actions, torch.zeros(data.actions.shape[1], device=args.device)])[last][None]
        R = torch.tensor(returns_to_go, dtype=torch.float32, device=args.device)[last][None, :, None]
        timesteps = torch.arange(t + 1, device=args.device)[last][None]
        actions.append(model(torch.stack(states)[last][None], padded, R, timesteps, torch.ones_like(timesteps))[0, -1])
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
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for i in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warmup:]))


def mine_seconds(device, count, alone, width, passes):
    """Seconds per estimator of I(state; T), `alone` of them trained one at a time and `count` side by side."""
    generator = torch.Generator().manual_seed(0)
    x = list(torch.randn(4, 2 * ar.Args.mine_windows, 17, generator=generator))
    t = list(torch.randn(4, 2 * ar.Args.mine_windows, width, generator=generator))
    seconds = []
    for number, group in ((alone, 1), (count, count)):
        args = ar.Args(device=device, mine_repeats=1, mine_passes=passes, mine_group=group)
        pairs = [(i % 4, i // 4 % 4) for i in range(number)]
        ar.mutual_information(x, t, pairs[:group], replace(args, mine_passes=1))  # warm-up
        start = time.perf_counter()
        ar.mutual_information(x, t, pairs, args)  # ends with the estimates on the CPU
        seconds.append((time.perf_counter() - start) / number)
    return seconds


def main(options):
    small = options.size == "small"
    args = dt.resolve(
        dt.Args(
            backbone="random-gpt2",
            env="HalfCheetah-v5",
            dataset=str(dt.ASSETS / "halfcheetah-medium"),
            sample=not small,
            device=options.device,
            precision=options.precision,
            num_eval_episodes=100 if small else 10,
        )  # fmt: skip
    )
    on_gpu = args.device.startswith("cuda")
    repeats = options.steps or (50 if on_gpu else 10)
    eval_steps = options.eval_steps or (1000 if on_gpu else 100)
    device_name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    rows = []

    start = time.perf_counter()
    env = dt.make_env(args, args.num_eval_episodes)
    data = dt.load_data(args, env)
    load_seconds = time.perf_counter() - start
    episodes, _, _ = dt.read_minari(args.dataset)
    mean, std = data.state_mean.cpu().numpy(), data.state_std.cpu().numpy()
    config, _, _ = dt.load_backbone(args)
    print(f"{device_name}; {config.n_layer} blocks, {config.n_embd} wide; batch {args.batch_size}; ours in {args.precision}")
    print(f"environments and {len(data.states):,} steps of data loaded in {load_seconds:.1f} s")

    torch.manual_seed(0)
    for K in (20, 1):
        args.context_length = K
        released = ReleasedModel(config, data.states.shape[1], data.actions.shape[1]).to(args.device)
        optimizer, rng = torch.optim.AdamW(released.parameters(), 1e-4), np.random.default_rng(0)
        theirs = median_seconds(
            lambda: released_step(released, optimizer, episodes, mean, std, args.batch_size, K, args.device, rng),
            3,
            repeats,
            args.device,
        )
        model = dt.DecisionTransformer(config, data.states.shape[1], data.actions.shape[1], 1000).to(args.device)
        learning_rate = torch.tensor(1e-4, device=args.device)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, fused=True, capturable=on_gpu)
        training_step = dt.TrainingStep(model, optimizer, data, args)
        generator = torch.Generator().manual_seed(0)

        def step():
            training_step(torch.randint(len(data.states), (args.batch_size,), generator=generator).to(args.device))

        ours = median_seconds(step, 10 if on_gpu else 3, repeats, args.device)
        rows.append((f"training step, K = {K}", theirs * 1e3, ours * 1e3, "ms"))
        if K == 20:
            released.eval()
            start = time.perf_counter()
            played = released_episode(released, args, data, eval_steps, args.seed)
            theirs_evaluation = (time.perf_counter() - start) / played
            evaluated = model

    args.context_length = 20
    env.spec.max_episode_steps = eval_steps
    start = time.perf_counter()
    with dt.autocast(args):
        _, lengths = dt.evaluate(evaluated, env, data, args, list(range(args.num_eval_episodes)))
    ours_evaluation = (time.perf_counter() - start) / lengths.sum()
    rows.append(("evaluation, one environment step, K = 20", theirs_evaluation * 1e3, ours_evaluation * 1e3, "ms"))

    count, alone, passes = (360, 10, 20) if on_gpu else (12, 3, 5)
    alone_seconds, together_seconds = mine_seconds(args.device, count, alone, config.n_embd, passes)
    rows.append((f"MINE, one estimator of {count}, {passes} passes", alone_seconds * 1e3, together_seconds * 1e3, "ms"))

    print(f"\n{'median':<42}{'released way':>14}{'ours':>14}{'ratio':>9}")
    for name, theirs, ours, unit in rows:
        print(f"{name:<42}{theirs:>11.2f} {unit}{ours:>11.2f} {unit}{theirs / ours:>8.1f}×")
    print(f"{args.num_eval_episodes} episodes of 1,000 steps: {ours_evaluation * args.num_eval_episodes * 1000:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
