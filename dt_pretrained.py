"""Fine-tune a Decision Transformer on MuJoCo offline data, from language, images or random weights.

    python dt_pretrained.py --sample                          # bundled inputs, two CPU cores
    python dt_pretrained.py --backbone gpt2 --env Hopper-v4   # fetches GPT-2 and data, wants a GPU
    torchrun --nproc-per-node 4 dt_pretrained.py ...          # several GPUs

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline
Reinforcement Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (section 4, Table 1).

A comment like [experiment.py#L321] points to a line of the paper's released code, under
https://github.com/t46/pre-training-different-modality-offline-rl/blob/200abbe/can-wikipedia-help-offline-rl

SPDX-License-Identifier: MIT
"""

import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import imageio.v3 as imageio
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
ASSETS = Path(__file__).resolve().parent / "tests" / "assets"
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, as is WORLD_SIZE
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# ==================================================================================================
# Arguments
# ==================================================================================================
@dataclass
class Args:
    # Starting point and data
    backbone: str = "gpt2"
    """gpt2, igpt, igpt-as-gpt2 (the paper's way of loading ImageGPT), random (the paper's control:
    one head, ReLU), random-gpt2 (GPT-2's architecture), markov (bundled), or a hub id or folder"""
    env: str = "Hopper-v4"
    """Hopper, HalfCheetah or Walker2d, -v4 or -v5; others need --dataset and --target-return"""
    dataset: str | None = None
    """Minari id or folder, or D4RL file; by default mujoco/{hopper,halfcheetah,...}/medium-v0"""
    sample: bool = False
    """bundled data and small backbones, and sizes for two CPU cores where none are given"""

    # Model
    context_length: int = 20
    """K, the number of time steps that the model sees"""
    dropout: float = 0.2
    """on the residual branches; on attention weights and the backbone's input it is at most 0.1"""
    head_std: float | None = None
    """standard deviation of the initial action embedding, which is the action head too; by default
    nn.Linear's, as in the paper, with which the tanh of the actions starts saturated (try 0.02)"""

    # Optimization
    batch_size: int = 64
    """windows per training step, of all processes together"""
    learning_rate: float = 1e-4
    """of AdamW, after the warm-up"""
    weight_decay: float = 1e-4
    """of AdamW, on all parameters"""
    warmup_steps: int = 5000
    """training steps over which the learning rate rises linearly"""
    max_grad_norm: float = 0.25
    """gradients longer than this are shortened to it; 0 switches clipping off (App. G.3)"""
    num_epochs: int = 40
    """epochs, each followed by an evaluation"""
    steps_per_epoch: int = 2500
    """training steps per epoch"""

    # Evaluation
    num_eval_episodes: int = 100
    """episodes per evaluation"""
    target_return: float | None = None
    """return to ask for; by default Hopper 3600, HalfCheetah 6000, Walker2d 5000"""

    # Run
    seed: int = 666
    """fixes initial weights, windows, dropout and evaluation episodes"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of matrix products, weights are always float32; auto is bf16 where that is fast"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the model"""
    save_epochs: tuple[int, ...] = (0, 1, 4)
    """epochs whose model is kept, 0 being before training; the last is always kept"""
    capture_video: bool = False
    """record an episode of the best and of the last model, as best.gif and last.gif"""
    run_name: str | None = None
    """folder under runs/; the same command with the same name goes on where the run stopped"""


# What --sample changes where nothing else is given; models that small need no dropout.
SAMPLE = Args(
    sample=True,
    dropout=0.0,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=700,
    num_epochs=2,
    steps_per_epoch=700,
    num_eval_episodes=8,
)
MAY_DIFFER = {"num_epochs", "save_epochs", "capture_video"}  # when a run is gone on with


# ==================================================================================================
# Model: blocks that can be GPT-2's or ImageGPT's, and the Decision Transformer around them
# ==================================================================================================
class QuickGELU(nn.Module):
    """The approximation of GELU that ImageGPT was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}
# ImageGPT's own LayerNorm subtracts no mean and has no bias, which makes it an RMSNorm.
LAYER_NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True)
class BlockConfig:
    """Architecture of one block; the blocks of a model may differ."""

    n_embd: int
    n_head: int
    n_inner: int
    activation: str
    layer_norm: str = "layernorm"
    epsilon: float = 1e-5  # of the LayerNorms
    dropout: float = 0.0


class Conv1D(nn.Module):
    """A linear layer that keeps its weight as [in, out], as GPT-2's checkpoints do."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # The reference has 0.1 here whatever --dropout is; without dropout there is none.
        # [decision_transformer/models/decision_transformer.py#L44]
        self.attention_dropout = min(0.1, config.dropout)
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def heads(self, x):
        """Queries, keys and values of all heads, each [batch, heads, tokens, width / heads]."""
        query, key, value = self.c_attn(x).chunk(3, dim=-1)  # one product for all three
        query = query.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        key = key.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        value = value.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        return query, key, value

    def forward(self, x):  # [batch, tokens, width]
        query, key, value = self.heads(x)
        dropout_p = self.attention_dropout if self.training else 0.0
        # Causal: a token looks at itself and at what came before it, never ahead.
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)
        x = x.transpose(1, 2).flatten(2)  # [batch, tokens, width], the heads side by side
        return self.resid_dropout(self.c_proj(x))


