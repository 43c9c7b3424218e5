"""Each reader's refusals by name, and what `domino export --for` makes of them."""

import dataclasses
import re
from typing import Any

import pytest
from reference import dflash_config, draft_config

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DraftConfig
from domino_jax.interop.engines import ENGINES, engine_refusals, proposals_note

SLIDING = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 6}
CAUSAL = {**SLIDING, "sliding_in_block": "causal"}
HEADLESS = "projector_type is domino: it knows DFlash only and would draft without the head"
SHIFTED = (
    "shift_label is true: without its head the backbone is misaligned, "
    "block position 0 already predicts anchor + 1"
)
BOTH_WAYS = "sliding_in_block is bidirectional: it looks only back"
ONLY_BACK = "sliding_in_block is causal: it never reads is_causal"
ANCHOR_FIRST = "shift_label is true: it drafts plain DFlash from the second position of a block on"
UNNORMED = (
    "target_layer_ids ends with the last layer, 5: "
    "it takes that layer before the target's final norm"
)
UNNORMED_IN_TRAINING = UNNORMED.replace("it takes", "its trainer takes")
PLAIN_LOGITS = ("sglang", "vllm", "specforge")
TRANSFORMS = {
    "input_embedding_scale is 2.0": {"input_embedding_scale": 2.0},
    "output_multiplier is 0.5": {"output_multiplier": 0.5},
    "final_logit_softcapping is 20.0": {"final_logit_softcapping": 20.0},
}

# Draft -> how the reasons of each engine begin; an engine that is not named takes the draft.
CASES: list[tuple[str, DraftConfig, dict[str, list[str]]]] = [
    ("dflash", dflash_config(), {}),
    ("domino", draft_config(), {"vllm": [HEADLESS, SHIFTED], "zlab": [HEADLESS, SHIFTED]}),
    (
        "dflash shifted",
        dataclasses.replace(dflash_config(), shift_label=True),
        {engine: [ANCHOR_FIRST] for engine in ENGINES},
    ),
    ("domino unshifted", draft_config(shift_label=False), {"vllm": [HEADLESS], "zlab": [HEADLESS]}),
    (
        "no pure prefix",
        draft_config(pure_draft_prefix_len=0),
        {
            "vllm": [HEADLESS, SHIFTED],
            "zlab": [HEADLESS, SHIFTED],
            "sglang": [
                "pure_draft_prefix_len is 0: its rollout starts to correct at the second token; "
                "expected 1"
            ],
        },
    ),
    (
        "last target layer",
        dataclasses.replace(dflash_config(), target_layer_ids=(0, 5)),
        {"sglang": [UNNORMED], "vllm": [UNNORMED], "nemo": [UNNORMED_IN_TRAINING]},
    ),
    ("window", dflash_config(**SLIDING), {"specforge": [BOTH_WAYS]}),
    ("causal window", dflash_config(**CAUSAL), {"nemo": [ONLY_BACK]}),
    ("causal without a window", dflash_config(sliding_in_block="causal"), {}),
    *(
        (
            found,
            dflash_config(**changes),
            {engine: [f"{found}: it does not apply"] for engine in PLAIN_LOGITS},
        )
        for found, changes in TRANSFORMS.items()
    ),
    (
        "all at once",
        dflash_config(**CAUSAL, input_embedding_scale=2.0, output_multiplier=0.5),
        {
            "nemo": [ONLY_BACK],
            **{
                engine: ["input_embedding_scale is 2.0", "output_multiplier is 0.5"]
                for engine in PLAIN_LOGITS
            },
        },
    ),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("config", "reasons"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_refusals_name_what_was_found_and_what_the_reader_does(
    config: DraftConfig, reasons: dict[str, list[str]], engine: str
) -> None:
    found = engine_refusals(config, engine)
    expected = reasons.get(engine, [])
    assert len(found) == len(expected), found
    for reason, begin in zip(found, expected, strict=True):
        assert reason.startswith(begin)


def test_sglang_takes_a_domino_head_in_bfloat16_only() -> None:
    assert engine_refusals(draft_config(), "sglang", dtype="float32") == [
        "dtype is float32: its Domino head runs in bfloat16 only"
    ]
    assert not engine_refusals(draft_config(), "sglang", dtype="bfloat16")
    # Cast to the server's type.
    assert not engine_refusals(dflash_config(), "sglang", dtype="float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherHead(DominoHeadConfig):
    """A head of one's own."""

    projector_type = "other"


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_takes_a_head_that_it_does_not_know(engine: str) -> None:
    config = draft_config(head=OtherHead(emb_dim=8), shift_label=False)
    assert engine_refusals(config, engine) == [
        "projector_type is other: it does not know this head and would draft without it"
    ]


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(ValueError, match="sglang, vllm, nemo, specforge, zlab, found 'tgi'"):
        engine_refusals(dflash_config(), "tgi")


FOUR = r"proposes 4 tokens per cycle \(K - 1\)"


@pytest.mark.parametrize(
    ("engine", "config", "note"),
    [
        ("sglang", draft_config(), f"{FOUR}; this draft predicts 5: --proposals"),
        ("sglang", draft_config(shift_label=False), f"^sglang {FOUR}$"),
        ("zlab", dflash_config(block_size=8), r"^zlab proposes 7 tokens per cycle \(K - 1\)$"),
        ("nemo", dflash_config(), f"^nemo {FOUR}$"),
        ("nemo", draft_config(), f"{FOUR}, without the Domino head and one position late: its tra"),
        ("nemo", draft_config(shift_label=False), f"{FOUR}, without the Domino head: its trainer"),
    ],
)
def test_the_note_says_what_the_reader_will_propose(engine: str, config: Any, note: str) -> None:
    assert re.search(note, proposals_note(config, engine))
