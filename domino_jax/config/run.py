"""A misspelt setting would train another run than was meant, in silence: all are read strictly.

What a run can be told, as frozen dataclasses, from YAML and `key=value` words. No jax here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from domino_jax.config.model import (
    SIZE_LIMIT,
    SLIDING_ATTENTION,
    DecoderConfig,
    DecoderShape,
    DominoHeadConfig,
    DraftConfig,
    default_target_layer_ids,
    head_kind,
)
from domino_jax.files import read_text
from domino_jax.parse import DEPTH, YAML_CHARACTERS, parse_yaml
from domino_jax.strict import InputError, Scalars, from_tree, require, shown

SEED_LIMIT = 2**32  # of grain and of jax's keys
COUNT_LIMIT = 2**31  # of what is counted in int32: steps, rows, devices
LENGTH_LIMIT = 2**24  # of the sides of an array


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """The draft to train; what has no field (widths, rotary base) or is left null is the target's.

    `shift_label` null is true with the Domino head and false without. `sliding_window` makes every
    layer a sliding one unless `layer_types` says which. `init_from` is a directory of a draft
    checkpoint to start from.
    """

    num_hidden_layers: int = 5
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    block_size: int = 16
    mask_token_id: int
    target_layer_ids: tuple[int, ...] | None = None
    projector_type: str | None = "domino"
    emb_dim: int = 256
    gru_hidden_dim: int = 1024
    pure_draft_prefix_len: int = 1
    shift_label: bool | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    sliding_in_block: str = "bidirectional"
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    init_layers_from_target: bool = False
    init_from: str | None = None

    def __post_init__(self) -> None:
        """Refuses sizes and ids beyond any model's; the rest depends on the target."""
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if type(number) is int:
                    require(
                        abs(number) <= SIZE_LIMIT,
                        f"{name} must be at most {SIZE_LIMIT}, found {number}",
                    )


def make_draft_config(
    recipe: DraftRecipe, target: DecoderConfig, *, special_ids: Mapping[str, int | None], dtype: str
) -> DraftConfig:
    """The full draft of a recipe for one target.

    Args:
        recipe: what the run's configuration says.
        target: the target; widths, heads and rotary base are taken from it.
        special_ids: name -> id of tokens that must not double as the mask token (eos, pad, bos).
        dtype: compute type of the draft.
    Raises:
        InputError: the mask token is a special token, or the recipe does not fit the target.
    """
    for name, token in special_ids.items():
        require(
            token != recipe.mask_token_id,
            f"draft.mask_token_id {recipe.mask_token_id} is the target's {name} token",
        )
    layers = recipe.target_layer_ids
    if layers is None:
        depth, count = target.num_hidden_layers, recipe.num_hidden_layers
        layers = default_target_layer_ids(depth, count)
        # `DraftConfig` refuses these too, but names a setting that nobody has given.
        require(
            list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < depth,
            f"draft.num_hidden_layers {count} needs {count} different layers of a target of "
            f"{depth} layers; give draft.target_layer_ids or fewer layers",
        )
    # Depth and type are the draft's own, and it always has per-head norms.
    own = ("num_hidden_layers", "dtype", "qk_norm")
    shape = [f.name for f in dataclasses.fields(DecoderShape) if f.name not in own]
    fields: dict[str, Any] = {name: getattr(target, name) for name in shape}
    for f in dataclasses.fields(DraftConfig):
        chosen = getattr(recipe, f.name, None)
        if chosen is not None:
            fields[f.name] = chosen
    fields["head"] = _head_of(recipe)  # null is plain DFlash, nothing left open
    fields.setdefault("shift_label", fields["head"] is not None)
    if recipe.sliding_window is not None and recipe.layer_types is None:
        fields["layer_types"] = (SLIDING_ATTENTION,) * recipe.num_hidden_layers
    fields |= {"num_target_layers": target.num_hidden_layers, "target_layer_ids": layers}
    return DraftConfig(**fields | {"dtype": dtype})


