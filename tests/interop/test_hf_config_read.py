"""The config.json of other writers: what is read of it, and what is refused."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import CONFIG, PLAIN, SLIDING, WINDOWED, params_of

from domino_jax.base.errors import InputError
from domino_jax.interop.hf import load_hf_draft, save_hf_draft


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((path / "config.json").read_text())
    change(tree)
    (path / "config.json").write_text(json.dumps(tree))


def put(path: str, *, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of config.json: sets the key at a dotted path, or removes it for `...`."""

    def change(tree: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        section = functools.reduce(dict.__getitem__, sections, tree)
        section.pop(key, None)
        if value is not ...:
            section[key] = value

    return change


@pytest.mark.parametrize(
    ("is_causal", "nested", "in_block"),
    [
        (..., ..., "causal"),
        (..., False, "bidirectional"),
        (False, ..., "bidirectional"),
        (True, False, "causal"),
    ],
)
def test_causality_is_read_as_vllm_reads_it(
    is_causal: Any, nested: Any, in_block: str, tmp_path: Path
) -> None:
    save_hf_draft(tmp_path / "draft", WINDOWED, params_of(WINDOWED))
    (tmp_path / "draft" / "SHA256SUMS").unlink()
    edit_config(tmp_path / "draft", put("is_causal", value=is_causal))
    edit_config(tmp_path / "draft", put("dflash_config.causal", value=nested))
    assert load_hf_draft(tmp_path / "draft")[0].sliding_in_block == in_block


def test_a_sliding_layer_that_huggingface_would_read_as_full_is_refused(draft: Path) -> None:
    edit_config(draft, lambda tree: tree.update(layer_types=list(SLIDING), sliding_window=6))
    message = "use_sliding_window is False and sliding_window 6; expected true"
    with pytest.raises(InputError, match=message):
        load_hf_draft(draft)


@pytest.mark.parametrize(
    ("nested", "top", "shifted"),
    [
        ({}, {}, False),
        ({"shift_label": True}, {}, True),
        ({"sample_from_anchor": True}, {}, True),
        ({}, {"sample_from_anchor": True}, True),
        ({"shift_label": False, "sample_from_anchor": False}, {}, False),
    ],
)
def test_a_dflash_draft_may_name_its_layout_either_way(
    nested: dict[str, bool], top: dict[str, bool], shifted: bool, tmp_path: Path
) -> None:
    save_hf_draft(tmp_path / "draft", PLAIN, params_of(PLAIN))
    (tmp_path / "draft" / "SHA256SUMS").unlink()

    def name_it(tree: dict[str, Any]) -> None:
        del tree["dflash_config"]["shift_label"]
        tree["dflash_config"] |= nested
        tree |= top

    edit_config(tmp_path / "draft", name_it)
    assert load_hf_draft(tmp_path / "draft")[0] == dataclasses.replace(PLAIN, shift_label=shifted)


@pytest.mark.pitfall(
    "misspelt or contradicting keys of a draft's config pass silently",
    seen=(
        "interop/hf_config.py: unknown keys of dflash_config passed over; the lists of layers of "
        "other readers not compared; domino_config not read"
    ),
)
@pytest.mark.pitfall(
    "rotary base or partial factor read from the wrong key, or written under one key only",
    seen="interop/hf_config.py: base read at the top alone; partial_rotary_factor accepted",
)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "dflash_config.shift_labels",
            True,
            "dflash_config: unknown key 'shift_labels'; did you mean 'shift_label'",
        ),
        ("dflash_config.markov_rank", 8, "dflash_config: unknown key 'markov_rank'; known: "),
        ("domino_config", {"shift_labels": True}, "domino_config: unknown key 'shift_labels'"),
        ("domino_config", {"gru_hidden_dim": 8}, r"gru_hidden_dim contradicts itself: \[20, 8\]"),
        ("domino_config", [], "domino_config is \\[\\], expected a mapping"),
        ("shift_label", False, "dflash_config.shift_label is true, shift_label is false"),
        ("target_layer_ids", [0, 2, 3], r"target_layer_ids contradicts itself: \[\[0, 2, 4\], "),
        (
            "eagle_aux_hidden_state_layer_ids",
            [0, 2, 4],
            r"eagle_aux_hidden_state_layer_ids is \[0, 2, 4\], expected \[1, 3, 5\]",
        ),
        ("aux_hidden_state_layer_ids", [1, 3], r"expected \[1, 3, 5\]"),
        ("mask_token_id", 118, r"mask_token_id contradicts itself: \[119, 118\]"),
        (
            "dflash_config.target_layer_id_convention",
            "one_based",
            "target_layer_id_convention is 'one_based'; only",
        ),
        ("dflash_config.use_aux_hidden_state", False, "use_aux_hidden_state is False"),
        ("dflash_config.shift_label", "true", "shift_label is 'true'"),
        ("dflash_config.shift_label", 1, "shift_label is 1"),
        ("dflash_config.sample_from_anchor", 1, "sample_from_anchor is 1, expected true or false"),
        (
            "dflash_config.sample_from_anchor",
            False,
            r"dflash_config\.shift_label is true, "
            r"dflash_config\.sample_from_anchor is false: names of one layout",
        ),
        (
            "sample_from_anchor",
            False,
            "shift_label is true, sample_from_anchor is false: names of one layout",
        ),
        ("block_size", 16, r"block_size contradicts itself: \[5, 16\]"),
        ("emb_dim", 13, r"emb_dim contradicts itself: \[12, 13\]"),
        ("rope_theta", 1e6, r"rope_theta contradicts itself: \[1000000\.0, 5000\.0\]"),
        ("dflash_config.mask_token_id", 120, "mask_token_id 120 is outside the vocabulary of 120"),
        ("dflash_config.mask_token_id", -1, "mask_token_id -1 is outside the vocabulary"),
        ("dflash_config.mask_token_id", ..., "mask_token_id is missing"),
        ("dflash_config.mask_token_id", True, "mask_token_id is True"),
        ("dflash_config.gru_hidden_dim", ..., "gru_hidden_dim is missing"),
        (
            "dflash_config.projector_type",
            "eagle",
            "projector_type must be 'domino' or null, found 'eagle'",
        ),
        ("dflash_config.target_layer_ids", ..., "target_layer_ids is missing"),
        ("dflash_config.target_layer_ids", [0, 2, 6], r"target_layer_ids \[0, 2, 6\]"),
        ("dflash_config.target_layer_ids", [0, 2, "4"], r"target_layer_ids is \[0, 2, '4'\]"),
        ("dflash_config.causal", True, "causal is True; only False"),
        ("dflash_config.final_logit_softcapping", -1.0, "final_logit_softcapping must be positive"),
        ("dflash_config.output_multiplier", "2", "output_multiplier is '2'"),
        (
            "layer_types",
            ["full_attention", "linear_attention"],
            r"layer_types holds \['linear_attention'\]",
        ),
        ("layer_types", "full_attention", "layer_types is 'full_attention'; expected a list"),
        ("layer_types", ["full_attention"], "layer_types names 1 layers, num_hidden_layers is 2"),
        ("is_causal", True, "is_causal is true; a block without windows looks both ways"),
        ("dflash_config", ..., "no dflash_config section; is this a DFlash or Domino draft"),
        ("hidden_size", ..., "hidden_size is missing"),
        ("hidden_size", 32.0, r"hidden_size is 32\.0"),
        ("attention_bias", True, "attention_bias is True; only False"),
        ("partial_rotary_factor", 0.25, "partial_rotary_factor is 0.25"),
        ("rope_parameters.partial_rotary_factor", 0.25, "partial_rotary_factor is 0.25"),
        ("rope_parameters.rope_type", "yarn", "rope_scaling: missing factor"),
        ("rope_parameters.rope_type", "dynamic", "rope_type is 'dynamic'"),
        ("rope_parameters", "default", "rope_parameters is 'default'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("layer_types", 5, "layer_types is 5; expected a list"),
        ("num_hidden_layers", "2", "num_hidden_layers is '2'"),
        ("num_hidden_layers", None, "num_hidden_layers is missing"),
        ("num_hidden_layers", 2**62, "num_hidden_layers must be at most 10000"),
        ("hidden_size", 2**63, "hidden_size must be at most 16777216"),
        ("num_target_layers", 2**62, "num_target_layers must be at most"),
        ("rms_norm_eps", 0, "rms_norm_eps must lie between 0 and 1"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps must lie between 0 and 1"),
        ("rms_norm_eps", float("nan"), "NaN is not a number of JSON"),
        ("dflash_config.input_embedding_scale", float("inf"), "Infinity is not a number of JSON"),
        (
            "dflash_config.input_embedding_scale",
            1e300,
            "input_embedding_scale must be positive and finite in float32",
        ),
        ("dflash_config.mask_token_id", "\0" * 10**5, "mask_token_id is '"),
    ],
)
def test_load_refuses_other_configs(draft: Path, key: str, value: Any, message: str) -> None:
    edit_config(draft, put(key, value=value))
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        load_hf_draft(draft)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", ...),  # as the authors publish it
        ("dflash_config.block_size", ...),  # as older NeMo recipes wrote it
        ("emb_dim", ...),
        ("rope_theta", ...),
        ("rope_parameters", ...),
        ("rope_parameters.partial_rotary_factor", 1.0),
        ("layer_types", ...),
        ("architectures", ["Qwen3DFlashDraftModel"]),
        ("dflash_config.causal", ...),
        ("dflash_config.use_aux_hidden_state", True),
        ("dflash_config.target_layer_id_convention", "zero_based_transformer_block_index"),
        ("target_layer_ids", [0, 2, 4]),
        ("mask_token_id", 119),
        ("eagle_aux_hidden_state_layer_ids", [1, 3, 5]),  # as vLLM counts them
        ("aux_hidden_state_layer_ids", [1, 3, 5]),
        ("domino_config", {"shift_label": True, "emb_dim": 12}),
    ],
)
def test_load_accepts_what_other_writers_leave_out(draft: Path, key: str, value: Any) -> None:
    edit_config(draft, put(key, value=value))
    assert load_hf_draft(draft)[0] == CONFIG