class MLP(nn.Module):
    """Two linear layers, token by token; the inner one is usually four times as wide."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm; modules are named as in the checkpoints."""

    def __init__(self, config):
        super().__init__()
        layer_norm = LAYER_NORMS[config.layer_norm]
        self.ln_1 = layer_norm(config.n_embd, eps=config.epsilon)
        self.attn = Attention(config)
        self.ln_2 = layer_norm(config.n_embd, eps=config.epsilon)
        self.mlp = MLP(config)

    def forward(self, x):
        # x itself runs through unchanged; each branch reads a normalized copy and adds to it.
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class DecisionTransformer(nn.Module):
    """Predict each step's action from the returns-to-go, states and actions up to it.

    After Chen et al. 2021 and Reid et al. 2022. The backbone's own word and position embeddings are
    not used: a learned embedding of the time step is all that a token knows about its position.
    """

    def __init__(self, blocks, final_norm, state_dim, act_dim, max_timestep):
        super().__init__()
        width = blocks[0].n_embd
        self.architecture = {  # what load_model needs to build this model again
            "blocks": [asdict(block) for block in blocks],
            "final_norm": final_norm,
            "state_dim": state_dim,
            "act_dim": act_dim,
            "max_timestep": max_timestep,
        }
        self.embed_timestep = nn.Embedding(max_timestep, width)
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(state_dim, width)
        self.embed_action = nn.Linear(act_dim, width)  # its weight is the action head too
        self.embed_ln = nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {
                "drop": nn.Dropout(min(0.1, blocks[0].dropout)),
                "h": nn.ModuleList([Block(config) for config in blocks]),
                "ln_f": LAYER_NORMS[final_norm](width, eps=blocks[0].epsilon),
            }
        )
        # The residual branches start small, the more so the more there are, as in GPT-2.
        # [decision_transformer/models/trajectory_gpt2.py#L525]
        for name, weight in self.transformer.h.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(blocks)))

    def embed(self, returns_to_go, states, actions, timesteps):
        """The tokens R_1 s_1 a_1 R_2 s_2 a_2 ... that enter the first block, [batch, 3K, width]."""
        # Not in bf16, where returns of 3.600 and 3.601 are the same number.
        with torch.autocast(states.device.type, enabled=False):
            return_tokens = self.embed_return(returns_to_go)
            state_tokens = self.embed_state(states)
            action_tokens = self.embed_action(actions)
        tokens = torch.stack([return_tokens, state_tokens, action_tokens], dim=2)
        # The three tokens of a step get the same embedding of its time, after the LayerNorm.
        # [decision_transformer/models/decision_transformer.py#L165]
        times = self.embed_timestep(timesteps)[:, :, None]  # [batch, K, 1, width]
        tokens = self.embed_ln(tokens) + times  # [batch, K, 3, width]
        tokens = tokens.flatten(1, 2)
        return self.transformer.drop(tokens)

    def forward(self, returns_to_go, states, actions, timesteps):
        """Predicted actions [batch, K, act_dim], from inputs shaped as in Windows.

        The K steps may be padded on the right and need no mask: attention is causal, so nothing
        looks at the padding. The released code pads on the left and masks. [experiment.py#L223]
        """
        x = self.embed(returns_to_go, states, actions, timesteps)  # [batch, 3K, width]
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        # The token of s_t predicts a_t: it has seen R_t and s_t, but not a_t itself.
        at_states = x[:, 1::3]  # [batch, K, width]
        # Not in bf16, where the tanh is flat beyond 3.6 and passes no gradient.
        with torch.autocast(states.device.type, enabled=False):
            # The action head is the embedding's matrix [width, act_dim] again, without a bias:
            # --share_input_output_proj of the released commands.
            # [decision_transformer/models/decision_transformer.py#L110]
            return torch.tanh(at_states.float() @ self.embed_action.weight)


# ==================================================================================================
# Backbones: where the Transformer starts
# ==================================================================================================
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "igpt": "openai/imagegpt-small",
    "igpt-as-gpt2": "openai/imagegpt-small",
}
BUNDLED = {  # what --sample takes instead, under tests/assets
    "gpt2": "text-gpt2",
    "igpt": "image-gpt",
    "igpt-as-gpt2": "image-gpt",
    "markov": "markov",
}


class Backbone(NamedTuple):
    blocks: list[BlockConfig]
    final_norm: str
    weights: dict[str, torch.Tensor]  # by their names under model.transformer; none if random
    pretrained: bool
    source: str


def load_backbone(args):
    """The Backbone that `args.backbone` names, downloaded if it is a hub id that is not cached."""
    if args.backbone in ("random", "random-gpt2"):
        return random_backbone(args)
    if args.sample and args.backbone in BUNDLED:
        source = str(ASSETS / BUNDLED[args.backbone])
    elif args.backbone == "markov":
        stop(
            "markov is bundled for --sample only: make a larger one with "
            "tests/tools/build_assets.py --what markov and give its folder."
        )
    else:
        source = HUB_IDS.get(args.backbone, args.backbone)

    config, weights = read_pretrained(source)
    # Everything about the architecture comes from the checkpoint, but for the dropout.
    layer_norm = "rmsnorm" if config.model_type == "imagegpt" else "layernorm"
    if args.backbone == "igpt-as-gpt2":
        # The released code puts ImageGPT's weights into GPT-2's blocks, whose LayerNorm subtracts
        # the mean and adds a bias, new and zero.
        # [decision_transformer/models/decision_transformer.py#L46]
        layer_norm = "layernorm"
    block = BlockConfig(
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_inner=config.n_inner or 4 * config.n_embd,
        activation=config.activation_function,
        layer_norm=layer_norm,
        epsilon=config.layer_norm_epsilon,
        dropout=args.dropout,
    )
    return Backbone(
        blocks=[block] * config.n_layer,
        final_norm=layer_norm,
        weights=weights,
        pretrained=True,
        source=source,
    )


def random_backbone(args):
    """A random Transformer of GPT-2 small's size, or of the bundled GPT-2's."""
    num_blocks = 4 if args.sample else 12
    num_heads = 4 if args.sample else 12
    width = 128 if args.sample else 768
    block = BlockConfig(
        n_embd=width,
        n_head=num_heads,
        n_inner=4 * width,
        activation="gelu_new",
        dropout=args.dropout,
    )
    if args.backbone == "random":
        # The paper's control is not GPT-2's architecture. [experiment.py#L469]
        block = replace(block, n_head=1, activation="relu")
    return Backbone(
        blocks=[block] * num_blocks,
        final_norm="layernorm",
        weights={},
        pretrained=False,
        source=f"seed {args.seed}",
    )


