"""The parsers of models, whose files come from strangers; see `fuzz_parsers.py`.

config.json, tokenizers and chat templates; tensors are in `fuzz_tensors.py`.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations
from fuzz_cases import Case, Inputs, Parser, json_inputs, unusable
from fuzz_tensors import gguf_parser, tensor_parsers

TEMPLATE_PARTS = (
    "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}", "{{ m.content }}",
    "{{ messages }}", "{{ 'x' * 10 ** 9 }}", "{% for a in range(99999) %}", "{{ 9 ** 9 ** 9 }}",
    "{{ x.y.z }}", "{{ ''.__class__ }}", "{% set x = x ~ x %}", "{% include 'a' %}", "{% raw %}",
    "{{ m | tojson }}", "{{ range(10 ** 9) }}", "{#", "}}",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
DEEPER = 5  # one of so many configs is held against its tensors too, which takes 0.1 s


def model_parsers(directory: Path) -> list[Parser]:
    """Those that read what a target or a draft brings along; writes the tiny target."""
    import jax
    from tiny import write_target

    jax.config.update("jax_platforms", "cpu")
    target = directory / "target"
    if not target.exists():
        target.mkdir()
        write_target(target)
    return [
        _target_config(directory, target),
        _draft_config(directory, target),
        *tensor_parsers(directory),
        gguf_parser(directory),
        _tokenizer_files(directory, target),
        _chat_templates(target),
    ]


def _target_config(directory: Path, target: Path) -> Parser:
    from domino_jax.target.decoder_keys import read_decoder_config
    from domino_jax.target.load import open_target

    copy = directory / "decoder"
    shutil.copytree(target, copy)

    def check(content: bytes) -> str | None:
        (copy / "config.json").write_bytes(content)
        config = read_decoder_config(copy, dtype="float32")
        if len(content) % DEEPER == 0:
            open_target(copy, config)
        return _wrong_decoder(config)

    inputs = json_inputs(*_target_trees(json.loads((target / "config.json").read_text())))
    words = ("train", directory / "valid" / "config.yaml", f"target={copy}")
    return Parser(name="config.json, target", weight=20, inputs=inputs, check=check, words=words)


def _target_trees(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The tiny target's config.json with keys of other writers, with YaRN, and with experts."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    yarn |= {"beta_fast": 32.0}
    plain = {"layer_types": ["full_attention"] * 4, "rope_scaling": None}
    plain |= {"attention_bias": False, "head_dim": 8}
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 8}
    rope = {"rope_scaling": yarn, "rope_parameters": {**yarn, "rope_theta": 10_000.0}}
    return [{**tree, **more} for more in (plain, rope, experts)]


def _draft_config(directory: Path, target: Path) -> Parser:
    from domino_jax.interop.hf import read_hf_config, read_hf_draft, recorded_template
    from domino_jax.interop.hf_config import config_json

    place, draft = directory / "draft", _domino_draft()
    _write_draft(place, draft)
    kinds = ("sliding_attention", "full_attention")
    windows = dataclasses.replace(draft, layer_types=kinds, sliding_window=8)

    def check(content: bytes) -> str | None:
        (place / "config.json").write_bytes(content)
        recorded_template(place)
        deeper = len(content) % DEEPER == 0
        return _wrong_draft(read_hf_draft(place)[0] if deeper else read_hf_config(place))

    inputs = json_inputs(*(config_json(config, "float32") for config in (draft, windows)))
    words = ("import", place, directory / "imported", "--target", target)
    return Parser(name="config.json, draft", weight=20, inputs=inputs, check=check, words=words)


def _domino_draft() -> Any:
    """The config of a Domino draft of the tiny target."""
    from tiny import CONFIG

    from domino_jax.config.heads import DominoHeadConfig
    from domino_jax.config.model import DecoderShape, DraftConfig

    shape = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(DecoderShape)}
    return DraftConfig(
        **(shape | {"num_hidden_layers": 2}),
        num_target_layers=4,
        target_layer_ids=(0, 2),
        block_size=4,
        mask_token_id=2,
        head=DominoHeadConfig(emb_dim=8, gru_hidden_dim=8),
        shift_label=True,
    )


def _write_draft(place: Path, config: Any) -> None:
    """Exports random parameters of a draft."""
    import flax.linen as nn
    import jax

    from domino_jax.draft.backbone import DraftModel
    from domino_jax.draft.build import init_variables
    from domino_jax.interop.hf import save_hf_draft

    variables = init_variables(DraftModel(config), jax.random.key(0))
    save_hf_draft(place, config, nn.meta.unbox(variables)["params"])


def _wrong_decoder(config: Any) -> str | None:
    tree = dataclasses.asdict(config)
    if problem := unusable(tree):
        return problem
    for name in SIZES:
        if type(tree[name]) is not int or not 0 < tree[name] <= 2**31:
            return f"{name} {tree[name]}"
    whole = tree["num_attention_heads"] % tree["num_key_value_heads"] == 0
    if tree["num_hidden_layers"] > 10_000 or not whole:
        return "layers or heads of no model"
    if not 1e-38 < tree["rms_norm_eps"] < 1 or not tree["rope_theta"] > 1 or tree["head_dim"] % 2:
        return "a norm or a rotation of no model"
    return None


def _wrong_draft(config: Any) -> str | None:
    layers = list(config.target_layer_ids)
    rising = bool(layers) and layers == sorted(set(layers))
    if not rising or layers[0] < 0 or layers[-1] >= config.num_target_layers:
        return f"target_layer_ids {layers}"
    if not 0 <= config.mask_token_id < config.vocab_size or config.block_size < 2:
        return "a mask token or block of no draft"
    if not config.input_embedding_scale > 0 or not config.output_multiplier > 0:
        return "a scale that is not positive"
    return _wrong_decoder(config)


def _tokenizer_files(directory: Path, target: Path) -> Parser:
    from domino_jax.data.prompt import encode_prompt, stop_token_ids
    from domino_jax.target.load import load_tokenizer

    place = directory / "tokenizer"
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (target / name).read_bytes() for name in (*names, TEMPLATE)}
    mutated = {name: json_inputs(json.loads(files[name])) for name in names}

    def draw(rng: random.Random) -> Case:
        name = rng.choice(names)
        return Case((name, mutated[name].draw(rng).content))

    def check(content: tuple[str, bytes]) -> str | None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, whole in {**files, content[0]: content[1]}.items():
            (place / name).write_bytes(whole)
        odd = load_tokenizer(place)
        stop_token_ids(odd)
        encode_prompt(MESSAGES[:1], odd)
        return None if odd.chat_template else "no template"

    inputs = Inputs((names[1], files[names[1]]), draw)
    return Parser(name="tokenizer files", weight=3, inputs=inputs, check=check)


def _chat_templates(target: Path) -> Parser:
    from domino_jax.data.rendering import Rendering, render
    from domino_jax.target.load import load_tokenizer

    template, tokenizer = (target / TEMPLATE).read_text(), load_tokenizer(target)

    def draw(rng: random.Random) -> Case:
        parts = [template, *(rng.choice(TEMPLATE_PARTS) for _ in range(rng.randrange(1, 4)))]
        rng.shuffle(parts)
        text = "".join(parts)
        if rng.random() < 0.5:
            text = mutations.mutated_text(rng, text).decode("utf-8", "replace")
        return Case(text)

    def check(text: str) -> str | None:
        tokenizer.chat_template = text
        # A NUL is text to a tokenizer; what is not UTF-8 raises here.
        render(tokenizer, [Rendering(MESSAGES)], {})[0].encode()
        return None

    return Parser(name="chat templates", weight=4, inputs=Inputs(template, draw), check=check)
