"""The sections of a run's configuration, each checked as it is made.

What one section can know of itself is refused here, whoever makes it: a file, an override or a
script. What two of them must agree on is `config.run`'s. No jax here.
"""

from dataclasses import dataclass
from typing import Literal

from domino_jax.base.errors import Scalars, require, shown
from domino_jax.config.schema import COUNT, LENGTH, SHARE, Section, key

# Those of `draft/blocks.py`, which imports jax.
ANCHOR_RULES = ("nemo", "specforge")
# The best checkpoint has the highest such figure, by what `train.keep_best` says.
BEST_FIGURES = {"heldout": "accept_len", "rollout": "tau"}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training data: files of generated ids or of text, see docs/data.md, and their rows."""

    train: str | None = key(None, "JSONL or JSONL.gz of the target's answers: token ids or text")
    hidden_states: str | None = key(
        None, "directory of `domino capture`: replaces train and skips the target forward"
    )
    eval: str | None = key(
        None, "JSONL or JSONL.gz to measure on; the target runs for them either way"
    )
    max_length: int = key(3072, "S; longer conversations are cut", unit="tokens", **LENGTH)
    batch_size: int = key(
        16,
        "rows that train together, over all devices; with packing, packed rows",
        unit="rows",
        **LENGTH,
    )
    chat_template_kwargs: Scalars = key(
        {},
        "arguments of the target's chat template besides messages and tools, for example "
        "enable_thinking: false; those of a line override them. A name that it does not read is an "
        "error. A template that prints the date gets strftime_now: 2026-12-01, filled in at "
        "the first start",
    )
    mask_reasoning_content: bool = key(
        False, "take <think>...</think> of answers out of the loss; their tokens stay in the rows"
    )
    max_unusable: float = key(
        0.2,
        "share of a file's lines that may hold an answer that is not trained; more is an error",
        **SHARE,
    )
    special_tokens_in_text: str = key(
        "allow",
        "lines with the text of a special token in a message, such as <|im_end|>; refuse: they are "
        "not trained, and count in max_unusable",
        choices=("allow", "refuse"),
    )
    packing: bool = key(
        False, "put several short conversations into one row; epochs then count packed rows"
    )

    @property
    def source(self) -> str:
        """Where the training rows lie."""
        return str(self.train or self.hidden_states)

    def __post_init__(self) -> None:
        """Refuses two sources of rows, or none."""
        super().__post_init__()
        found = (
            "neither" if self.train is None else f"both, {self.train!r} and {self.hidden_states!r}"
        )
        require(
            (self.train is None) != (self.hidden_states is None),
            f"give one of train and hidden_states, found {found}",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Anchors, objective and the curriculum (N, gamma, lambda_base of `objective/loss.py`)."""

    num_anchors: int = key(512, "N, blocks that a row trains at most", unit="anchors", **LENGTH)
    anchor_rule: str = key(
        "nemo",
        "where a block may begin: nemo keeps it inside the row, specforge asks for one more token",
        choices=ANCHOR_RULES,
    )
    loss_type: str = key("dflash", "objective; those known stand in objective/objectives.py")
    options: Scalars = key({}, "the objective's own parameters")
    # Null has a meaning of its own here, so the default is a word and not null.
    loss_decay_gamma: float | Literal["default"] | None = key(
        "default",
        "decay of the position weights; default: the objective's own, null: none",
        unit="positions",
        above=0,
        choices=("default",),
    )
    normalize: str | None = key(
        None, "divisor of the loss: weights, tokens or blocks; null: the objective's own"
    )
    kl_weight: float = key(
        0.0,
        "share of the divergence from the target's distribution; the rest is cross-entropy",
        **SHARE,
    )
    lambda_start: float = key(1.0, "lambda_base of the first step", **SHARE)
    # Over the whole run, as in the paper; the half that `get_lambda_base` has is its own default.
    decay_ratio: float = key(1.0, "share of the steps after which lambda_base is 0", **SHARE)
    # A bound of memory and so of speed: pieces change the order of sums and nothing else.
    logits_mib: float | None = key(
        None,
        "float32 logits that a device holds at once; null: what suits the device",
        unit="MiB",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = key(6e-4, "peak of the learning rate", above=0)
    # Below 1, both of them: what corrects the bias of a mean divides by 1 minus its power.
    b1: float = key(0.9, "decay of the mean of gradients", least=0, below=1)
    b2: float = key(0.95, "decay of the mean of their squares", least=0, below=1)
    weight_decay: float = key(0.0, "decoupled weight decay, of norms too", least=0)
    # Above 0: a bound of 0 would take every gradient away, in silence.
    max_grad_norm: float = key(1.0, "gradients of a larger global norm are scaled down", above=0)
    warmup_ratio: float = key(
        0.04,
        "share of the updates with a rising learning rate, rounded down, at least one update",
        **SHARE,
    )
    min_lr_ratio: float = key(0.1, "last learning rate over the peak", **SHARE)
    grad_accumulation: int = key(
        1, "batches that are added up for one update", unit="batches", **LENGTH
    )
    # Between the ends: 0 is the draft itself, and 1 the draft of step 0 for ever.
    ema_decay: float | None = key(
        None,
        "decay of an average of the draft, which is then exported; null: none",
        above=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length of the run and what happens along the way."""

    epochs: int = key(3, "length of the run where steps is null", unit="epochs", **COUNT)
    steps: int | None = key(None, "length of the run; null: epochs", unit="steps", **COUNT)
    log_every: int = key(10, "steps of one line of metrics.jsonl", unit="steps", **COUNT)
    eval_every: int = key(200, "steps between held-out passes", unit="steps", **COUNT)
    rollout_every: int | None = key(
        None,
        "steps between rollouts, in which the draft drafts and the target verifies; null: never",
        unit="steps",
        **COUNT,
    )
    rollout_prompts: int = key(
        32,
        "conversations of data.eval that a rollout answers, the first ones",
        unit="prompts",
        **COUNT,
    )
    rollout_tokens: int = key(64, "longest answer of a rollout", unit="tokens", **LENGTH)
    checkpoint_every: int = key(200, "steps between checkpoints", unit="steps", **COUNT)
    keep_checkpoints: int = key(2, "newest checkpoints that stay", unit="checkpoints", **COUNT)
    keep_best: str | None = key(
        None,
        "also keep the best checkpoint: heldout, by accept_len, or rollout, by tau; null: do not",
        choices=tuple(BEST_FIGURES),
    )
    # Apart from `steps`, which the schedules are stretched over: a longer run must not bend them.
    extra_steps: int = key(
        0,
        "train so much further once the run has ended, at its last rate and lambda_base",
        unit="steps",
        least=0,
        below=COUNT["below"],
    )
    # Many, and not the first: a single bad batch is no divergence, and is told in any case.
    max_nonfinite_steps: int = key(
        20, "skipped steps in a row that end the run", unit="steps", **COUNT
    )
    tensorboard: bool = key(False, "also write TensorBoard files")
    profile: tuple[int, int] | None = key(
        None,
        "[step, steps]: trace so many steps from that one on into the run's profile/; null: none",
        unit="steps",
        **COUNT,
    )

    def __post_init__(self) -> None:
        """Refuses a run that may not begin."""
        super().__post_init__()
        # Figures belong to a checkpoint: a pass between two of them could keep neither.
        every = self.checkpoint_every
        rollouts = "null" if self.rollout_every is None else self.rollout_every
        require(
            self.keep_best != "heldout" or self.eval_every % every == 0,
            "keep_best needs a checkpoint at each evaluation: eval_every "
            f"{self.eval_every} must be a multiple of checkpoint_every {every}",
        )
        require(
            self.keep_best != "rollout"
            or (self.rollout_every is not None and self.rollout_every % every == 0),
            f"keep_best needs a checkpoint at each rollout: rollout_every {rollouts} must be a "
            f"multiple of checkpoint_every {every}",
        )
        # Its type bounds the entries of a list, not how many there are.
        profile = self.profile
        require(
            profile is None or len(profile) == 2,
            f"profile must be [step, steps], found {shown(list(profile or ()))}",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh."""

    # -1 by default: a configuration need not know the machine that it will run on.
    data: int = key(
        -1,
        "devices that hold the whole draft; -1: those that the other axes leave",
        unit="devices",
        **COUNT,
        special=(-1,),
    )
    fsdp: int = key(1, "devices that share parameters and batch", unit="devices", **COUNT)
    tensor: int = key(1, "devices that share the tensors of a layer", unit="devices", **COUNT)