def _head_of(recipe: DraftRecipe) -> DominoHeadConfig | None:
    if recipe.projector_type is None:
        return None
    kind = head_kind(recipe.projector_type, place="draft")
    return kind(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(kind)})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Conversations and how they become rows: JSONL of {"messages": [...]}, one per line.

    `chat_template_kwargs` is what the target's chat template is told besides the messages, for
    example `enable_thinking: false`; a name that the template does not read is refused.
    `mask_reasoning_content` takes `<think>...</think>` spans of answers out of the loss; their
    tokens stay in the rows. `features` is a directory that `domino capture` wrote: training reads
    its rows and the target's captured states instead of `train`, and does not run the target.
    Held-out rows are conversations either way; for them the target runs at every evaluation.
    `packing` puts several short conversations into one row; `batch_size` and epochs then count
    packed rows.
    """

    train: str | None = None
    features: str | None = None
    heldout: str | None = None
    max_length: int = 3072
    batch_size: int = 16
    chat_template_kwargs: Scalars = field(default_factory=dict, hash=False)  # no mapping has a hash
    mask_reasoning_content: bool = False
    packing: bool = False

    def __post_init__(self) -> None:
        """Refuses two sources of rows, or none."""
        found = "neither" if self.train is None else f"both, {self.train!r} and {self.features!r}"
        require(
            (self.train is None) != (self.features is None),
            f"give one of train and features, found {found}",
        )


# Those of `draft/blocks.py`, which imports jax.
ANCHOR_RULES = ("nemo", "specforge")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Anchors, objective and the curriculum (contract terms: N, gamma, lambda_base).

    `anchor_rule` is "nemo" or "specforge". `loss_type` is an objective of
    `training/objectives.py`, `options` are its own parameters, and it says what `normalize` null
    means. `loss_decay_gamma` "default" is the objective's own decay of the position weights (7 for
    dflash, none for dpace), null none. `kl_weight` of each token's loss is the divergence from the
    target's distribution, the rest its hard label's cross-entropy. `logits_mib` bounds memory: the
    vocabulary loss runs over as many blocks at a time as have float32 logits of that many MiB on a
    device; null takes what suits the device.
    """

    num_anchors: int = 512
    anchor_rule: str = "nemo"
    loss_type: str = "dflash"
    options: Scalars = field(default_factory=dict, hash=False)  # no mapping has a hash
    loss_decay_gamma: float | Literal["default"] | None = "default"
    normalize: str | None = None
    kl_weight: float = 0.0
    lambda_start: float = 1.0
    decay_ratio: float = 1.0
    logits_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay; with `ema_decay` an average of the draft is exported."""

    learning_rate: float = 6e-4
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_ratio: float = 0.04
    final_ratio: float = 0.1
    grad_accumulation: int = 1
    ema_decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run and what happens along the way. `steps` overrides `epochs`.

    Of the checkpoints the newest `keep_checkpoints` stay, and with `keep_best: heldout` the one
    with the longest held-out acceptance. `extend` trains so many steps further once the run has
    come to its end, at the learning rate and lambda_base that it ended with. A step whose loss or
    gradient is not finite is skipped; `max_bad_steps` of them in a row end the run. `profile`
    [step, steps] writes a trace of so many steps, from that one on, into the run directory's
    `profile`.
    """

    epochs: int = 3
    steps: int | None = None
    log_every: int = 10
    eval_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_best: str | None = None
    extend: int = 0
    max_bad_steps: int = 20
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuses a run that may not begin."""
        found = self.max_bad_steps
        require(1 <= found < COUNT_LIMIT, f"max_bad_steps must be at least 1, found {found}")
        require(0 <= self.extend < COUNT_LIMIT, f"extend must be 0 or more, found {self.extend}")
        best = self.keep_best
        require(
            best in (None, "heldout"), f"keep_best must be null or 'heldout', found {shown(best)}"
        )
        require(
            best is None
            or self.checkpoint_every < 1  # no divisor; `RunConfig` refuses it
            or self.eval_every % self.checkpoint_every == 0,
            "keep_best needs a checkpoint at each evaluation: eval_every "
            f"{self.eval_every} must be a multiple of checkpoint_every {self.checkpoint_every}",
        )
        profile = self.profile
        require(
            profile is None
            or (len(profile) == 2 and min(profile) >= 1 and max(profile) < COUNT_LIMIT),
            f"profile must be [step, steps], both at least 1, found {shown(list(profile or ()))}",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `domino train` needs. A YAML file holds only what differs from these defaults."""

    run_dir: str
    target: str
    draft: DraftRecipe
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuses values and combinations that cannot train."""
        require(
            self.dtype in ("float32", "bfloat16"),
            f"dtype must be float32 or bfloat16, found {self.dtype!r}",
        )
        require(0 <= self.seed < SEED_LIMIT, f"seed must lie in 0..2**32-1, found {self.seed}")
        self._check_counts()
        for place, ratio in (
            ("loss.lambda_start", self.loss.lambda_start),
            ("loss.decay_ratio", self.loss.decay_ratio),
            ("loss.kl_weight", self.loss.kl_weight),
            ("optimizer.warmup_ratio", self.optimizer.warmup_ratio),
            ("optimizer.final_ratio", self.optimizer.final_ratio),
        ):
            require(0 <= ratio <= 1, f"{place} must lie in 0..1, found {ratio}")
        rule, gamma = self.loss.anchor_rule, self.loss.loss_decay_gamma
        require(
            rule in ANCHOR_RULES,
            f"loss.anchor_rule must be one of {', '.join(ANCHOR_RULES)}, found {rule!r}",
        )
        require(
            gamma is None or gamma == "default" or gamma > 0,
            f"loss.loss_decay_gamma must be positive, null for none or 'default', found {gamma}",
        )
        draft = self.draft
        require(
            not (draft.init_from and draft.init_layers_from_target),
            "draft.init_from and draft.init_layers_from_target are two starts; give one",
        )
        require(
            self.train.keep_best is None or self.data.heldout is not None,
            "train.keep_best is 'heldout', but data.heldout is missing",
        )
        mib = self.loss.logits_mib
        require(mib is None or mib > 0, f"loss.logits_mib must be positive, found {mib}")
        optimizer = self.optimizer
        for name in ("learning_rate", "clip_norm"):
            value = getattr(optimizer, name)
            require(value > 0, f"optimizer.{name} must be positive, found {value}")
        for name in ("b1", "b2"):
            value = getattr(optimizer, name)
            require(0 <= value < 1, f"optimizer.{name} must lie in 0..1 and below 1, found {value}")
        require(
            optimizer.weight_decay >= 0,
            f"optimizer.weight_decay must be 0 or more, found {optimizer.weight_decay}",
        )
        ema = optimizer.ema_decay
        require(
            ema is None or 0 < ema < 1, f"optimizer.ema_decay must lie between 0 and 1, found {ema}"
        )
        require(
            self.data.max_length > self.draft.block_size,
            f"data.max_length {self.data.max_length} must exceed "
            f"draft.block_size {self.draft.block_size}",
        )

    def _check_counts(self) -> None:
        for limit, counts in (
            (
                LENGTH_LIMIT,
                {
                    "data.max_length": self.data.max_length,
                    "data.batch_size": self.data.batch_size,
                    "draft.num_hidden_layers": self.draft.num_hidden_layers,
                    "draft.block_size": self.draft.block_size,
                    "loss.num_anchors": self.loss.num_anchors,
                    "optimizer.grad_accumulation": self.optimizer.grad_accumulation,
                },
            ),
            (
                COUNT_LIMIT,
                {
                    "train.epochs": self.train.epochs,
                    "train.steps": 1 if self.train.steps is None else self.train.steps,
                    "train.log_every": self.train.log_every,
                    "train.eval_every": self.train.eval_every,
                    "train.checkpoint_every": self.train.checkpoint_every,
                    "train.keep_checkpoints": self.train.keep_checkpoints,
                    "mesh.data": 1 if self.mesh.data == -1 else self.mesh.data,
                    "mesh.fsdp": self.mesh.fsdp,
                    "mesh.tensor": self.mesh.tensor,
                },
            ),
        ):
            for place, value in counts.items():
                alone = "-1 or " if place == "mesh.data" else ""
                require(value >= 1, f"{place} must be {alone}at least 1, found {value}")
                require(value < limit, f"{place} must be below {limit}, found {value}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `key=value` words, for example `optimizer.learning_rate=1e-3`.

    Args:
        path: the YAML file.
        overrides: dotted keys with YAML values; later words win.
    Returns:
        The checked configuration.
    Raises:
        InputError: unreadable file, unknown key (with the nearest valid name), wrong type or
            contradicting values.
    """
    tree = parse_yaml(read_text(Path(path), limit=YAML_CHARACTERS), place=str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    for word in overrides:
        place = f"override {shown(word)}"
        key, equals, value = word.partition("=")
        keys = key.split(".")
        if not equals or not key:
            raise InputError(f"{place}: expected key=value, for example train.steps=100")
        if len(keys) > DEPTH:
            raise InputError(f"{place}: a key of {len(keys)} parts, expected at most {DEPTH}")
        _assign(tree, keys, parse_yaml(value, place=place), place)
    return from_tree(RunConfig, tree, place=str(path))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _assign(tree: dict[str, Any], keys: list[str], value: Any, place: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"{place}: {shown(key)} is a value, not a section")
    tree[keys[-1]] = value
