"""Open up the representations: what does fine-tuning leave of them, and what do they know?

    python analyze_repr.py --sample                                    # two CPU cores
    python analyze_repr.py --backbones random gpt2 igpt-as-gpt2        # 40 epochs each, then looks
    python analyze_repr.py --runs runs/ONE runs/ANOTHER --epochs 0 40  # finished runs
    python analyze_repr.py --runs runs/ONE --mine-paper-settings       # MINE as the paper ran it

Paper: S. Takagi, "On the Effect of Pre-training for Transformer in Different Modality on Offline
Reinforcement Learning", NeurIPS 2022, https://arxiv.org/abs/2211.09817 (5.1, 5.2, App. D, E, H.2).

A comment like [experiment.py#L321] points to a line of the paper's released code, under
https://github.com/t46/pre-training-different-modality-offline-rl/blob/200abbe/can-wikipedia-help-offline-rl

SPDX-License-Identifier: MIT
"""

import itertools
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
    # What this script looks at
    backbones: tuple[str, ...] = ("random", "gpt2", "igpt")
    """starting points to compare, each as --backbone of dt_pretrained.py takes it"""
    runs: tuple[str, ...] = ()
    """finished runs of any script to analyze instead of training"""
    epochs: tuple[int, ...] = ()
    """the two epochs to compare, before and after fine-tuning; by default 0 and the last"""
    cka_windows: int = 100
    """windows on which activations are compared; 0 leaves CKA out"""
    cka_threshold: float = 0.23
    """layers with a CKA above this are counted; the paper has 0.23, and 0.38 in App. D.3"""
    mine_windows: int = 5000
    """windows to train MINE on, and as many held-out ones to read it off; 0 leaves it out"""
    mine_batch_size: int = 500
    """windows per training step of MINE"""
    mine_passes: int = 20
    """passes over the training windows"""
    mine_steps: int | None = None
    """time steps of a window at which information is estimated, evenly spaced; by default all K"""
    mine_paper_settings: bool = False
    """100 windows, batches of 50, 1,000 passes, read off the training windows: see README"""

    backbone: tyro.conf.Suppress[str] = ""  # of one run, which the script sets
    # Starting point and data
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
    save_epochs: tuple[int, ...] = (0,)
    """epochs whose model is kept, 0 being before training; the last is always kept"""
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
    cka_threshold=0.8,
    mine_windows=1000,
    mine_batch_size=100,
    mine_steps=2,
)
# What may differ from before when a run is gone on with.
MAY_DIFFER = {
    "num_epochs",
    "save_epochs",
    "backbones",
    "runs",
    "epochs",
    "cka_windows",
    "cka_threshold",
    "mine_windows",
    "mine_batch_size",
    "mine_passes",
    "mine_steps",
    "mine_paper_settings",
}


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
# Study: one training run for each backbone
# ==================================================================================================
def train_study(args, folder, device):
    """Fine-tune each backbone; returns the Runs."""
    backbones = {}
    for name in args.backbones:  # all before any training: a wrong name should cost nothing
        backbones[name] = load_backbone(replace(args, backbone=name))
    runs = []
    for name, backbone in backbones.items():
        run_args = replace(args, backbone=name)
        runs.append(train(run_args, folder / Path(name).name, backbone, device))
    return runs


# ==================================================================================================
# Windows that all models are shown
# ==================================================================================================
def choose_windows(data, context_length, args):
    """Whole windows at random: those for CKA, and those for MINE, training ones before held-out.

    Held-out windows come from other episodes than those that MINE is trained on: windows of one
    episode overlap.
    """
    starts = torch.arange(len(data.states))
    ends = data.episode_ends.cpu()
    is_whole = starts + context_length <= ends
    _, episode = torch.unique(ends, return_inverse=True)  # number of each transition's episode
    is_held_out = episode % 2 == 1
    rng = np.random.default_rng(args.seed)

    def draw(allowed, count):
        if allowed.sum() < count:
            stop(
                f"There are {allowed.sum()} whole windows, not {count}: lower --mine-windows or "
                "--cka-windows."
            )
        return torch.as_tensor(rng.choice(starts[allowed], count, replace=False))

    for_cka = draw(is_whole, args.cka_windows)
    for_training = draw(is_whole & ~is_held_out, args.mine_windows)
    held_out = draw(is_whole & is_held_out, args.mine_windows)
    for_mine = torch.cat([for_training, held_out])
    device = data.states.device
    cka_windows = data.windows(for_cka.to(device), context_length)
    mine_windows = data.windows(for_mine.to(device), context_length)
    return cka_windows, mine_windows


