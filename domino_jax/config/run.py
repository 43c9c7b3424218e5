"""A misspelt setting would train another run than was meant, in silence: all are read strictly.

What a run can be told, from YAML and `key=value` words. No jax here.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from domino_jax.base.errors import InputError, from_dict, require, shown
from domino_jax.base.files import read_text
from domino_jax.base.parse import DEPTH, YAML_CHARACTERS, parse_yaml
from domino_jax.config.draft import DraftRecipe
from domino_jax.config.schema import REQUIRED, Section, key
from domino_jax.config.sections import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

SEED_LIMIT = 2**32  # of grain and of jax's keys
# Keys of earlier states of the project, which older files may hold.
RENAMED = {
    "data.heldout": "data.eval",
    "data.features": "data.hidden_states",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.final_ratio": "optimizer.min_lr_ratio",
    "train.extend": "train.extra_steps",
    "train.max_bad_steps": "train.max_nonfinite_steps",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything `domino train` needs. A YAML file holds only what differs from these defaults."""

    run_dir: str = key(REQUIRED, "directory of the run; made where missing")
    target: str = key(REQUIRED, "directory of the target in Hugging Face form, or a built-in name")
    draft: DraftRecipe = field(default_factory=DraftRecipe)
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = key(0, "of parameters, order and anchors", least=0, below=SEED_LIMIT)
    dtype: str = key(
        "bfloat16",
        "type of products and activations; master weights are float32",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        """Refuses sections that cannot train together."""
        super().__post_init__()
        for name in ("keep_best", "rollout_every"):
            value = getattr(self.train, name)
            require(
                value is None or self.data.eval is not None,
                f"train.{name} is {value!r}, but data.eval is missing",
            )
        # A block begins inside its row and ends there: in a shorter row no anchor is ever drawn.
        require(
            self.data.max_length > self.draft.block_size,
            f"data.max_length {self.data.max_length} must exceed "
            f"draft.block_size {self.draft.block_size}",
        )


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
    # Bounded before it is read: by mistake the path may be that of a checkpoint.
    tree = parse_yaml(read_text(Path(path), limit=YAML_CHARACTERS), source=str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    for word in overrides:
        source = f"override {shown(word)}"
        name, equals, value = word.partition("=")
        *sections, last = name.split(".")
        expected = "expected key=value, for example train.steps=100"
        require(name != "" and equals != "", f"{source}: {expected}")
        # No deeper than a file may be: what reads the tree goes down by recursion.
        parts = len(sections) + 1
        require(parts <= DEPTH, f"{source}: a key of {parts} parts, expected at most {DEPTH}")
        branch = tree
        for section in sections:
            # A file holds only what differs, so the section may not be there yet.
            branch = branch.setdefault(section, {})
            is_section = isinstance(branch, dict)
            require(is_section, f"{source}: {shown(section)} is a value, not a section")
        branch[last] = parse_yaml(value, source=source)
    for old, new in RENAMED.items():
        section, name = old.split(".")
        found = tree.get(section)
        renamed = isinstance(found, dict) and name in found
        require(not renamed, f"{path}: {old} is now {new}; rename the key")
    return from_dict(RunConfig, tree, source=str(path))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
