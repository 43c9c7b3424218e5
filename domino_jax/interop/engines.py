"""What other programs would misread in a draft: the reasons not to export it for them.

An engine drops what it does not know of a draft without a word (a head, a window, a scaled logit),
and the draft is accepted less than it was trained to be. So each reason is a rule here, which looks
at the config of a draft alone: no weight is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from domino_jax.config.model import SLIDING_ATTENTION, DraftConfig

ENGINES = ("sglang", "vllm", "nemo", "specforge", "zlab")


@dataclass(frozen=True)
class _Rule:
    """Engines that misread a draft for which `found` returns what it found."""

    engines: tuple[str, ...]
    found: Callable[[DraftConfig, str], str | None]
    reason: str


def engine_refusals(config: DraftConfig, engine: str, *, dtype: str = "bfloat16") -> list[str]:
    """The reasons why an engine would draft other tokens than this draft was trained to.

    Vocabulary and depth are those of the target, integers and booleans are such, and both
    `emb_dim`s and `block_size`s are equal in every export; only what a `DraftConfig` can hold and
    an engine cannot is asked here.

    The target's last layer is read after the final norm here, in z-lab's dflash, in NeMo's
    `spec_generate` and with SpecForge's Hugging Face backend: all take `hidden_states[id + 1]`.
    Before the norm it is taken by vLLM (`hidden_states + residual` after the layer), by SGLang (the
    same, where the model has that place at all) and by NeMo's trainer (a hook on the layer).

    A plain DFlash draft with `shift_label` is for readers of `sample_from_anchor`: speculators, and
    sglang-jax with `--speculative-sample-from-anchor`. vLLM's DFlash refuses the key (#54154 is to
    read it), SGLang's passes over it (#40203 likewise), the others do not have it.

    Args:
        config: the draft.
        engine: one of `ENGINES`.
        dtype: type of the exported tensors.
    Returns:
        One reason per line, what was found and what the engine does; empty where it reads the draft
        as it is meant.
    Raises:
        ValueError: another engine.
    Source: SGLang of 2026-08 (#34524, #36899, #32204), vLLM of 2026-08 (`qwen3_dflash.py`, #46788),
        NeMo AutoModel 0.7.0 (`HFDFlashTargetModel`), SpecForge 0.2.0 (`DFlashCapturePolicy`),
        z-lab's dflash 0.1.0.
    """
    # Not an `InputError`: the command line offers these names alone, so a script is wrong here.
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, found {engine!r}")
    rules = [rule for rule in _RULES if engine in rule.engines]
    return [
        f"{found}: {rule.reason}"
        for rule in rules
        if (found := rule.found(config, dtype)) is not None
    ]


def proposals_note(config: DraftConfig, engine: str) -> str:
    """How many tokens the engine will propose per cycle, and what of the draft it leaves unused.

    Args:
        config: the draft.
        engine: one of `ENGINES`; all of them verify one block, whose first token is already known.
    """
    note = f"{engine} proposes {config.block_size - 1} tokens per cycle (K - 1)"
    # A note and no refusal: what trains a draft further loses nothing of it.
    if engine == "nemo" and config.projector_type == "domino":
        shifted = " and one position late" if config.shift_label else ""
        return (
            f"{note}, without the Domino head{shifted}: its trainer reads the whole draft, "
            "its spec_generate does not"
        )
    if config.shift_label:
        return (
            f"{note}; this draft predicts {config.block_size}: "
            f"--proposals serving measures what {engine} will do"
        )
    return note


def _when(
    holds: Callable[[DraftConfig], bool], found: str
) -> Callable[[DraftConfig, str], str | None]:
    return lambda config, _: found if holds(config) else None


def _sliding(in_block: str) -> Callable[[DraftConfig, str], str | None]:
    return _when(
        lambda config: (
            SLIDING_ATTENTION in config.attention_types and config.sliding_in_block == in_block
        ),
        f"sliding_in_block is {in_block}",
    )


def _transform(name: str) -> Callable[[DraftConfig, str], str | None]:
    def found(config: DraftConfig, _: str) -> str | None:
        value = getattr(config, name)
        # 1 and None scale and cap nothing.
        return None if value in (1.0, None) else f"{name} is {value}"

    return found


def _last_layer(config: DraftConfig, _: str) -> str | None:
    # Ids rise, so only the last of them can be it.
    last = config.num_target_layers - 1
    layers = config.target_layer_ids
    return f"target_layer_ids ends with the last layer, {last}" if last in layers else None


def _other_prefix(config: DraftConfig, _: str) -> str | None:
    prefix = config.pure_draft_prefix_len
    return (
        f"pure_draft_prefix_len is {prefix}"
        if config.projector_type == "domino" and prefix != 1
        else None
    )


def _unknown_head(config: DraftConfig, _: str) -> str | None:
    name = config.projector_type
    return None if name in (None, "domino") else f"projector_type is {name}"


def _other_dtype(config: DraftConfig, dtype: str) -> str | None:
    return (
        f"dtype is {dtype}" if config.projector_type == "domino" and dtype != "bfloat16" else None
    )


def _no_proposal(config: DraftConfig, _: str) -> str | None:
    return "block_size is 1" if config.block_size == 1 else None


_UNNORMED = "before the target's final norm, this draft was trained on it after"

# As the versions do that `engine_refusals` names: a later one may read what is refused here.
_RULES = (
    _Rule(ENGINES, _unknown_head, "it does not know this head and would draft without it"),
    _Rule(
        ("vllm", "zlab"),
        _when(lambda config: config.projector_type == "domino", "projector_type is domino"),
        "it knows DFlash only and would draft without the head",
    ),
    _Rule(
        ("vllm", "zlab"),
        _when(
            lambda config: config.shift_label and config.projector_type == "domino",
            "shift_label is true",
        ),
        "without its head the backbone is misaligned, block position 0 already predicts anchor + 1",
    ),
    # Those that do know sample_from_anchor, speculators and sglang-jax, are none of `ENGINES`.
    _Rule(
        ENGINES,
        _when(
            lambda config: config.shift_label and config.projector_type is None,
            "shift_label is true",
        ),
        "it drafts plain DFlash from the second position of a block on and does not know "
        "sample_from_anchor, block position 0 already predicts anchor + 1",
    ),
    _Rule(
        ("sglang", "vllm", "zlab"),
        _no_proposal,
        "it proposes K - 1 tokens per cycle, none of such a block",
    ),
    _Rule(
        ("sglang",), _other_prefix, "its rollout starts to correct at the second token; expected 1"
    ),
    _Rule(("sglang",), _other_dtype, "its Domino head runs in bfloat16 only"),
    _Rule(("sglang", "vllm"), _last_layer, f"it takes that layer {_UNNORMED}"),
    _Rule(
        ("nemo",),
        _last_layer,
        f"its trainer takes that layer {_UNNORMED}, "
        "only its spec_generate reads what this draft does",
    ),
    _Rule(
        ("nemo",),
        _sliding("causal"),
        "it never reads is_causal and looks both ways inside the block",
    ),
    _Rule(
        ("specforge",),
        _sliding("bidirectional"),
        "it looks only back inside the block of a sliding layer",
    ),
    *(
        _Rule(
            ("sglang", "vllm", "specforge"), _transform(name), "it does not apply it to the draft"
        )
        for name in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
    ),
)