def read_pretrained(source):
    """Configuration and weights of a GPT-2 or ImageGPT in a folder, in the hub's cache, on the hub.

    Word and position embeddings are left out. transformers only reads the file: the model that is
    trained is the one above, which the tests hold against transformers' own.
    """
    # transformers would ask the hub to convert a checkpoint that is kept as .bin.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    import transformers  # here, because it takes seconds and random weights do not need it
    from huggingface_hub.constants import HF_HUB_CACHE

    transformers.logging.set_verbosity_error()
    model_classes = {"gpt2": transformers.GPT2Model, "imagegpt": transformers.ImageGPTModel}
    hint = (
        f"--backbone takes {', '.join(HUB_IDS)}, random, random-gpt2, or the hub id or folder of a "
        "GPT-2 or ImageGPT; or try --sample"
    )
    cache = Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    if cache.exists() and not Path(source).exists():
        hint = f"if a download was cut or damaged, delete {cache} and start again"
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        stop(f"The backbone {source} cannot be loaded ({first_line(error)}): {hint}.")
    if config.model_type not in model_classes:
        stop(f"The backbone {source} is a {config.model_type}: {hint}.")
    if config.activation_function not in ACTIVATIONS:
        stop(f"The activation {config.activation_function} of {source} is none of ACTIVATIONS.")
    if config.add_cross_attention:
        stop(f"The backbone {source} has cross-attention, which is not implemented here.")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        stop(f"The backbone {source} scales its attention in a way that is not implemented here.")
    if config.n_head < 1 or config.n_embd % config.n_head != 0:
        stop(f"The backbone {source} has n_head {config.n_head} for n_embd {config.n_embd}.")

    try:
        model, report = model_classes[config.model_type].from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            key_mapping={r"^(_orig_mod\.|module\.)+": ""},  # of torch.compile and DataParallel
        )
    except Exception as error:
        stop(f"The backbone {source} cannot be loaded ({first_line(error)}): {hint}.")
    bad_names = []
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for name in map(str, report[kind]):  # of a mismatch, the name and both shapes
            # Word embeddings and output heads are not used here, and may be anything.
            is_used = "h." in name or "ln_f." in name
            # Old checkpoints keep the causal mask of each block among their weights.
            is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
            if is_used and not is_mask:
                bad_names.append(name)
    if bad_names:
        stop(f"In the backbone {source} these are missing, misshapen or unknown: {bad_names[:3]}.")

    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(("wte.", "wpe.")):
            weights[name] = weight
            if not weight.isfinite().all():
                stop(f"The weight {name} of the backbone {source} has numbers that are not finite.")
    return config, weights


# ==================================================================================================
# Data: episodes from Minari or D4RL, and windows of K steps
# ==================================================================================================
class Task(NamedTuple):
    dataset: str
    target_return: float  # [experiment.py#L101]; the released code also asks for half of it
    random_return: float  # D4RL's reference returns, between which scores are normalized
    expert_return: float


TASKS = {
    "Hopper": Task("mujoco/hopper/medium-v0", 3600, -20.272305, 3234.3),
    "HalfCheetah": Task("mujoco/halfcheetah/medium-v0", 6000, -280.178953, 12135.0),
    "Walker2d": Task("mujoco/walker2d/medium-v0", 5000, 1.629008, 4592.3),
}
RETURN_SCALE = 1000  # returns-to-go are divided by this, so that the model sees a few units


class Episode(NamedTuple):
    observations: np.ndarray  # [T, state_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T]


class Windows(NamedTuple):
    """K consecutive steps each; what lies beyond the end of an episode is zero and not valid."""

    returns_to_go: torch.Tensor  # [batch, K, 1]
    states: torch.Tensor  # [batch, K, state_dim], normalized
    actions: torch.Tensor  # [batch, K, act_dim]
    timesteps: torch.Tensor  # [batch, K], counted from the beginning of the episode
    valid: torch.Tensor  # [batch, K], bool


def read_d4rl(path):
    """The episodes of a D4RL file. What follows the last end of an episode is left out.

    [data/download_d4rl_datasets.py#L41]
    """
    with h5py.File(path) as file:
        observations = file["observations"][()]  # all of it
        actions = file["actions"][()]
        rewards = file["rewards"][()]
        terminals = file["terminals"][()]  # the policy failed
        if "timeouts" in file:
            timeouts = file["timeouts"][()]  # the time was up
        else:  # as in D4RL's -v0 files
            print(f"{path} has no timeouts: an episode ends where terminals are set, only there.")
            timeouts = np.zeros_like(terminals)
    for name, column in (("terminals", terminals), ("timeouts", timeouts)):
        if column.ndim != 1 or column.dtype.kind not in "biuf":  # booleans or numbers
            stop(f"The {name} of {path} are not one yes or no a step.")
    if not len(observations) == len(actions) == len(rewards) == len(terminals) == len(timeouts):
        stop(f"The columns of {path} differ in length.")
    episodes = []
    start = 0
    for last_step in np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)):
        steps = slice(start, last_step + 1)
        episodes.append(Episode(observations[steps], actions[steps], rewards[steps]))
        start = last_step + 1
    return episodes


def find_minari(dataset):
    """The folder of a Minari data set: bundled, given as a path, or where Minari keeps it."""
    for folder in (ASSETS / "minari" / dataset, Path(dataset)):
        if folder.is_dir():
            return folder
    folder = minari.storage.get_dataset_path(dataset)
    if not folder.exists():
        minari.download_dataset(dataset)
    return folder


