"""The strict loader: what it reads, what it refuses and in which words."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from domino_jax.config.model import (
    SIZE_LIMIT,
    SIZE_LIMITS,
    DecoderConfig,
    DraftConfig,
    RopeScaling,
    default_target_layer_ids,
    draft_from_tree,
    draft_tree,
)
from domino_jax.config.run import (
    DraftRecipe,
    RunConfig,
    dump_config,
    load_config,
    make_draft_config,
)
from domino_jax.strict import InputError, from_tree

SMALLEST: dict[str, Any] = {
    "run_dir": "runs/x",
    "target": "smollm2-135m-instruct",
    "draft": {"mask_token_id": 5},
    "data": {"train": "train.jsonl"},
}
DECODER: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
DRAFT: dict[str, Any] = DECODER | {
    "block_size": 4,
    "mask_token_id": 31,
    "num_target_layers": 6,
    "target_layer_ids": (1, 3),
}


SLIDING = ("sliding_attention",) * DECODER["num_hidden_layers"]


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_load_config_fills_defaults(smallest: Path) -> None:
    config = load_config(smallest)
    assert config.draft == DraftRecipe(mask_token_id=5)
    assert (config.optimizer.learning_rate, config.optimizer.b2, config.train.steps) == (
        6e-4,
        0.95,
        None,
    )
    assert config.data.heldout is None


def test_load_config_applies_overrides_in_order(smallest: Path) -> None:
    words = [
        "train.steps=7",
        "train.steps=9",
        "optimizer.learning_rate=1e-3",
        "draft.target_layer_ids=[1, 3]",
    ]
    config = load_config(
        smallest,
        [*words, "data.heldout=held=out.jsonl", "draft.projector_type=null", "dtype=float32"],
    )
    assert config.train.steps == 9
    assert config.optimizer.learning_rate == 1e-3
    assert config.draft.target_layer_ids == (1, 3)
    assert config.draft.projector_type is None
    assert config.data.heldout == "held=out.jsonl"
    assert config.dtype == "float32"
    assert load_config(smallest) == from_tree(RunConfig, SMALLEST, place="smallest"), (
        "overrides must not stick"
    )


def test_load_config_overrides_one_name_of_a_mapping(smallest: Path, tmp_path: Path) -> None:
    assert load_config(smallest).data.chat_template_kwargs == {}
    words = [
        "data.chat_template_kwargs.enable_thinking=false",
        "data.chat_template_kwargs.budget=64",
    ]
    config = load_config(smallest, words)
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "budget": 64}
    assert load_config(smallest, [*words, "data.chat_template_kwargs={}"]) == load_config(smallest)
    assert load_config(write(tmp_path / "again.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("'1e-3'", 1e-3), ("2", 2.0), ("0.5", 0.5), ("1E-4", 1e-4)],
)
def test_load_config_reads_every_spelling_of_a_float(
    smallest: Path, text: str, value: float
) -> None:
    rate = load_config(smallest, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate
    assert isinstance(rate, float) and rate == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rat=1",
            "optimizer: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("optimiser.b1=0.9", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("mesh.zzz=1", "mesh: unknown key 'zzz'; known: data, fsdp, tensor"),
        ("train.=1", "train: unknown key ''"),
        ("train.steps=many", "train: steps: expected int, found 'many'"),
        ("train.epochs=1.0", "train: epochs: expected int, found 1.0"),
        ("train.epochs=true", "train: epochs: expected int, found True"),
        ("train.epochs=null", "train: epochs: expected int, found None"),
        ("train.tensorboard=1", "train: tensorboard: expected bool, found 1"),
        ("train.profile=[3]", "train: profile must be [step, steps], both at least 1, found [3]"),
        ("train.profile=[1, 2, 3]", "train: profile must be [step, steps], both at least 1, found"),
        ("train.profile=[0, 2]", "train: profile must be [step, steps], both at least 1, found"),
        ("train.profile=[1, 0]", "train: profile must be [step, steps], both at least 1, found"),
        ("train.profile=[]", "train: profile must be [step, steps], both at least 1, found []"),
        ("train.profile=[1, x]", "train: profile: expected int, found 'x'"),
        ("train.profile=3", "train: profile: expected a list, found 3"),
        ("optimizer.learning_rate=fast", "optimizer: learning_rate: expected float, found 'fast'"),
        ("optimizer.learning_rate=.nan", "optimizer: learning_rate: expected float, found nan"),
        ("optimizer.learning_rate=inf", "optimizer: learning_rate: expected float, found 'inf'"),
        ("optimizer.learning_rate=true", "optimizer: learning_rate: expected float, found True"),
        (
            f"optimizer.learning_rate=1{'0' * 400}",
            "not valid YAML: line 1, column 1: a number of 401 characters",
        ),
        (
            "optimizer.learning_rate=1e300",
            "learning_rate: '1e300' is not a number that float32 holds",
        ),
        (
            "optimizer.weight_decay=1e-300",
            "weight_decay: '1e-300' is not a number that float32 holds",
        ),
        ("run_dir=2001-99-99x\0", "special characters are not allowed"),
        ('run_dir="a\\0b"', "run_dir: 'a\\x00b' holds a NUL character"),
        ('run_dir="\\ud800"', "run_dir: '\\ud800' is not valid Unicode"),
        ("train.steps=0x_", "train: steps: expected int, found '0x_'"),
        ("train.steps=010", "train: steps: expected int, found '010'"),
        ("train.steps=1:30", "train: steps: expected int, found '1:30'"),
        ("train.steps=2001-99-99", "train: steps: expected int, found '2001-99-99'"),
        ("train.steps=!!int a", "tags ('tag:yaml.org,2002:int') are not read"),
        ("train=" + "[" * 3000, "more than 64 levels of lists and mappings"),
        (
            "data.chat_template_kwargs=" + "{a: " * 70 + "}" * 70,
            "more than 64 levels of lists and mappings",
        ),
        ("data.chat_template_kwargs" + ".a" * 70 + "=1", "a key of 72 parts, expected at most 64"),
        ("train={steps: 1, steps: 2}", "the key 'steps' is given twice"),
        ("train=&a {steps: 1}\nx: *a", "not valid YAML"),
        ("draft.target_layer_ids=[&a 1, *a]", "aliases (*name) are not read"),
        ("train.steps=" + "x" * 10**6, "train: steps: expected int, found 'xxx"),
        ("run_dir=2024", "run_dir: expected str, found 2024"),
        ("draft.target_layer_ids=3", "draft: target_layer_ids: expected a list, found 3"),
        ("draft.target_layer_ids=[1, x]", "draft: target_layer_ids: expected int, found 'x'"),
        ("mesh=3", "mesh: expected a mapping, found 3"),
        (
            "data.chat_template_kwargs=false",
            "data: chat_template_kwargs: expected a mapping, found False",
        ),
        (
            "data.chat_template_kwargs.enable_thinking=[no]",
            "data: chat_template_kwargs: enable_thinking: expected true, false, a number or text, "
            "found [False]",
        ),
        ("train.steps", "override 'train.steps': expected key=value, for example train.steps=100"),
        ("=3", "override '=3': expected key=value"),
        (
            "train.steps=[1",
            "override 'train.steps=[1': not valid YAML: line 1, column 3: expected ',' or ']'",
        ),
        ("run_dir.x=1", "override 'run_dir.x=1': 'run_dir' is a value, not a section"),
    ],
)
def test_load_config_refuses_bad_override(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(smallest, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_config_names_missing_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "run_dir: runs/x\ndraft: {}\n")
    with pytest.raises(InputError, match=r"run\.yaml: draft: missing mask_token_id$"):
        load_config(path)
    with pytest.raises(InputError, match=r"run\.yaml: missing target, data$"):
        load_config(path, ["draft.mask_token_id=5"])


def test_load_config_refuses_unreadable_files_in_one_line(tmp_path: Path) -> None:
    cases = {
        tmp_path / "absent.yaml": "No such file",
        tmp_path: "directory",
        write(tmp_path / "syntax.yaml", "train: [1,\nmesh: }\n"): "not valid YAML",
        write(tmp_path / "twice.yaml", "a: 1\n b: 2\n"): "not valid YAML",
        write(tmp_path / "list.yaml", "- 1\n"): "expected a mapping of settings, found list",
        write(
            tmp_path / "empty.yaml", "# nothing\n"
        ): "expected a mapping of settings, found NoneType",
        write(
            tmp_path / "double.yaml", "seed: 1\nseed: 2\n"
        ): "line 2, column 1: the key 'seed' is given twice",
        write(tmp_path / "large.yaml", "#" * 2**21): "2097152 bytes, expected at most 1048576",
    }
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00run")
    for path, message in (cases | {binary: "not UTF-8 text"}).items():
        with pytest.raises(InputError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must lie in 0..2**32-1, found -1"),
        ("seed=4294967296", "seed must lie in 0..2**32-1, found 4294967296"),
        (
            f"data.batch_size={2**62}",
            "data.batch_size must be below 16777216, found 4611686018427387904",
        ),
        (f"draft.block_size={2**63}", "draft: block_size must be at most 16777216"),
        (f"draft.head_dim={2**63}", "draft: head_dim must be at most 16777216"),
        (
            f"draft.target_layer_ids=[0, {10**63}]",
            "draft: target_layer_ids must be at most 16777216",
        ),
        (f"train.steps={2**31}", "train.steps must be below 2147483648"),
        (f"mesh.data={2**63}", "mesh.data must be below 2147483648"),
        (f"train.max_bad_steps={2**63}", "train: max_bad_steps must be at least 1"),
        (f"train.profile=[1, {2**63}]", "train: profile must be [step, steps]"),
        ("dtype=float16", "dtype must be float32 or bfloat16, found 'float16'"),
        ("data.max_length=0", "data.max_length must be at least 1, found 0"),
        ("data.batch_size=0", "data.batch_size must be at least 1"),
        ("draft.num_hidden_layers=0", "draft.num_hidden_layers must be at least 1"),
        ("loss.num_anchors=0", "loss.num_anchors must be at least 1"),
        ("optimizer.grad_accumulation=0", "optimizer.grad_accumulation must be at least 1"),
        ("train.epochs=0", "train.epochs must be at least 1"),
        ("train.log_every=0", "train.log_every must be at least 1"),
        ("train.eval_every=0", "train.eval_every must be at least 1"),
        ("train.checkpoint_every=0", "train.checkpoint_every must be at least 1"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints must be at least 1"),
        ("train.max_bad_steps=0", "train: max_bad_steps must be at least 1, found 0"),
        ("mesh.fsdp=0", "mesh.fsdp must be at least 1, found 0"),
        ("mesh.tensor=-1", "mesh.tensor must be at least 1, found -1"),
        ("mesh.data=0", "mesh.data must be -1 or at least 1, found 0"),
        ("loss.lambda_start=1.5", "loss.lambda_start must lie in 0..1, found 1.5"),
        ("loss.decay_ratio=-0.1", "loss.decay_ratio must lie in 0..1"),
        ("optimizer.warmup_ratio=2", "optimizer.warmup_ratio must lie in 0..1, found 2.0"),
        ("optimizer.final_ratio=-1", "optimizer.final_ratio must lie in 0..1"),
        ("train.steps=0", "train.steps must be at least 1, found 0"),
        ("loss.logits_mib=0", "loss.logits_mib must be positive, found 0"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be positive, found 0.0"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm must be positive, found 0.0"),
        ("optimizer.b1=1", "optimizer.b1 must lie in 0..1 and below 1, found 1.0"),
        ("optimizer.b2=-0.1", "optimizer.b2 must lie in 0..1 and below 1, found -0.1"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be 0 or more, found -0.1"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay must lie between 0 and 1, found 1.0"),
        ("data.max_length=16", "data.max_length 16 must exceed draft.block_size 16"),
        ("loss.anchor_rule=zlab", "loss.anchor_rule must be one of nemo, specforge, found 'zlab'"),
        (
            "loss.loss_decay_gamma=0",
            "loss.loss_decay_gamma must be positive, null for none or 'default', found 0.0",
        ),
        ("loss.kl_weight=-1", "loss.kl_weight must lie in 0..1, found -1.0"),
    ],
)
def test_run_config_refuses(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(smallest, [override])
    assert str(caught.value).startswith(f"{smallest}: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"{name} must be positive, found 0") for name in DECODER),
        *(
            (
                {name: 2**62},
                f"{name} must be at most {SIZE_LIMITS.get(name, SIZE_LIMIT)}, found {2**62}",
            )
            for name in DECODER
        ),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers must be at most 10000, found 10001"),
        *(
            ({"rms_norm_eps": x}, f"rms_norm_eps must lie between 0 and 1, found {x}")
            for x in (0.0, -1e-6, float("nan"), float("inf"), 1e30)
        ),
        ({"rope_theta": float("inf")}, "rope_theta must be finite in float32, found inf"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
        ({"head_dim": 3}, "head_dim must be even for rotary embeddings, found 3"),
        ({"dtype": "float64"}, "dtype must be float32 or bfloat16, found 'float64'"),
    ],
)
def test_decoder_config_refuses(change: dict[str, Any], message: str) -> None:
    DecoderConfig(**DECODER)
    with pytest.raises(InputError) as caught:
        DecoderConfig(**DECODER | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 3}, "head_dim must be even"),
        ({"block_size": 1}, "block_size must be at least 2, found 1"),
        ({"mask_token_id": 32}, "mask_token_id 32 is outside the vocabulary of 32"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside the vocabulary of 32"),
        ({"target_layer_ids": ()}, "target_layer_ids [] must lie in 0..5"),
        ({"target_layer_ids": (1, 6)}, "target_layer_ids [1, 6] must lie in 0..5"),
        ({"target_layer_ids": (-1, 1)}, "target_layer_ids [-1, 1] must lie in 0..5"),
        ({"target_layer_ids": (3, 1)}, "target_layer_ids [3, 1] must rise"),
        ({"target_layer_ids": (1, 1)}, "target_layer_ids [1, 1] must rise"),
        (
            {"pure_draft_prefix_len": -1},
            "pure_draft_prefix_len -1 leaves none of 3 positions to correct",
        ),
        (
            {"pure_draft_prefix_len": 3},
            "pure_draft_prefix_len 3 leaves none of 3 positions to correct",
        ),
        (
            {"pure_draft_prefix_len": 4, "shift_label": True},
            "pure_draft_prefix_len 4 leaves none of 4 positions",
        ),
        (
            {"layer_types": ("full_attention",)},
            "layer_types names 1 layers, num_hidden_layers is 2",
        ),
        (
            {"layer_types": ("full_attention", "linear")},
            "layer_types holds ['linear']; known: full_attention, sliding",
        ),
        (
            {"sliding_window": 8},
            "sliding_window is 8, layer_types []: a window needs sliding_attention layers",
        ),
        (
            {"layer_types": SLIDING},
            "sliding_window is None, layer_types ['sliding_attention', 'sliding_attention']",
        ),
        (
            {"layer_types": SLIDING, "sliding_window": 3},
            "sliding_window 3 must be at least block_size 4",
        ),
        (
            {"sliding_in_block": "forward"},
            "sliding_in_block must be 'bidirectional' or 'causal', found 'forward'",
        ),
        (
            {"input_embedding_scale": float("inf")},
            "input_embedding_scale must be finite in float32, found inf",
        ),
        ({"output_multiplier": float("nan")}, "output_multiplier must be positive, found nan"),
        (
            {"final_logit_softcapping": 1e300},
            "final_logit_softcapping must be finite in float32, found 1e+300",
        ),
        (
            {"num_target_layers": 2**62},
            f"num_target_layers must be at most {SIZE_LIMIT}, found {2**62}",
        ),
        ({"input_embedding_scale": 0.0}, "input_embedding_scale must be positive, found 0.0"),
        ({"output_multiplier": -1.0}, "output_multiplier must be positive, found -1.0"),
        (
            {"final_logit_softcapping": 0.0},
            "final_logit_softcapping must be positive or null, found 0.0",
        ),
    ],
)
def test_draft_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DraftConfig(**DRAFT | change)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_type": "mlp"}, "projector_type must be 'domino' or null, found 'mlp'"),
        (
            {"projector_type": ["domino"]},
            "projector_type must be 'domino' or null, found ['domino']",
        ),
        ({"emb_dim": 0}, "emb_dim must be positive, found 0"),
        ({"gru_hidden_dim": 0}, "gru_hidden_dim must be positive, found 0"),
        ({"emb_dim": 2**62}, f"emb_dim must be at most {SIZE_LIMIT}, found {2**62}"),
        ({"emb_dim": "wide"}, "emb_dim: expected"),
        ({"projector_type": None, "emb_dim": 8}, "unknown key 'emb_dim'"),
        ({"attention_bias": True}, "unknown key 'attention_bias'"),  # a draft has none
        ({"num_experts": 4}, "unknown key 'num_experts'"),
        ({"pure_draft_prefix_len": 3}, "pure_draft_prefix_len 3 leaves none of 3 positions"),
    ],
)
def test_a_stored_draft_is_read_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        draft_from_tree(DRAFT | change, place="file")
    assert str(caught.value).startswith(f"file: {message}")


def test_draft_config_accepts_the_edges() -> None:
    assert (
        DraftConfig(
            **DRAFT | {"pure_draft_prefix_len": 2, "target_layer_ids": (0, 5)}
        ).num_predictions
        == 3
    )
    assert (
        DraftConfig(**DRAFT | {"pure_draft_prefix_len": 3, "shift_label": True}).num_predictions
        == 4
    )
    assert DraftConfig(**DRAFT | {"head": None, "shift_label": True}).num_predictions == 4


def test_make_draft_config_takes_the_rest_from_the_target() -> None:
    target = DecoderConfig(
        **DECODER | {"num_hidden_layers": 36, "rope_theta": 1e6, "tie_word_embeddings": True}
    )
    draft = make_draft_config(
        DraftRecipe(mask_token_id=31), target, special_ids={"eos": 2}, dtype="bfloat16"
    )
    assert draft == DraftConfig(
        **DECODER
        | {"num_hidden_layers": 5, "rope_theta": 1e6, "block_size": 16, "mask_token_id": 31},
        dtype="bfloat16",
        num_target_layers=36,
        target_layer_ids=(1, 9, 17, 25, 33),
        pure_draft_prefix_len=1,
        shift_label=True,
    )
    assert draft.qk_norm
    chosen = DraftRecipe(mask_token_id=31, target_layer_ids=(0, 7))
    assert make_draft_config(chosen, target, special_ids={}, dtype="float32").target_layer_ids == (
        0,
        7,
    )


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
    mixed = made(
        sliding_window=32,
        layer_types=("full_attention", "sliding_attention"),
        sliding_in_block="causal",
    )
    assert (
        mixed.layer_types == ("full_attention", "sliding_attention")
        and mixed.sliding_in_block == "causal"
    )


LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def test_make_draft_config_is_dense_and_without_biases_below_any_target() -> None:
    plain = DecoderConfig(**DECODER | {"num_hidden_layers": 36, "rope_scaling": LLAMA3})
    mixture = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    recipe = DraftRecipe(mask_token_id=31)
    expected = make_draft_config(recipe, plain, special_ids={}, dtype="float32")
    assert expected.rope_scaling == LLAMA3
    for change in (mixture, {"attention_bias": True}):
        target = dataclasses.replace(plain, **change)
        assert make_draft_config(recipe, target, special_ids={}, dtype="float32") == expected


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_draft_config_round_trips_through_json(scaling: RopeScaling | None) -> None:
    draft = DraftConfig(**DRAFT | {"rope_scaling": scaling})
    assert draft_from_tree(json.loads(json.dumps(draft_tree(draft))), place="file") == draft
    tree = draft_tree(draft) | {"rope_scaling": {"rope_type": "linear", "factr": 2.0}}
    with pytest.raises(
        InputError, match="file: rope_scaling: unknown key 'factr'; did you mean 'factor'"
    ):
        draft_from_tree(tree, place="file")
    with pytest.raises(InputError, match="file: rope_scaling: expected a mapping, found 2"):
        draft_from_tree(tree | {"rope_scaling": 2}, place="file")


def test_make_draft_config_refuses_what_does_not_fit_the_target() -> None:
    target = DecoderConfig(**DECODER | {"num_hidden_layers": 36})
    for recipe, message in (
        (DraftRecipe(mask_token_id=2), "draft.mask_token_id 2 is the target's pad token"),
        (DraftRecipe(mask_token_id=32), "mask_token_id 32 is outside the vocabulary of 32"),
        (
            DraftRecipe(mask_token_id=31, target_layer_ids=()),
            "target_layer_ids [] must lie in 0..35",
        ),
        (
            DraftRecipe(mask_token_id=31, target_layer_ids=(36,)),
            "target_layer_ids [36] must lie in 0..35",
        ),
    ):
        with pytest.raises(InputError) as caught:
            make_draft_config(recipe, target, special_ids={"eos": None, "pad": 2}, dtype="float32")
        assert str(caught.value) == message


def test_dump_config_round_trips(smallest: Path, tmp_path: Path) -> None:
    words = [
        "draft.target_layer_ids=[1,3]",
        "optimizer.learning_rate=1e-7",
        "loss.loss_decay_gamma=7",
        "data.train=1e-3é",
    ]
    config = load_config(smallest, words)
    assert load_config(write(tmp_path / "dumped.yaml", dump_config(config))) == config


# What every file may hold: no NUL, no half of a surrogate pair.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(rate=st.floats(1e-12, 1e3), steps=st.none() | st.integers(1, 10**9), target=TEXT)
def test_dump_config_round_trips_any_value(rate: float, steps: int | None, target: str) -> None:
    tree = SMALLEST | {
        "optimizer": {"learning_rate": rate},
        "train": {"steps": steps},
        "target": target,
    }
    config = from_tree(RunConfig, tree, place="given")
    assert from_tree(RunConfig, yaml.safe_load(dump_config(config)), place="dumped") == config


def test_configs_are_frozen(smallest: Path) -> None:
    config = load_config(smallest)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 4  # type: ignore[misc]
    assert hash(config) == hash(load_config(smallest)), "modules and jit need hashable configs"


@pytest.mark.parametrize(
    ("target_layers", "draft_layers", "ids"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (64, 5, (1, 16, 31, 46, 61)),
        (28, 5, (1, 7, 13, 19, 25)),
        (30, 2, (1, 27)),
        (30, 1, (15,)),
        (31, 3, (1, 14, 28)),  # 14.5 rounds to even, as Python does
    ],
)
def test_default_target_layer_ids(
    target_layers: int, draft_layers: int, ids: tuple[int, ...]
) -> None:
    assert default_target_layer_ids(target_layers, draft_layers) == ids


def test_default_target_layer_ids_equal_the_reference() -> None:
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import build_target_layer_ids

    for target_layers in range(4, 81):
        for draft_layers in range(1, 9):
            expected = tuple(build_target_layer_ids(target_layers, draft_layers))
            assert default_target_layer_ids(target_layers, draft_layers) == expected