def test_a_domino_config_without_shift_label_is_not_shifted(draft: Path) -> None:
    """As SpecForge and NeMo read it."""
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    edit_config(draft, put("dflash_config.shift_label", value=...))
    assert load_hf_draft(draft)[0] == dataclasses.replace(CONFIG, shift_label=False)
    assert Qwen3DFlashDraftModel.from_pretrained(draft).shift_label is False


def test_the_head_may_be_described_in_domino_config(draft: Path) -> None:
    """As newer SpecForge configs do."""

    def move(tree: dict[str, Any]) -> None:
        names = ("pure_draft_prefix_len", "emb_dim", "gru_hidden_dim", "shift_label")
        tree["domino_config"] = {name: tree["dflash_config"].pop(name) for name in names}
        del tree["emb_dim"]

    edit_config(draft, move)
    assert load_hf_draft(draft)[0] == CONFIG


@pytest.mark.parametrize("layers", [1, 3, 9999])
def test_load_refuses_another_depth_before_it_builds_a_model(
    draft: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("domino_jax.interop.hf._parameter_shapes", built)
    edit_config(draft, put("num_hidden_layers", value=layers))
    edit_config(draft, put("layer_types", value=...))
    message = f"tensors of 2 layers, config.json says num_hidden_layers {layers}"
    with pytest.raises(InputError, match=message):
        load_hf_draft(draft)


def test_load_takes_a_missing_pure_prefix_as_none(draft: Path) -> None:
    edit_config(draft, put("dflash_config.pure_draft_prefix_len", value=...))
    assert load_hf_draft(draft)[0].pure_draft_prefix_len == 0  # NeMo's default too
