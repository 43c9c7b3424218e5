"""What other programs would misread in a draft: the reasons not to export it for them.

An engine drops what it does not know of a draft without a word (a head, a window, a scaled logit),
and the draft is accepted less than it was trained to be. So each reason is a rule here, which looks
at the config of a draft alone: no weight is read.
"""

from domino_jax.config.model import SLIDING_ATTENTION, DraftConfig

ENGINES = ("sglang", "vllm", "nemo", "specforge", "zlab")


def engine_refusals(config: DraftConfig, engine: str, *, dtype: str = "bfloat16") -> list[str]:
    """The reasons why an engine would draft other tokens than this draft was trained to.

    Only what a `DraftConfig` can hold and an engine cannot is asked here.

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
    head = config.projector_type
    domino = head == "domino"
    prefix = config.pure_draft_prefix_len
    last = config.num_target_layers - 1
    reads_last = last in config.target_layer_ids
    last_read = f"target_layer_ids ends with the last layer, {last}"
    unnormed = "before the target's final norm, this draft was trained on it after"
    sliding = SLIDING_ATTENTION in config.attention_types
    refusals = []

    def refuse(engines: tuple[str, ...], holds: bool, found: str, reason: str) -> None:
        if engine in engines and holds:
            refusals.append(f"{found}: {reason}")

    refuse(
        ENGINES,
        head not in (None, "domino"),
        f"projector_type is {head}",
        "it does not know this head and would draft without it",
    )
    refuse(
        ("vllm", "zlab"),
        domino,
        "projector_type is domino",
        "it knows DFlash only and would draft without the head",
    )
    refuse(
        ("vllm", "zlab"),
        domino and config.shift_label,
        "shift_label is true",
        "without its head the backbone is misaligned, block position 0 already predicts anchor + 1",
    )
    # Those that do know sample_from_anchor, speculators and sglang-jax, are none of `ENGINES`.
    refuse(
        ENGINES,
        head is None and config.shift_label,
        "shift_label is true",
        "it drafts plain DFlash from the second position of a block on and does not know "
        "sample_from_anchor, block position 0 already predicts anchor + 1",
    )
    refuse(
        ("sglang", "vllm", "zlab"),
        config.block_size == 1,
        "block_size is 1",
        "it proposes K - 1 tokens per cycle, none of such a block",
    )
    refuse(
        ("sglang",),
        domino and prefix != 1,
        f"pure_draft_prefix_len is {prefix}",
        "its rollout starts to correct at the second token; expected 1",
    )
    refuse(
        ("sglang",),
        domino and dtype != "bfloat16",
        f"dtype is {dtype}",
        "its Domino head runs in bfloat16 only",
    )
    refuse(("sglang", "vllm"), reads_last, last_read, f"it takes that layer {unnormed}")
    refuse(
        ("nemo",),
        reads_last,
        last_read,
        f"its trainer takes that layer {unnormed}, "
        "only its spec_generate reads what this draft does",
    )
    refuse(
        ("nemo",),
        sliding and config.sliding_in_block == "causal",
        "sliding_in_block is causal",
        "it never reads is_causal and looks both ways inside the block",
    )
    refuse(
        ("specforge",),
        sliding and config.sliding_in_block == "bidirectional",
        "sliding_in_block is bidirectional",
        "it looks only back inside the block of a sliding layer",
    )
    for name in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
        value = getattr(config, name)
        # 1 and None scale and cap nothing.
        refuse(
            ("sglang", "vllm", "specforge"),
            value not in (1.0, None),
            f"{name} is {value}",
            "it does not apply it to the draft",
        )
    return refusals


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
