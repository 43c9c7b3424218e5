"""The settings of a run: what is read, what is refused and in which words."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trees import DECODER, LLAMA3, SMALLEST

from domino_jax.base.errors import InputError, from_dict
from domino_jax.config.draft import DraftRecipe, make_draft_config
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.config.run import RunConfig, dump_config, load_config
from domino_jax.config.schema import described


def test_load_config_fills_defaults(smallest: Path) -> None:
    config = load_config(smallest)
    assert config.draft == DraftRecipe(mask_token_id=5)
    optimizer, loss = config.optimizer, config.loss
    rates = (optimizer.learning_rate, optimizer.warmup_ratio, optimizer.min_lr_ratio)
    assert rates == (6e-4, 0.04, 0.1)
    adamw = (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.max_grad_norm)
    assert adamw == (0.9, 0.95, 0.0, 1.0)
    assert (loss.num_anchors, loss.lambda_start, loss.decay_ratio) == (512, 1.0, 1.0)
    assert config.train.steps is None and config.data.eval is None


def test_load_config_overrides_one_name_of_a_mapping(smallest: Path) -> None:
    key, told = "data.chat_template_kwargs", {"enable_thinking": False, "budget": 64}
    assert load_config(smallest).data.chat_template_kwargs == {}
    words = [f"{key}.enable_thinking=false", f"{key}.budget=64"]
    config = load_config(smallest, words)
    assert config.data.chat_template_kwargs == told
    assert load_config(smallest, [*words, f"{key}={{}}"]) == load_config(smallest)
    assert yaml.safe_load(dump_config(config))["data"]["chat_template_kwargs"] == told


def test_load_config_names_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/x\n")
    with pytest.raises(InputError, match=r"run\.yaml: missing target, data$"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("train: [1,\nmesh: }\n", "not valid YAML"),
        ("- 1\n", "expected a mapping of settings, found list"),
        ("# nothing\n", "expected a mapping of settings, found NoneType"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: the key 'seed' is given twice"),
        ("#" * 2**21, "2097152 bytes, expected at most 1048576"),
    ],
)
def test_load_config_refuses_files_in_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


# What a key may be, as its message tells it, and overrides that it is not.
REFUSED = {
    "at least 0 and below 2**32": ("seed=-1", "seed=4294967296"),
    "one of float32, bfloat16": ("dtype=float16",),
    "at least 1 and below 2**24": (
        *("data.max_length=0", "data.batch_size=0", f"data.batch_size={2**62}"),
        *("draft.num_hidden_layers=0", "draft.block_size=0", f"draft.block_size={2**63}"),
        *("loss.num_anchors=0", "optimizer.grad_accumulation=0"),
    ),
    "in 1..2**24 or null": ("draft.head_dim=0", f"draft.head_dim={2**63}"),
    "in 0..2**24 or null": [f"draft.target_layer_ids=[0, {layer}]" for layer in (-1, 10**63)],
    "one of bidirectional, causal": ("draft.sliding_in_block=forward",),
    "one of nemo, specforge": ("loss.anchor_rule=zlab",),
    "in 0..1": (
        *("loss.lambda_start=1.5", "loss.decay_ratio=-0.1", "loss.kl_weight=-1"),
        *("optimizer.warmup_ratio=2", "optimizer.min_lr_ratio=-1"),
    ),
    "above 0 or one of default or null": ("loss.loss_decay_gamma=0",),
    "above 0 or null": ("loss.logits_mib=0", "draft.final_logit_softcapping=0"),
    "above 0": (
        *("optimizer.learning_rate=0", "optimizer.max_grad_norm=0"),
        *("draft.output_multiplier=0", "draft.input_embedding_scale=-1"),
    ),
    "at least 0 and below 1": ("optimizer.b1=1", "optimizer.b2=-0.1"),
    "at least 0": ("optimizer.weight_decay=-0.1",),
    "above 0 and below 1 or null": ("optimizer.ema_decay=1",),
    "at least 1 and below 2**31": (
        *("train.epochs=0", "train.log_every=0", "train.eval_every=0"),
        *("train.max_nonfinite_steps=0", "train.checkpoint_every=0", "train.keep_checkpoints=0"),
        *("mesh.fsdp=0", "mesh.tensor=-1"),
    ),
    "at least 1 and below 2**31 or null": (
        *("train.steps=0", f"train.steps={2**31}", f"train.profile=[1, {2**63}]"),
        *("train.profile=[0, 2]", "train.profile=[1, 0]"),
    ),
    "-1 or at least 1 and below 2**31": ("mesh.data=0", f"mesh.data={2**63}"),
}


@pytest.mark.parametrize(
    ("override", "bounds"),
    [(override, bounds) for bounds, overrides in REFUSED.items() for override in overrides],
)
def test_a_key_out_of_bounds_is_named_with_them(smallest: Path, override: str, bounds: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(smallest, [override])
    key = override.partition("=")[0].replace(".", ": ")
    assert str(caught.value).startswith(f"{smallest}: {key} must be {bounds}, found ")


def test_every_key_says_what_it_means() -> None:
    keys = list(described(RunConfig))
    assert len(keys) > 50 and len({one.name for one in keys}) == len(keys)
    for one in keys:
        assert one.key.meaning and not one.key.meaning.endswith("."), one.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=16", "data.max_length 16 must exceed draft.block_size 16"),
        ("train.keep_best=heldout", "train.keep_best is 'heldout', but data.eval is missing"),
        ("train.rollout_every=5", "train.rollout_every is 5, but data.eval is missing"),
    ],
)
def test_run_config_refuses(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(smallest, [override])
    assert str(caught.value).startswith(f"{smallest}: {message}")


def test_make_draft_config_takes_the_rest_from_the_target() -> None:
    deep = {"num_hidden_layers": 36, "rope_theta": 1e6, "tie_word_embeddings": True}
    target = DecoderConfig(**DECODER | deep)
    recipe = DraftRecipe(mask_token_id=31)
    draft = make_draft_config(recipe, target, special_ids={2: "eos"}, dtype="bfloat16")
    own = {"num_hidden_layers": 5, "rope_theta": 1e6, "block_size": 16, "mask_token_id": 31}
    assert draft == DraftConfig(
        **DECODER | own,
        dtype="bfloat16",
        num_target_layers=36,
        target_layer_ids=(1, 9, 17, 25, 33),
        pure_draft_prefix_len=1,
        shift_label=True,
    )
    assert draft.qk_norm
    recipe = DraftRecipe(mask_token_id=31, target_layer_ids=(0, 7))
    chosen = make_draft_config(recipe, target, special_ids={}, dtype="float32")
    assert chosen.target_layer_ids == (0, 7)


def test_make_draft_config_of_other_drafts() -> None:
    target = DecoderConfig(**DECODER | {"num_hidden_layers": 36})

    def made(**fields: Any) -> DraftConfig:
        recipe = DraftRecipe(mask_token_id=31, num_hidden_layers=2, **fields)
        return make_draft_config(recipe, target, special_ids={}, dtype="float32")

    plain = made(projector_type=None)  # shift_label follows the head
    assert (plain.projector_type, plain.shift_label) == (None, False)
    assert not made(shift_label=False).shift_label
    assert made(projector_type=None, shift_label=True).shift_label
    windowed = made(sliding_window=32)
    assert (windowed.sliding_window, windowed.layer_types) == (32, ("sliding_attention",) * 2)
    types = ("full_attention", "sliding_attention")
    mixed = made(sliding_window=32, layer_types=types, sliding_in_block="causal")
    assert (mixed.layer_types, mixed.sliding_in_block) == (types, "causal")


def test_make_draft_config_is_dense_and_without_biases_below_any_target() -> None:
    plain = DecoderConfig(**DECODER | {"num_hidden_layers": 36, "rope_scaling": LLAMA3})
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    mixture["norm_topk_prob"] = True
    recipe = DraftRecipe(mask_token_id=31)
    expected = make_draft_config(recipe, plain, special_ids={}, dtype="float32")
    assert expected.rope_scaling == LLAMA3
    for change in (mixture, {"attention_bias": True}):
        target = dataclasses.replace(plain, **change)
        assert make_draft_config(recipe, target, special_ids={}, dtype="float32") == expected


@pytest.mark.pitfall(
    "mask token aliases eos, pad or bos, or changes on resume or import",
    seen="config/run.py: special tokens not compared",
)
def test_make_draft_config_refuses_what_does_not_fit_the_target() -> None:
    target = DecoderConfig(**DECODER | {"num_hidden_layers": 36})
    for token, layers, message in (
        (2, None, "draft.mask_token_id 2 is the target's pad token"),
        (3, None, "draft.mask_token_id 3 is the target's stop token"),
        (
            None,
            None,
            "draft.mask_token_id is missing, and only the target's tokenizer shows which id is "
            "unused; give draft.mask_token_id, or the tokenizer's files beside config.json",
        ),
        (32, None, "mask_token_id 32 is outside the vocabulary of 32"),
        (31, (), "target_layer_ids [] must lie in 0..35"),
        (31, (36,), "target_layer_ids [36] must lie in 0..35"),
    ):
        recipe = DraftRecipe(mask_token_id=token, target_layer_ids=layers)
        with pytest.raises(InputError) as caught:
            make_draft_config(recipe, target, special_ids={2: "pad", 3: "stop"}, dtype="float32")
        assert str(caught.value) == message


# What every file may hold: no NUL, no half of a surrogate pair.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(rate=st.floats(1e-12, 1e3), steps=st.none() | st.integers(1, 10**9), target=TEXT)
def test_dump_config_round_trips_any_value(rate: float, steps: int | None, target: str) -> None:
    sections = {"optimizer": {"learning_rate": rate}, "train": {"steps": steps}}
    tree = SMALLEST | sections | {"target": target}
    config = from_dict(RunConfig, tree, source="given")
    assert from_dict(RunConfig, yaml.safe_load(dump_config(config)), source="dumped") == config


def test_configs_have_a_hash(smallest: Path) -> None:
    """Modules and jit need one; only frozen dataclasses have it."""
    assert hash(load_config(smallest)) == hash(load_config(smallest))