def read_minari(folder, env_id):
    """The episodes of a Minari data set of the environment `env_id`, in any version."""
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    # Without these Minari would make the environment that the file names: it would run code.
    if not metadata.get("observation_space") or not metadata.get("action_space"):
        stop(f"{folder} does not say what its observations and actions are, and is not opened.")
    recorded_in = json.loads(metadata.get("env_spec") or "{}").get("id", env_id)
    if recorded_in.rsplit("-v", 1)[0] != env_id.rsplit("-v", 1)[0]:
        stop(f"{folder} was recorded in {recorded_in}, not in {env_id}.")
    episodes = []
    for episode in minari.MinariDataset(folder / "data").iterate_episodes():
        # Minari also keeps the observation after the last action.
        observations = episode.observations[: len(episode.actions)]
        episodes.append(Episode(observations, episode.actions, episode.rewards))
    return episodes


def load_episodes(args, env):
    """The episodes of `args.dataset`, checked against the environment that they are meant for.

    All are kept. The released code drops the one of lowest return by a `<`. [experiment.py#L172]
    """
    advice = (
        "it takes a D4RL file, or a folder or id of Minari, which is looked for under "
        "MINARI_DATASETS_PATH and on its server; or try --sample"
    )
    try:
        if Path(args.dataset).is_file():
            episodes = read_d4rl(args.dataset)
        else:
            folder = find_minari(args.dataset)
            advice = f"if a download was cut, delete {folder} and start again"
            episodes = read_minari(folder, args.env)
    except Exception as error:
        stop(f"--dataset {args.dataset} cannot be read ({first_line(error)}): {advice}.")
    check_episodes(episodes, args, env)
    return episodes


def check_episodes(episodes, args, env):
    """Stop with a sentence if training on these episodes would fail, or would make no sense."""
    name = f"--dataset {args.dataset}"
    if not episodes:
        stop(f"{name} has no episode.")
    state_shape = env.single_observation_space.shape
    action_shape = env.single_action_space.shape
    for episode in episodes:
        length = len(episode.rewards)
        if length == 0:
            stop(f"{name} has an episode without a step.")
        if len(episode.observations) != length or len(episode.actions) != length:
            stop(f"{name} has an episode whose columns differ in length.")
        if episode.observations.shape[1:] != state_shape:
            found = episode.observations.shape[1:]
            stop(f"{name} has observations of shape {found}, {args.env} has {state_shape}.")
        if episode.actions.shape[1:] != action_shape:
            stop(f"{name} has actions of shape {episode.actions.shape[1:]}, not {action_shape}.")
        if episode.rewards.ndim != 1:
            stop(f"{name} has rewards of shape {episode.rewards.shape[1:]}, not one number a step.")
        for column in episode:
            if column.dtype.kind not in "fiu":
                stop(f"{name} holds {column.dtype} where numbers are expected.")
            if not np.isfinite(column).all():
                stop(f"{name} has numbers that are not finite.")
        if np.abs(episode.actions).max() > 1.001:
            stop(f"{name} has actions beyond -1 to 1, which the model cannot predict.")
        if np.abs(episode.rewards.astype(np.float64)).sum() > 1e30:
            stop(f"{name} has returns beyond 1e30.")
    longest = max(len(episode.rewards) for episode in episodes)
    if args.context_length > longest:
        stop(f"--context-length {args.context_length} is beyond the longest episode, {longest}.")


class OfflineData:
    """The N transitions of all episodes, one after the other, as tensors on the device."""

    def __init__(self, episodes, device):
        lengths = [len(episode.rewards) for episode in episodes]
        observations = np.concatenate([episode.observations for episode in episodes])
        actions = np.concatenate([episode.actions for episode in episodes])
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64) + 1e-6  # [experiment.py#L151]
        # What is constant in the data need not be so in the environment: divided by 1e-6, as the
        # released code does, it would be huge. Hopper, HalfCheetah and Walker2d have no such state.
        std[std < 2e-6] = 1
        # The return-to-go of a step is the undiscounted sum of its reward and of all later ones.
        rewards = [episode.rewards.astype(np.float64) for episode in episodes]
        returns_to_go = np.concatenate([column[::-1].cumsum()[::-1] for column in rewards])
        timesteps = np.concatenate([np.arange(length) for length in lengths])
        # Of each transition, the index behind the last one of its episode.
        episode_ends = np.repeat(np.cumsum(lengths), lengths)

        def float_tensor(values):
            return torch.as_tensor(np.float32(values), device=device)

        self.state_mean = float_tensor(mean)  # [state_dim]
        self.state_std = float_tensor(std)  # [state_dim]
        self.states = float_tensor((observations - mean) / std)  # [N, state_dim]
        self.actions = float_tensor(actions)  # [N, act_dim]
        self.returns_to_go = float_tensor(returns_to_go[:, None] / RETURN_SCALE)  # [N, 1]
        self.timesteps = torch.as_tensor(timesteps, device=device)  # [N]
        self.episode_ends = torch.as_tensor(episode_ends, device=device)  # [N]

    def windows(self, starts, context_length):
        """The Windows of K steps from the transitions `starts` [batch] on, by an index lookup.

        The released code cuts one after the other and sums its return-to-go up anew.
        [experiment.py#L199]
        """
        index = starts[:, None] + torch.arange(context_length, device=starts.device)  # [batch, K]
        valid = index < self.episode_ends[starts][:, None]
        index = torch.where(valid, index, 0)  # any transition will do, it is multiplied by 0
        return Windows(
            returns_to_go=self.returns_to_go[index] * valid[..., None],
            states=self.states[index] * valid[..., None],
            actions=self.actions[index] * valid[..., None],
            timesteps=self.timesteps[index] * valid,
            valid=valid,
        )


# ==================================================================================================
# Evaluation
# ==================================================================================================
# The paper used -v3, which gymnasium no longer has; -v4 is its successor. [experiment.py#L99]
warnings.filterwarnings("ignore", message=".*is out of date.*")