# ==================================================================================================
# Activations
# ==================================================================================================
TOKENS = ("return", "state", "action")  # the three tokens of a time step, in their order
LAYERS = (
    "ln_1",
    "attn.c_attn",
    "attn.c_proj",
    "attn.resid_dropout",
    "ln_2",
    "mlp.c_fc",
    "mlp.act",
    "mlp.c_proj",
    "mlp.dropout",  # what the paper calls a block's output, before the residual is added
)


def layer_names(num_blocks):
    """All layers in the order of computation, nine per block: ["0.ln_1", "0.attn.c_attn", ...]."""
    return [f"{block}.{layer}" for block in range(num_blocks) for layer in LAYERS]


@torch.no_grad()
def activations(model, windows, layers, positions, chunk_size=250):
    """Outputs of some layers at some of the 3K tokens: {layer: [positions, windows, width]}."""
    chunks = {layer: [] for layer in layers}
    layer_of_module = {model.transformer.h.get_submodule(layer): layer for layer in layers}

    def keep_output(module, inputs, output):  # [chunk, 3K, width]
        layer = layer_of_module[module]
        chunks[layer].append(output[:, positions].transpose(0, 1).cpu())

    # PyTorch calls a forward hook each time that its module has computed something.
    hooks = [module.register_forward_hook(keep_output) for module in layer_of_module]
    for start in range(0, len(windows.valid), chunk_size):
        chunk = Windows(*(column[start : start + chunk_size] for column in windows))
        model(chunk.returns_to_go, chunk.states, chunk.actions, chunk.timesteps)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(chunks[layer], dim=1) for layer in layers}


# ==================================================================================================
# CKA: how similar two layers represent the same windows (section 5.1)
# ==================================================================================================
def gram_matrices(layers):
    """Gram matrices, U-centered and of length 1: a list of [windows, width] to [layers, windows²].

    After U-centering (Székely and Rizzo 2014) the inner product of two Gram matrices is an unbiased
    estimate of HSIC, up to a factor that CKA does not see: the debiased estimator of Kornblith et
    al. 2019. A constant layer has no direction, and so a CKA of nan.
    """
    rows = []
    for activation in layers:
        x = activation.double()
        x = x - x[0]  # keeps the digits of what differs; CKA does not see a translation
        num_windows = len(x)
        gram = x @ x.T
        # U-centering: off the diagonal, every row and every column then sums to zero.
        gram.fill_diagonal_(0)
        sums = gram.sum(dim=0)
        gram -= (sums[:, None] + sums) / (num_windows - 2)
        gram += sums.sum() / ((num_windows - 1) * (num_windows - 2))
        gram.fill_diagonal_(0)
        rows.append(gram.flatten() / gram.norm())
    return torch.stack(rows)


def cka(grams_a, grams_b):
    """Linear CKA of all layers of one model with all of another: [layers a, layers b]."""
    return (grams_a @ grams_b.T).numpy()


def grams_of_tokens(model, windows):
    """Gram matrices of all layers at the last step's tokens: {token: [layers, windows²]}.

    The released code compares one hidden unit over all tokens where the paper says a token.
    [analysis/section-51-activation-similarity/compute_cka.py#L45]
    """
    num_tokens = 3 * windows.valid.shape[1]
    positions = [num_tokens - 3, num_tokens - 2, num_tokens - 1]
    outputs = activations(model, windows, layer_names(len(model.transformer.h)), positions)
    grams = {}
    for i, token in enumerate(TOKENS):
        grams[token] = gram_matrices([output[i] for output in outputs.values()])
    return grams


