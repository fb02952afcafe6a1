"""Time training and evaluation of dt_pretrained.py beside other ways, in one process and in turn.

    python tests/tools/benchmark.py                             # two minutes on two cores
    python tests/tools/benchmark.py --size small                # GPT-2 small, wants a GPU
    python tests/tools/benchmark.py --other dt_pretrained.py    # another version of the script

The released way is written out below: transformers' GPT2Model in eager float32, windows cut in
Python with the return-to-go of the whole rest of the episode recomputed for each, left padding with
a mask, a loss read with .item() in every step, and one episode at a time in evaluation. The
estimators of mutual information of analyze_repr.py are timed one at a time, as the released code
trains them, and side by side.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import analyze_repr as ar

ROOT = Path(ar.__file__).parent


@dataclass
class Args:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """as in dt_pretrained.py"""
    size: Literal["sample", "small"] = "sample"
    """sample: 4 blocks, 128 wide, 20 episodes; small: GPT-2 small, 100 episodes"""
    steps: int | None = None
    """timed training steps of each way; if not given, 10 on a CPU and 50 on a GPU"""
    train_steps: int = 700
    """training steps of the trained model that is evaluated"""
    other: Path | None = None
    """another version of dt_pretrained.py with the same interface"""


# --------------------------------------------------------------------------------------------------
# The released way
# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
# Versions of the script
# --------------------------------------------------------------------------------------------------
def load_version(path, changes=()):
    """A version of dt_pretrained.py as a module, with other text at some places."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    module = ModuleType(f"{path}{changes}")
    module.__file__ = str(ROOT / "dt_pretrained.py")  # beside which the sample is
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def load_data(module, args):
    return module.OfflineData(module.load_episodes(args, module.make_env(args, 1)), args)


def start_training(module, args):
    """A model and a function that does one step of the loop in train."""
    data = load_data(module, args)
    model = module.make_model(args, module.load_backbone(args), data, 1000).train()
    trained_model = torch.compile(model, mode="reduce-overhead") if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, fused=True)

    def step():
        starts = torch.randint(len(data.states), (args.batch_size,), device=args.device)
        windows = data.windows(starts, args.context_length)
        with module.autocast(args):
            loss, _ = module.training_loss(trained_model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------
def median_seconds(ways, warmup, repeats):
    """{name: median time of a call}, the device's work included; all take turns."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in ways}
    for _ in range(warmup + repeats):
        for name, way in ways.items():
            synchronize()
            start = time.perf_counter()
            way()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[warmup:])) for name, values in times.items()}


def report(what, seconds):
    """Prints the time of each way, and how many times that of ours, the first, it is."""
    ours = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{what:<46}{name:<16}{value * 1e3:>10.1f} ms{value / ours:>8.2f}×")


def compare_training(versions, args, repeats):
    for K in (20, 1):
        args.context_length = K
        ways = {name: start_training(module, args)[1] for name, module in versions.items()}
        module = versions["ours"]
        episodes = module.load_episodes(args, module.make_env(args, 1))
        data = module.OfflineData(episodes, args)
        block, *others = module.load_backbone(args).configs
        shape = (data.states.shape[1], data.actions.shape[1])
        released = ReleasedModel(block, 1 + len(others), *shape).to(args.device)
        optimizer = torch.optim.AdamW(released.parameters(), 1e-4)
        mean, std = data.state_mean.cpu().numpy(), data.state_std.cpu().numpy()
        inputs = (released, optimizer, episodes, mean, std, args.batch_size, K, args.device)
        ways["released way"] = partial(released_step, *inputs, np.random.default_rng(0))
        report(f"training step, K = {K}", median_seconds(ways, 10 if args.compile else 3, repeats))
        if K == 20:
            released_seconds = median_seconds(
                {"released way": partial(released_episode, released.eval(), args, data, 100, 666)},
                0,
                1,
            )
    return released_seconds["released way"] / 100  # HalfCheetah's episodes do not end


def compare_evaluation(versions, args, train_steps):
    """Ours plays on with the running episodes only; what if it did with all until the last ends?"""
    all_episodes = [("np.flatnonzero(running)", "np.arange(num_episodes)")]
    versions = {**versions, "all episodes": load_version(ROOT / "dt_pretrained.py", all_episodes)}
    env = versions["ours"].make_env(args, args.num_eval_episodes)
    torch.manual_seed(0)
    model, step = start_training(versions["ours"], args)
    for kind in ("untrained", "trained"):
        ways = {
            name: partial(module.evaluate, model, env, args) for name, module in versions.items()
        }
        _, lengths = ways["ours"]()
        what = f"Hopper, {kind}, {lengths.min()} to {lengths.max()} steps"
        report(what, median_seconds(ways, 0, 3))
        if kind == "untrained":
            model.train()
            for _ in range(train_steps):
                step()


def compare_mine(device, count, alone, width, passes):
    """Estimators of I(state; T): `alone` of them one at a time, `count` side by side."""
    analysis = ar.Analysis(mine_passes=passes)
    x = torch.randn(1, 2 * analysis.mine_windows, 17, device=device)
    t = torch.randn(1, 2 * analysis.mine_windows, width, device=device)
    seconds = {}
    for name, group, repeats in (("side by side", count, 1), ("one at a time", 1, alone)):
        many_x, many_t = x.expand(group, -1, -1), t.expand(group, -1, -1)
        ar.mine(many_x, many_t, replace(analysis, mine_passes=1), seed=0)  # warm-up
        estimate = partial(ar.mine, many_x, many_t, analysis, seed=0)  # ends with NumPy arrays
        seconds[name] = median_seconds({name: estimate}, 0, repeats)[name] / group
    report(f"MINE, one estimator of {count}, {passes} passes", seconds)


def main(options):
    versions = {"ours": load_version(ROOT / "dt_pretrained.py")}
    if options.other:
        versions["other version"] = load_version(options.other)
    small = options.size == "small"
    on_gpu = options.device.startswith("cuda")
    args = versions["ours"].Args(
        backbone="random-gpt2",
        env="HalfCheetah-v5",
        dataset="sample/halfcheetah/medium-v0",
        sample=not small,
        device=options.device,
        target_return=6000.0,
        num_eval_episodes=100 if small else 20,
    )
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {args.precision}")
    repeats = options.steps or (50 if on_gpu else 10)
    released_seconds = compare_training(versions, args, repeats)

    args.context_length = 20
    env = versions["ours"].make_env(args, args.num_eval_episodes)
    env.spec.max_episode_steps = 100
    model, _ = start_training(versions["ours"], args)
    seconds = {}
    for name, module in versions.items():
        way = {name: partial(module.evaluate, model, env, args)}
        seconds[name] = median_seconds(way, 0, 1)[name] / (100 * args.num_eval_episodes)
    report("HalfCheetah, one step of one episode", {**seconds, "released way": released_seconds})

    # As --sample trains, but for the smaller models' batches.
    changes = {"head_std": 0.02, "dropout": 0.0, "learning_rate": 1e-3, "batch_size": 8}
    hopper = replace(args, env="Hopper-v5", dataset="sample/hopper/medium-v0", **changes)
    compare_evaluation(versions, replace(hopper, target_return=3600.0), options.train_steps)
    count, alone, passes = (60, 10, 20) if on_gpu else (12, 3, 5)
    compare_mine(args.device, count, alone, 768 if small else 128, passes)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