def make_env(args, num_copies, **options):
    """A gymnasium vector environment of `num_copies` copies of `args.env`."""
    try:
        # In one process: a step of MuJoCo takes less time than to pass it to another.
        env = gym.make_vec(args.env, num_copies, vectorization_mode="sync", **options)
    except Exception as error:
        stop(f"The environment {args.env} cannot be made ({first_line(error)}).")
    space = env.single_action_space
    is_unit_box = isinstance(space, gym.spaces.Box) and (np.abs([space.low, space.high]) == 1).all()
    if not is_unit_box:
        stop(f"{args.env} has actions {space}; the model's are continuous, from -1 to 1.")
    return env


def autocast(args, device):
    """Matrix products in bf16 if `args.precision` says so; all else stays in float32."""
    if args.precision == "auto" and device.type == "cuda":
        use_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif args.precision == "auto":  # without these instructions bf16 is slower than float32
        use_bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    else:
        use_bf16 = args.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


@torch.no_grad()
def evaluate(model, env, state_mean, state_std, args):
    """Play one episode in each copy of `env`, all at once, seeded args.seed, args.seed + 1, ...

    Returns the undiscounted returns and the lengths of the episodes, both [episodes]. The model is
    asked for `args.target_return`, which then falls by each reward, and sees the last K steps.
    The released code plays one episode at a time, and others in each evaluation.
    [decision_transformer/evaluation/evaluate_episodes.py#L112]
    """
    model.eval()
    device = state_mean.device
    num_episodes = env.num_envs
    horizon = env.spec.max_episode_steps or 1000
    state_dim = env.single_observation_space.shape[0]
    act_dim = env.single_action_space.shape[0]

    # What the model has seen and done, filled in step by step.
    returns_to_go = torch.zeros(num_episodes, horizon + 1, 1, device=device)
    states = torch.zeros(num_episodes, horizon, state_dim, device=device)
    actions = torch.zeros(num_episodes, horizon, act_dim, device=device)  # a_t is 0 until predicted
    # Where an episode outlasts the embedded time steps, the last is repeated.
    timesteps = torch.arange(horizon, device=device)
    timesteps = timesteps.clamp(max=model.embed_timestep.num_embeddings - 1)
    timesteps = timesteps.expand(num_episodes, -1)
    episode_returns = np.zeros(num_episodes)
    episode_lengths = np.zeros(num_episodes, dtype=int)
    running = np.ones(num_episodes, dtype=bool)

    observations, _ = env.reset(seed=args.seed)
    returns_to_go[:, 0] = args.target_return / RETURN_SCALE
    for t in tqdm(range(horizon), desc="evaluation", unit="step", leave=False):
        observations = torch.as_tensor(observations, dtype=torch.float32, device=device)
        states[:, t] = (observations - state_mean) / state_std
        rows = torch.as_tensor(np.flatnonzero(running), device=device)  # episodes not yet over
        context = slice(max(0, t - args.context_length + 1), t + 1)
        with autocast(args, device):
            predicted = model(
                returns_to_go[rows, context],
                states[rows, context],
                actions[rows, context],
                timesteps[rows, context],
            )
        actions[rows, t] = predicted[:, -1].float()

        # Copies that are done go on until all are; what they do from then on is not counted.
        observations, rewards, terminated, truncated, _ = env.step(actions[:, t].cpu().numpy())
        episode_returns += rewards * running
        episode_lengths += running
        # What has been received need not be asked for again.
        scaled_rewards = torch.as_tensor(np.float32(rewards / RETURN_SCALE), device=device)
        returns_to_go[:, t + 1, 0] = returns_to_go[:, t, 0] - scaled_rewards
        running &= ~(terminated | truncated)
        if not running.any():
            break
    return episode_returns, episode_lengths


def normalized_score(env_id, episode_return):
    """D4RL's score: 0 for a random policy, 100 for an expert; nan where these are not known.

    The paper normalizes by the mean returns of D4RL's random and expert data sets instead, so that
    its scores are on another scale.
    [analysis/section-4-sanity-check/compute_normalized_score.py#L48]
    """
    task = TASKS.get(env_id.rsplit("-v", 1)[0])
    if task is None:
        return math.nan
    return 100 * (episode_return - task.random_return) / (task.expert_return - task.random_return)


def summarize_episodes(returns, lengths, args, rng):
    """What is recorded of an evaluation: mean return with its 95 % interval, length and score.

    The interval is a bootstrap over the episodes of this evaluation; the next epoch's mean may lie
    far outside of it.
    """
    resampled = rng.choice(returns, size=(10_000, len(returns)))
    low, high = np.percentile(resampled.mean(axis=1), [2.5, 97.5])
    return {
        "return_mean": returns.mean().item(),
        "return_low": low.item(),
        "return_high": high.item(),
        "length_mean": lengths.mean().item(),
        "normalized_score": normalized_score(args.env, returns.mean().item()),
    }


# ==================================================================================================
# Training
# ==================================================================================================
METRICS = ("loss", "saturated_fraction", "grad_norm", "clipped_fraction")  # of each training step


class Run(NamedTuple):
    """A training run, as it ended or as it was read from its folder."""

    folder: Path
    args: dict
    records: list[dict]  # one per epoch, the first being before training
    history: list[dict]  # means of METRICS, 25 times per epoch


def training_loss(model, windows):
    """Mean squared error of the actions, and the share of them beyond ±0.99, where tanh is flat.

    Both are means over the valid steps and the action dimensions.
    """
    predicted = model(windows.returns_to_go, windows.states, windows.actions, windows.timesteps)
    valid = windows.valid[..., None].expand_as(predicted)  # [batch, K, act_dim]
    squared_error = (predicted - windows.actions).square()
    loss = (squared_error * valid).sum() / valid.sum()
    is_saturated = predicted.detach().abs() > 0.99
    saturated_fraction = (is_saturated & valid).sum() / valid.sum()
    return loss, saturated_fraction