def align_depth(values, num_blocks):
    """Values per layer, nine per block, for another number of blocks: [9 blocks] to [9 num_blocks].

    Each layer is averaged with its namesakes in neighboring blocks, weighed by how much of the new
    block they cover, so that a LayerNorm stays one. The released code averages neighboring layers,
    a LayerNorm with a projection. [analysis/section-51-activation-similarity/plot_cka.py#L26]
    """
    values = np.asarray(values).reshape(-1, len(LAYERS))
    old_edges = np.linspace(0, num_blocks, len(values) + 1)
    aligned = np.zeros((num_blocks, len(LAYERS)))
    for block in range(num_blocks):
        # How much of this block each old one covers.
        covered = np.minimum(old_edges[1:], block + 1) - np.maximum(old_edges[:-1], block)
        aligned[block] = covered.clip(min=0) @ values
    return aligned.flatten()


CKA_FORMATS = {
    "run": "",
    "token": "",
    "mean_cka": ".3f",
    "layers_above": "d",
    "layer_norms_above": "d",
}


def cka_table(runs, similarities, threshold):
    """Mean CKA before and after, and how many layers are above the threshold, for each token."""
    rows = []
    for run, similarity in zip(runs, similarities):
        for token, values in similarity.items():
            names = layer_names(len(values) // len(LAYERS))
            layers = dict(zip(names, values.tolist()))
            above = [name for name in names if layers[name] > threshold]
            rows.append(
                {
                    "run": str(run.folder),
                    "token": token,
                    "mean_cka": np.nanmean(values).item(),
                    "layers_above": len(above),
                    "layer_norms_above": sum(".ln_" in name for name in above),
                    "layers": layers,
                }
            )
    return rows


# ==================================================================================================
# MINE: mutual information by neural networks (section 5.2)
# ==================================================================================================
class StatisticsNetworks(nn.Module):
    """Networks of many estimators: [estimators, batch, features] to [estimators, batch].

    Each is features -> 400 -> 400 -> 400 -> 1 with ReLU, as in the released code; the text of the
    paper has a layer less. [../mine-pytorch/util_mi_calculation.py#L25]
    All start from the same weights, drawn as nn.Linear does, and share nothing afterwards: they are
    only trained side by side.
    """

    def __init__(self, num_estimators, num_features, generator):
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        sizes = (num_features, 400, 400, 400, 1)
        for n_in, n_out in itertools.pairwise(sizes):
            uniform = 2 * torch.rand(1, n_in + 1, n_out, generator=generator) - 1
            initial = (uniform / math.sqrt(n_in)).repeat(num_estimators, 1, 1)
            self.weights.append(nn.Parameter(initial[:, :-1].clone()))
            self.biases.append(nn.Parameter(initial[:, -1:].clone()))

    def forward(self, x):
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = F.relu(x)
        return x.squeeze(-1)


def donsker_varadhan(joint, marginal):
    """The lower bound E_joint[T] - log E_marginal[exp T] in nats: [estimators, samples] twice."""
    return joint.mean(dim=1) - (torch.logsumexp(marginal, dim=1) - math.log(marginal.shape[1]))


def mine(x, t, args, device):
    """Estimate the mutual information of each x[i] with t[i] by MINE (Belghazi et al. 2018).

    `x` [estimators, 2 * windows, features] and `t` [estimators, 2 * windows, width] hold the
    training windows first, then as many held-out ones. Returns the estimates on the held-out and on
    the training windows, in nats, both [estimators]; nan where a network has diverged.
    All networks start alike and see the windows in the same order: they differ by their data only.
    """
    num_windows = x.shape[1] // 2
    batch_size = args.mine_batch_size
    x = x.to(device)
    t = t.to(device)
    if not args.mine_paper_settings:
        # Units carry no information, but a network learns better in standardized ones.
        x = standardize(x, num_windows)
        t = standardize(t, num_windows)
    generator = torch.Generator().manual_seed(args.seed)
    networks = StatisticsNetworks(len(x), x.shape[2] + t.shape[2], generator).to(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-4, fused=True)

    def statistics(batch, partners):
        """T for the windows `batch`: with their own x, and with the x of their `partners`."""
        batch = batch.to(device)
        partners = partners.to(device)
        joint = torch.cat([x[:, batch], t[:, batch]], dim=2)
        marginal = torch.cat([x[:, partners], t[:, batch]], dim=2)
        return networks(torch.cat([joint, marginal], dim=1)).chunk(2, dim=1)

    average = None
    for _ in tqdm(range(args.mine_passes), desc="MINE", unit="pass", leave=False):
        order = torch.randperm(num_windows, generator=generator)
        for batch in order[: num_windows // batch_size * batch_size].split(batch_size):
            partners = batch[torch.randperm(batch_size, generator=generator)]
            joint, marginal = statistics(batch, partners)
            # The bound of donsker_varadhan is what is to grow. Its log E[exp T] has the gradient
            # E[exp T]' / E[exp T]; in small batches that is less biased with a moving average below
            # the fraction (section 3.2 of Belghazi et al.).
            mean_exp = marginal.exp().mean(dim=1)
            if average is None:
                average = mean_exp.detach()
            else:
                average = torch.lerp(average, mean_exp.detach(), 0.01)
            loss = mean_exp / average - joint.mean(dim=1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()

    # The released code reads the estimate off the windows that the network was trained on, which
    # tells how well it memorizes. [../mine-pytorch/mine/models/mine.py#L125]
    estimates = []
    for first in (num_windows, 0):  # held out, training
        order = first + torch.arange(num_windows)
        shuffled = first + torch.randperm(num_windows, generator=generator)
        joints = []
        marginals = []
        with torch.no_grad():
            for batch, partners in zip(order.split(batch_size), shuffled.split(batch_size)):
                joint, marginal = statistics(batch, partners)
                joints.append(joint)
                marginals.append(marginal)
        bound = donsker_varadhan(torch.cat(joints, dim=1), torch.cat(marginals, dim=1))
        estimates.append(torch.where(bound.isfinite(), bound, math.nan).cpu())
    return estimates


def standardize(values, num_windows):
    """Mean 0 and deviation 1 of each feature over the training windows."""
    training = values[:, :num_windows]
    mean = training.mean(dim=1, keepdim=True)
    return (values - mean) / (training.std(dim=1, keepdim=True) + 1e-6)


# ==================================================================================================
# Whose information: the paper's questions
# ==================================================================================================
# x_t is a token of the data at step t, T_l(x_t) the output of block l at that token, and the index
# K is the last step of the window. Variables are [steps, windows, features].
def estimate(about, x, t, args, device):
    """Estimates of I(x; t) for each of the steps: rows that begin with what they are `about`."""
    held_out, training = mine(x, t, args, device)
    rows = []
    for i in range(len(x)):
        rows.append(
            {
                **about,
                "step_index": i,  # among the steps that were asked for
                "control": False,
                "held_out": held_out[i].item(),
                "training": training[i].item(),
            }
        )
    return rows


def estimate_control(about, x, t, args, device):
    """The last step's estimate again with the windows of x shuffled: there is nothing to know.

    What MINE finds there is its error.
    """
    rng = np.random.default_rng(args.seed)
    half = x.shape[1] // 2
    order = np.concatenate([rng.permutation(half), half + rng.permutation(half)])
    rows = estimate(about, x[-1:, torch.as_tensor(order)], t[-1:], args, device)
    rows[0]["control"] = True
    return rows


def data_variables(windows, steps):
    """The tokens of the data at some steps: {token: [steps, windows, features]}."""
    return {
        "return": windows.returns_to_go[:, steps].transpose(0, 1).cpu(),
        "state": windows.states[:, steps].transpose(0, 1).cpu(),
        "action": windows.actions[:, steps].transpose(0, 1).cpu(),
    }


def block_output(model, windows, block, steps):
    """T_l at the tokens of some steps: {token: [steps, windows, width]}."""
    layer = f"{block}.mlp.dropout"
    outputs = {}
    for i, token in enumerate(TOKENS):
        positions = [3 * step + i for step in steps]
        outputs[token] = activations(model, windows, [layer], positions)[layer]
    return outputs


def information_with_context(model, windows, steps, args, device):
    """Fig. 2: I(X;T) = I(x_t; T_l(s_K)) and I(Y;T) = I(a_K; T_l(x_t)), in three blocks.

    a_K is left out as a token x_t, as in the released code: nothing has seen it but itself.
    """
    x = data_variables(windows, steps)
    num_blocks = len(model.transformer.h)
    rows = []
    for block in sorted({0, num_blocks // 2, num_blocks - 1}):
        t = block_output(model, windows, block, steps)
        for token in TOKENS:
            count = len(steps) - 1 if token == "action" else len(steps)  # without a_K
            if count == 0:
                continue  # K = 1, where a_K is the only action
            # One and the same for all steps: [count, windows, features].
            at_last_state = t["state"][-1:].expand(count, -1, -1)
            last_action = x["action"][-1:].expand(count, -1, -1)
            about_input = {"analysis": "context", "of": "I(X;T)", "block": block, "token": token}
            about_label = {"analysis": "context", "of": "I(Y;T)", "block": block, "token": token}
            rows += estimate(about_input, x[token][:count], at_last_state, args, device)
            rows += estimate(about_label, last_action, t[token][:count], args, device)
            if token == "state":  # one control each is enough
                rows += estimate_control(about_input, x[token], at_last_state, args, device)
                rows += estimate_control(about_label, last_action, t[token], args, device)
    return rows


def information_of_same_step(model, windows, steps, args, device):
    """App. E: I(s_t; T_l(s_t)) and I(a_t; T_l(s_t)), in every block."""
    x = data_variables(windows, steps)
    rows = []
    for block in range(len(model.transformer.h)):
        t = block_output(model, windows, block, steps)
        about_input = {"analysis": "same step", "of": "I(X;T)", "block": block, "token": "state"}
        about_label = {"analysis": "same step", "of": "I(Y;T)", "block": block, "token": "state"}
        rows += estimate(about_input, x["state"], t["state"], args, device)
        rows += estimate(about_label, x["action"], t["state"], args, device)
        rows += estimate_control(about_input, x["state"], t["state"], args, device)
        rows += estimate_control(about_label, x["action"], t["state"], args, device)
    return rows


def information_in_data(windows, steps, args, device):
    """App. H.2: I(s_t; a_t) and I(R_t; a_t), without any model."""
    x = data_variables(windows, steps)
    rows = []
    for of, token in (("I(s;a)", "state"), ("I(R;a)", "return")):
        about = {"analysis": "data", "of": of, "block": None, "token": token}
        rows += estimate(about, x[token], x["action"], args, device)
        rows += estimate_control(about, x[token], x["action"], args, device)
    return rows


def select(rows, **properties):
    """The rows with these properties, in their order."""
    return [row for row in rows if all(row[name] == value for name, value in properties.items())]


def read_off(args):
    """Which estimate is trusted: the held-out one, but at the paper's settings the training one."""
    return "training" if args.mine_paper_settings else "held_out"


INFORMATION_FORMATS = {
    "run": "",
    "analysis": "",
    "of": "",
    "held_out": ".3f",
    "training": ".3f",
    "shuffled": ".3f",
}


def information_table(information, args):
    """Means over blocks, tokens and steps."""
    rows = []
    groups = [(row["run"], row["analysis"], row["of"]) for row in information]
    for run, analysis, of in dict.fromkeys(groups):  # each group once, in their order
        of_group = select(information, run=run, analysis=analysis, of=of)
        estimates = select(of_group, control=False)
        controls = select(of_group, control=True)
        rows.append(
            {
                "run": run,
                "analysis": analysis,
                "of": of,
                "held_out": np.nanmean([row["held_out"] for row in estimates]).item(),
                "training": np.nanmean([row["training"] for row in estimates]).item(),
                "shuffled": np.nanmean([row[read_off(args)] for row in controls]).item(),
            }
        )
    return rows


# ==================================================================================================
# Figures
# ==================================================================================================
def run_name(run):
    return f"{run.folder.name}, seed {run.args['seed']}"


def run_color(run):
    return COLORS.get(Path(run.args["backbone"]).name, OTHER_COLOR)


def plot_cka(runs, similarities, args):
    """CKA of every layer before and after fine-tuning, LayerNorms marked (section 5.1).

    `similarities` is {token: [layers]} for each run. The paper draws the threshold for Hopper and
    the state token only.
    """
    K = runs[0].args["context_length"]
    subject = f"CKA before and after fine-tuning, {args.cka_windows} windows, K = {K}"
    figure = new_figure(runs[0].args, f"{subject}, diamonds are LayerNorms", 15, 4.5)
    num_blocks = min(len(similarity["state"]) // len(LAYERS) for similarity in similarities)
    is_norm = np.array([".ln_" in name for name in layer_names(num_blocks)])
    depth = (np.arange(len(is_norm)) + 0.5) / len(is_norm)
    for axes, token in zip(figure.subplots(1, 3, sharey=True), TOKENS):
        for run, similarity in zip(runs, similarities):
            values = align_depth(similarity[token], num_blocks)
            color = run_color(run)
            axes.plot(depth, values, ".-", color=color, label=run_name(run), linewidth=1)
            axes.plot(depth[is_norm], values[is_norm], "D", color=color, markersize=5)
        axes.axhline(args.cka_threshold, color="black", linestyle="--", linewidth=0.8)
        axes.set(title=f"{token} token of the last step", xlabel="depth, 0 first layer, 1 last")
    figure.axes[0].set_ylabel("linear CKA, debiased")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_heat_maps(runs, grams_before, grams_after, token):
    """CKA between all layers: in each model before and after, and between models after (App. D)."""
    panels = []
    for run, grams in zip(runs, grams_before):
        panels.append(("before", run, run, cka(grams[token], grams[token])))
    for run, grams in zip(runs, grams_after):
        panels.append(("after", run, run, cka(grams[token], grams[token])))
    for a, b in itertools.combinations(range(len(runs)), 2):
        similarity = cka(grams_after[a][token], grams_after[b][token])
        panels.append(("after", runs[a], runs[b], similarity))
    num_columns = max(len(runs), 2)
    num_rows = math.ceil(len(panels) / num_columns)
    subject = f"CKA of all layers at the last {token} token, K = {runs[0].args['context_length']}"
    figure = new_figure(runs[0].args, subject, 4 * num_columns + 1, 3.8 * num_rows + 0.8)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, (when, run_a, run_b, similarity) in zip(grid, panels):
        image = axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set_title(f"{when} fine-tuning")
        axes.set(xlabel=f"layer, {run_name(run_b)}", ylabel=f"layer, {run_name(run_a)}")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(grid), label="linear CKA, debiased", shrink=0.5)
    return figure


def mine_figure(run, args, subject, width, height):
    """An empty figure that says how MINE was run."""
    windows = read_off(args).replace("_", "-")
    settings = f"MINE, {args.mine_windows} {windows} windows, {args.mine_passes} passes"
    K = run.args["context_length"]
    return new_figure(run.args, f"{subject}, K = {K}\n{settings}; dashed: shuffled", width, height)


def plot_information_with_context(runs, information, steps, args):
    """I(X;T) and I(Y;T) over the position of the token, in three blocks (Fig. 2)."""
    figure = mine_figure(runs[0], args, "information about input X and label Y", 14, 8)
    grid = figure.subplots(2, 3, sharex=True, sharey="row")
    markers = {"return": "^", "state": "o", "action": "x"}
    positions = np.array(steps) - steps[-1]
    for axes_row, name in zip(grid, ("I(X;T)", "I(Y;T)")):
        axes_row[0].set_ylabel(f"{name}, nats")
        for run in runs:
            of_run = select(information, run=str(run.folder), analysis="context", of=name)
            color = run_color(run)
            for axes, block in zip(axes_row, sorted({row["block"] for row in of_run})):
                for token, marker in markers.items():
                    rows = select(of_run, block=block, token=token, control=False)
                    values = [row[read_off(args)] for row in rows]
                    label = f"{run_name(run)}, {token}"
                    axes.plot(
                        positions[: len(values)],  # there is none for a_K
                        values,
                        color=color,
                        marker=marker,
                        linewidth=0.6,
                        label=label,
                    )
                controls = select(of_run, block=block, control=True)
                control = np.mean([row[read_off(args)] for row in controls])
                axes.axhline(control, color=color, linestyle="--", linewidth=1)
    for column, depth in enumerate(("shallow", "middle", "deep")):
        grid[0, column].set_title(f"{depth} block")
        grid[1, column].set_xlabel("time step of the token, 0 the last")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_information_of_same_step(runs, information, args):
    """I(s_t; T(s_t)) and I(a_t; T(s_t)) in every block, mean and deviation over steps (App. E)."""
    figure = mine_figure(runs[0], args, "information about the same step", 12, 4.8)
    formulas = {"I(X;T)": "I(s_t; T(s_t))", "I(Y;T)": "I(a_t; T(s_t))"}
    for axes, (name, formula) in zip(figure.subplots(1, 2), formulas.items()):
        for run in runs:
            of_run = select(information, run=str(run.folder), analysis="same step", of=name)
            means = []
            deviations = []
            controls = []
            for block in sorted({row["block"] for row in of_run}):
                rows = select(of_run, block=block, control=False)
                values = [row[read_off(args)] for row in rows]
                means.append(np.mean(values))
                deviations.append(np.std(values))
                controls.append(select(of_run, block=block, control=True)[0][read_off(args)])
            depth = (np.arange(len(means)) + 0.5) / len(means)
            color = run_color(run)
            axes.errorbar(
                depth, means, deviations, color=color, marker="o", capsize=3, label=run_name(run)
            )
            axes.plot(depth, controls, "--", color=color, linewidth=1)
        axes.set(ylabel=f"{formula}, nats", xlabel="depth, 0 first block, 1 last")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_information_in_data(runs, information, args):
    """I(s_t; a_t) and I(R_t; a_t), one point per step (App. H.2)."""
    figure = mine_figure(runs[0], args, "information in the data", 7, 4.8)
    axes = figure.subplots()
    names = ("I(s;a)", "I(R;a)")
    for position, name in enumerate(names):
        rows = select(information, analysis="data", of=name, control=False)
        values = [row[read_off(args)] for row in rows]
        axes.boxplot([values], positions=[position], widths=0.3)
        axes.plot([position] * len(values), values, ".", color=OTHER_COLOR)
        control = select(information, analysis="data", of=name, control=True)[0]
        edges = (position - 0.3, position + 0.3)
        axes.hlines(control[read_off(args)], *edges, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("nats")
    return figure


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
def check_own_arguments(args):
    """The arguments that only this script has."""
    if args.mine_paper_settings:  # [../mine-pytorch/util_mi_calculation.py#L39]
        args.mine_windows = 100
        args.mine_batch_size = 50
        args.mine_passes = 1000
    if not args.backbones:
        stop("--backbones needs at least one name.")
    if args.mine_steps is not None and args.mine_steps < 1:
        stop("--mine-steps must be at least 1.")
    if len(args.epochs) not in (0, 2):
        stop("--epochs takes two epochs to compare, before and after.")
    if not args.runs and max(args.epochs, default=0) > args.num_epochs:
        stop(f"--epochs {max(args.epochs)} is beyond --num-epochs {args.num_epochs}.")
    if 0 < args.cka_windows < 4 or args.cka_windows < 0 or args.mine_windows < 0:
        stop("--cka-windows must be 0 or at least 4, --mine-windows 0 or more.")
    if args.mine_batch_size < 1 or 0 < args.mine_windows < args.mine_batch_size:
        stop("--mine-batch-size must be at least 1, and at most --mine-windows.")


if __name__ == "__main__":
    defaults = SAMPLE if "--sample" in sys.argv else Args()
    args = tyro.cli(Args, default=defaults, description=__doc__)
    complete_arguments(args)
    check_own_arguments(args)
    args.save_epochs = (0, *args.save_epochs, *args.epochs)
    folder = Path("runs") / args.run_name
    device = find_device(args)
    try:
        if args.runs:
            runs = [read_run(run) for run in args.runs]
        else:
            runs = train_study(args, folder, device)
    except KeyboardInterrupt:
        stop(f"Interrupted; the same command with --run-name {args.run_name} goes on.", status=130)
    if RANK > 0:
        sys.exit()

    # All models are shown the same windows.
    run_args = runs[0].args
    for run in runs:
        for name in ("env", "dataset", "context_length"):
            if run.args[name] != run_args[name]:
                stop(f"{run.folder} has another {name} than {runs[0].folder}.")
    data_args = replace(args, env=run_args["env"], dataset=run_args["dataset"])
    data = OfflineData(load_episodes(data_args, make_env(data_args, 1)), device)
    K = run_args["context_length"]
    cka_windows, mine_windows = choose_windows(data, K, args)
    # The steps at which information is estimated: evenly spaced, the last one among them.
    num_steps = min(args.mine_steps or K, K)
    steps = sorted({round(step) for step in np.linspace(K - 1, 0, num_steps)})

    grams_before = []
    grams_after = []
    similarities = []
    information = []
    if args.mine_windows > 0:
        for row in information_in_data(mine_windows, steps, args, device):
            information.append({"run": "data", **row})
    for run in tqdm(runs, desc="analysis", unit="model"):
        first, last = args.epochs or (0, run.records[-1]["epoch"])
        model_before = load_model(run.folder / f"epoch_{first}.pt", device)
        model_after = load_model(run.folder / f"epoch_{last}.pt", device)
        if args.cka_windows > 0:
            before = grams_of_tokens(model_before, cka_windows)
            after = grams_of_tokens(model_after, cka_windows)
            # Each layer with itself: the diagonal of cka(before, after).
            similarity = {}
            for token in TOKENS:
                similarity[token] = (before[token] * after[token]).sum(dim=1).numpy()
            grams_before.append(before)
            grams_after.append(after)
            similarities.append(similarity)
        if args.mine_windows > 0:
            rows = information_with_context(model_after, mine_windows, steps, args, device)
            rows += information_of_same_step(model_after, mine_windows, steps, args, device)
            for row in rows:
                information.append({"run": str(run.folder), **row})

    make_folder(folder)
    cka_rows = cka_table(runs, similarities, args.cka_threshold)
    results = {"args": asdict(args), "cka": cka_rows, "mutual_information": information}
    save_json(folder / "results.json", results)
    figures = {}
    if args.cka_windows > 0:
        figures["cka_before_after"] = plot_cka(runs, similarities, args)
        for token in TOKENS:
            heat_maps = plot_heat_maps(runs, grams_before, grams_after, token)
            figures[f"cka_heat_maps_{token}"] = heat_maps
        print(f"\nCKA before and after; layers above {args.cka_threshold:g}, LayerNorms of them")
        print_table(cka_rows, CKA_FORMATS)
    if args.mine_windows > 0:
        figures["information_with_context"] = plot_information_with_context(
            runs, information, steps, args
        )
        figures["information_of_same_step"] = plot_information_of_same_step(runs, information, args)
        figures["information_in_data"] = plot_information_in_data(runs, information, args)
        print("\nMutual information in nats, mean over blocks, tokens and steps")
        print_table(information_table(information, args), INFORMATION_FORMATS)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", step=args.num_epochs)
    print(f"{folder}: results.json, {', '.join(figures)}; or: tensorboard --logdir runs")