def find_device(args):
    """The device that `args.device` names; under torchrun each process gets a GPU of its own."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if args.device not in ("auto", *available):
        stop(f"--device {args.device} is not there; there is {', '.join(available)}.")
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        # The first process evaluates while the others wait.
        torch.distributed.init_process_group(timeout=timedelta(hours=12))
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_model(args, backbone, state_dim, act_dim, max_timestep):
    """The Decision Transformer before fine-tuning: `backbone`, and the rest drawn from the seed."""
    torch.manual_seed(args.seed)
    model = DecisionTransformer(
        backbone.blocks, backbone.final_norm, state_dim, act_dim, max_timestep
    )
    # What the checkpoint has, it overwrites: nothing if random, one block if one is replaced.
    weights = model.transformer.state_dict()
    weights.update(backbone.weights)
    model.transformer.load_state_dict(weights)
    if args.head_std is not None:
        # nn.Linear draws this weight for act_dim inputs, not for the `width` inputs that it has as
        # the action head: the final LayerNorm gives 768 numbers of variance 1, the tanh sees a
        # standard deviation of 9 on Hopper, and nearly no gradient passes.
        nn.init.normal_(model.embed_action.weight, std=args.head_std)
    return model


def train(args, folder, backbone, device):
    """Fine-tune `backbone` as `args` say, or go on where the run in `folder` stopped.

    Leaves checkpoints, TensorBoard events and summary.json in `folder`, and returns the Run.
    """
    # A run that is finished is not trained again.
    check_folder(folder, args)
    if (folder / "summary.json").exists():
        run = read_run(folder)
        if len(run.records) > args.num_epochs:
            print(f"{folder} is finished; a higher --num-epochs would go on with it.")
            return run

    # Environment, data, model, optimizer.
    env = make_env(args, args.num_eval_episodes)
    data = OfflineData(load_episodes(args, env), device)
    longest_episode = int(data.timesteps.max()) + 1
    model = make_model(
        args,
        backbone,
        state_dim=data.states.shape[1],
        act_dim=data.actions.shape[1],
        max_timestep=max(1000, longest_episode, env.spec.max_episode_steps or 0),
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        eps=1e-6 if backbone.pretrained else 1e-8,  # [utils.py#L60]
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda steps_done: min((steps_done + 1) / max(1, args.warmup_steps), 1)
    )  # [experiment.py#L400]
    max_grad_norm = args.max_grad_norm or math.inf  # 0 switches clipping off

    # Go on where the run stopped.
    step = 0
    records = []
    history = []
    if (folder / "latest.pt").exists():
        checkpoint = read_checkpoint(folder / "latest.pt", device)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        step = checkpoint["step"]
        records = checkpoint["records"]
        history = checkpoint["history"]

    # `trained_model` has the parameters of `model`, compiled for a GPU, or shared by processes.
    trained_model = model
    if args.compile:
        trained_model = torch.compile(trained_model, mode="reduce-overhead")  # CUDA graphs
    if WORLD_SIZE > 1:
        # Each process trains on windows of its own, and their gradients are averaged. This mean of
        # means gives a padded window slightly more weight than one mean over all steps would.
        trained_model = nn.parallel.DistributedDataParallel(trained_model)

    if RANK == 0:
        make_folder(folder)
        save_json(folder / "args.json", asdict(args))
        print(f"\n{folder}: weights from {backbone.source}, {len(data.states):,} steps of data")
        if records:
            print(f"{folder} goes on after epoch {len(records) - 1}.")
            save_summary(folder, args, backbone, records, history)
        writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=10)
        writer.add_text("hyperparameters", hyperparameter_table(args))

    for epoch in range(len(records), args.num_epochs + 1):  # epoch 0 is the model before training
        epoch_started = time.perf_counter()
        num_steps = args.steps_per_epoch if epoch > 0 else 0
        # All chance in an epoch follows from the seed and the epoch's number alone, so that a run
        # that was interrupted gives the numbers of one that was not.
        rng = np.random.default_rng([args.seed, epoch, RANK])
        torch.manual_seed(int(rng.integers(2**60)))  # for dropout
        # Starts are drawn from all transitions, which is what the released code does in two steps:
        # an episode in proportion to its length, then a start in it. [experiment.py#L191]
        size = (num_steps, args.batch_size // WORLD_SIZE)
        epoch_starts = torch.as_tensor(rng.integers(len(data.states), size=size), device=device)
        metrics = torch.zeros(num_steps, len(METRICS), device=device)
        log_interval = max(1, args.steps_per_epoch // 25)
        num_logged = 0

        model.train()
        progress = tqdm(
            epoch_starts,
            desc=f"epoch {epoch}/{args.num_epochs}",
            unit="step",
            disable=RANK > 0 or epoch == 0,
        )
        for i, window_starts in enumerate(progress):
            windows = data.windows(window_starts, args.context_length)
            with autocast(args, device):
                loss, saturated_fraction = training_loss(trained_model, windows)
            loss.backward()
            # Here the gradient is clipped. Taken as one vector over all parameters, it is shortened
            # to max_grad_norm if it is longer; its direction stays. The norm returned is the one
            # before that. [decision_transformer/training/seq_trainer.py#L84]
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1

            # Metrics stay on the device; to read them here would wait for it in every step.
            clipped = (grad_norm > max_grad_norm).float()
            metrics[i] = torch.stack([loss.detach(), saturated_fraction, grad_norm, clipped])
            if RANK == 0 and ((i + 1) % log_interval == 0 or i + 1 == num_steps):
                means = metrics[num_logged : i + 1].mean(dim=0).tolist()
                num_logged = i + 1
                if not np.isfinite(means).all():
                    stop(f"The loss is not finite at step {step}; try a lower --learning-rate.")
                latest = {name: f"{value:.4f}" for name, value in zip(METRICS, means)}
                progress.set_postfix(latest, refresh=False)
                history.append({"step": step, **dict(zip(METRICS, means))})
                for name, value in zip(METRICS, means):
                    writer.add_scalar(f"train/{name}", value, step)
        if RANK > 0:
            continue  # the first process evaluates and writes

        returns, lengths = evaluate(model, env, data.state_mean, data.state_std, args)
        record = {
            "epoch": epoch,
            "step": step,
            # Means over the epoch, nan before training. The paper's "action error" is the loss of
            # an epoch's last batch alone. [decision_transformer/training/seq_trainer.py#L88]
            **dict(zip(METRICS, metrics.mean(dim=0).tolist())),
            **summarize_episodes(returns, lengths, args, rng),
            "seconds": time.perf_counter() - epoch_started,
        }
        records.append(record)
        for name in ("return_mean", "length_mean", "normalized_score"):
            writer.add_scalar(f"eval/{name}", record[name], step)
        tqdm.write(
            f"epoch {epoch}: return {record['return_mean']:.1f}, "
            f"95 % interval {record['return_low']:.1f} to {record['return_high']:.1f}"
        )

        # Save what can be looked at later, and what is needed to go on.
        checkpoint = {
            "args": asdict(args),
            "epoch": epoch,
            "step": step,
            "architecture": model.architecture,
            "model": model.state_dict(),
            "state_mean": data.state_mean,
            "state_std": data.state_std,
        }
        if epoch in args.save_epochs or epoch == args.num_epochs:
            save_checkpoint(folder / f"epoch_{epoch}.pt", checkpoint)
        # The best of 40 noisy evaluations flatters, but it is what the paper reports.
        if epoch > 0 and record["return_mean"] >= max(r["return_mean"] for r in records[1:]):
            save_checkpoint(folder / "best.pt", checkpoint)
        checkpoint["optimizer"] = optimizer.state_dict()
        checkpoint["scheduler"] = scheduler.state_dict()
        checkpoint["records"] = records
        checkpoint["history"] = history
        save_checkpoint(folder / "latest.pt", checkpoint)
        save_summary(folder, args, backbone, records, history)  # last: it says what is finished
    if RANK == 0:
        writer.close()
    return Run(folder, asdict(args), records, history)


# ==================================================================================================
# Figure and video
# ==================================================================================================
def plot_learning_curve(run):
    """Return, loss, saturation and gradient norm over the training steps of a Run."""
    args = run.args
    color = COLORS.get(args["backbone"], OTHER_COLOR)
    subject = f"{args['backbone']}, K = {args['context_length']}, seed {args['seed']}"
    figure = new_figure(args, subject, 16, 3.6)
    panels = {
        "return_mean": f"return of {args['num_eval_episodes']} episodes, 95 % interval",
        "loss": "mean squared action error",
        "saturated_fraction": "share of |action| > 0.99",
        "grad_norm": "gradient norm, dashed: clipping threshold",
    }
    for axes, (name, label) in zip(figure.subplots(1, 4), panels.items()):
        lines = run.records if name == "return_mean" else run.history
        steps = [line["step"] for line in lines]
        axes.plot(steps, [line[name] for line in lines], color=color)
        if name == "return_mean":
            low = [record["return_low"] for record in run.records]
            high = [record["return_high"] for record in run.records]
            axes.fill_between(steps, low, high, color=color, alpha=0.2)
        if name == "grad_norm" and args["max_grad_norm"] > 0:
            axes.axhline(args["max_grad_norm"], color="black", linestyle="--")
        axes.set(xlabel="training step", ylabel=label, ylim=(0, None))
    return figure


def capture_video(checkpoint_path, gif_path, args, device):
    """Play the first evaluation episode with the model of a checkpoint and keep it as a GIF."""
    has_screen = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if sys.platform == "linux" and not has_screen:
        os.environ.setdefault("MUJOCO_GL", "egl")
    checkpoint = read_checkpoint(checkpoint_path, device)
    model = load_model(checkpoint_path, device)
    env = make_env(args, 1, render_mode="rgb_array_list", width=240, height=240)
    try:
        env.reset()  # draws the first picture
    except Exception as error:
        stop(
            "--capture-video needs EGL (Debian: libegl1), or MUJOCO_GL set to a renderer that is "
            f"there ({first_line(error)})."
        )
    evaluate(model, env, checkpoint["state_mean"], checkpoint["state_std"], args)
    stride = max(1, round(env.metadata["render_fps"] / 25))  # 25 pictures a second are enough
    frames = env.render()[0][::stride]
    milliseconds = 1000 * stride / env.metadata["render_fps"]
    with replacing(gif_path) as temporary:
        imageio.imwrite(temporary, frames, extension=".gif", duration=milliseconds, loop=0)


# ==================================================================================================
# Utilities: arguments, files, tables, errors
# ==================================================================================================
COLORS = {  # colour-blind safe, after Okabe and Ito
    "gpt2": "#0072B2",
    "igpt": "#D55E00",
    "igpt-as-gpt2": "#E69F00",
    "random": "#555555",
    "random-gpt2": "#009E73",
    "markov": "#56B4E9",
}
OTHER_COLOR = "#CC79A7"


def stop(message, status=2):
    """End the program with one sentence about something that the user can put right."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)  # on a line of its own, also beside a progress bar
    elif status == 2:
        time.sleep(30)  # torchrun ends all processes with the first that ends: let rank 0 speak
    raise SystemExit(status)


def first_line(error):
    """An exception in a few words, to be put into a sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(" .:")


def complete_arguments(args):
    """Check the arguments, and fill in what was not given and depends on others."""
    counts = ("context_length", "batch_size", "num_epochs", "steps_per_epoch", "num_eval_episodes")
    for name in counts:
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} must be at least 1.")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            stop(f"--{name.replace('_', '-')} must be 0 or more.")
    if args.head_std is not None and not 0 < args.head_std < math.inf:
        stop("--head-std must be above 0.")
    if not 0 <= args.dropout < 1:
        stop("--dropout must be at least 0, and below 1.")
    if not 0 <= args.seed < 2**63:
        stop("--seed must be from 0 to 2^63 - 1.")
    if args.batch_size % WORLD_SIZE != 0:
        stop(f"--batch-size {args.batch_size} cannot be shared evenly by {WORLD_SIZE} processes.")
    env_name = args.env.rsplit("-v", 1)[0]
    task = TASKS.get(env_name)
    if task is None and (args.dataset is None or args.target_return is None):
        stop(f"{args.env} is none of {', '.join(TASKS)}: give --dataset and --target-return.")
    if args.dataset is None:
        args.dataset = task.dataset
        if args.sample:
            args.dataset = f"sample/{env_name.lower()}/medium-v0"
    if args.target_return is None:
        args.target_return = task.target_return
    if args.run_name is None:
        backbone_name = Path(args.backbone or "study").name  # a study has several
        name = f"{args.env}__{SCRIPT}__{backbone_name}__{args.seed}__{int(time.time())}"
        args.run_name = re.sub(r"[^\w.-]+", "-", name)  # an environment may have a / or a :
    if not re.fullmatch(r"\w[\w. -]*", args.run_name):
        stop(f"--run-name {args.run_name} must be the name of a folder under runs/, not a path.")


def check_folder(folder, args):
    """If there is a run in `folder` already, `args` must be what it was started with."""
    path = folder / "args.json"
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    given = json.loads(json.dumps(asdict(args)))  # JSON makes lists of tuples
    for name, value in given.items():
        if name not in MAY_DIFFER and value != earlier.get(name):
            stop(
                f"{folder} was started with {name} = {earlier.get(name)}, not {value}: "
                "choose another --run-name, or the arguments that it was started with."
            )


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"The folder {folder} cannot be made ({first_line(error)}).")


@contextmanager
def replacing(path):
    """A temporary path to write to, which then replaces `path`: what is there is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's way to say it
        temporary.unlink(missing_ok=True)
        stop(
            f"{path} cannot be written ({first_line(error)}): make room in {path.parent}, and the "
            "same command with the same --run-name goes on."
        )


def save_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def save_summary(folder, args, backbone, records, history):
    """Everything about a run in numbers, which read_run reads again."""
    summary = {
        "args": asdict(args),
        "source": backbone.source,
        "epochs": records,
        "history": history,
    }
    save_json(folder / "summary.json", summary)


def save_checkpoint(path, checkpoint):
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_model(path, device):
    """The model of a checkpoint that any of the scripts has written, in evaluation mode."""
    checkpoint = read_checkpoint(path, device)
    architecture = dict(checkpoint["architecture"])
    blocks = [BlockConfig(**config) for config in architecture.pop("blocks")]
    model = DecisionTransformer(blocks, **architecture).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def read_checkpoint(path, device):
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        stop(f"{path} is missing or damaged ({first_line(error)}).")
    if not isinstance(checkpoint, dict) or "architecture" not in checkpoint:
        stop(f"{path} is no checkpoint of these scripts.")
    return checkpoint


def save_figure(figure, path, step):
    """Write a matplotlib figure as a PNG and as a TensorBoard image."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    with SummaryWriter(path.parent) as writer:
        writer.add_figure(path.stem, figure, step)


def new_figure(args, subject, width, height):
    """An empty figure, width x height in inches, titled with what it shows of which environment."""
    sample = ", bundled sample" if args["sample"] else ""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{args['env']}: {subject}{sample}")
    return figure


def read_run(folder):
    """The Run in a folder of any of the scripts."""
    path = Path(folder) / "summary.json"
    if not path.exists():
        stop(f"{folder} is no folder of a run: it has no summary.json.")
    summary = json.loads(path.read_text())
    return Run(Path(folder), summary["args"], summary["epochs"], summary["history"])


def print_table(rows, formats):
    """Print dicts as a table; `formats` are its columns and how their numbers are written."""
    table = [list(formats)]
    for row in rows:
        cells = []
        for name, form in formats.items():
            is_nan = isinstance(row[name], float) and math.isnan(row[name])
            cells.append("-" if is_nan else format(row[name], form))
        table.append(cells)
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def hyperparameter_table(args):
    """The arguments as a table in markdown, for TensorBoard."""
    rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
    return "\n".join(["|argument|value|", "|-|-|", *rows])


# HalfCheetah's model file sets off a deprecation warning for every copy; all else should be seen.
def warn_of_mujoco(text):
    if "deprecated" not in text:
        print(f"mujoco: {text}", file=sys.stderr)


mujoco.set_mju_user_warning(warn_of_mujoco)


# ==================================================================================================
# Experiment
# ==================================================================================================
if __name__ == "__main__":
    defaults = SAMPLE if "--sample" in sys.argv else Args()
    args = tyro.cli(Args, default=defaults, description=__doc__)
    complete_arguments(args)
    folder = Path("runs") / args.run_name
    device = find_device(args)
    backbone = load_backbone(args)
    try:
        run = train(args, folder, backbone, device)
    except KeyboardInterrupt:
        stop(f"Interrupted; the same command with --run-name {args.run_name} goes on.", status=130)
    if RANK > 0:
        sys.exit()

    figure = plot_learning_curve(run)
    save_figure(figure, folder / "learning_curve.png", step=run.records[-1]["step"])
    if args.capture_video:
        capture_video(folder / "best.pt", folder / "best.gif", args, device)
        capture_video(folder / f"epoch_{args.num_epochs}.pt", folder / "last.gif", args, device)
    print_table(
        run.records,
        {
            "epoch": "d",
            "loss": ".4f",
            "grad_norm": ".3f",
            "clipped_fraction": ".0%",
            "saturated_fraction": ".0%",
            "return_mean": ".1f",
            "return_low": ".1f",
            "return_high": ".1f",
            "length_mean": ".1f",
            "normalized_score": ".1f",
        },
    )
    print(f"{folder}: summary.json, learning_curve.png, checkpoints; or: tensorboard --logdir runs")
