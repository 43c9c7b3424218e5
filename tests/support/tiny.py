"""A tiny target on disk and conversations for it: whole runs take seconds and need no network."""

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from domino_jax.base.files import write_checksums
from domino_jax.base.progress import Reporter
from domino_jax.config.model import SIZES, DecoderConfig
from domino_jax.target.decoder import Target
from domino_jax.target.load import expected_tensors


def quiet() -> Reporter:
    """A reporter that nobody hears."""
    return Reporter(Console(quiet=True))


@dataclass(frozen=True)
class Heard(Reporter):
    """A reporter whose lines a test reads."""

    console: Console = field(default_factory=lambda: Console(file=io.StringIO()))
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Interrupted(Heard):
    """A reporter that ends the work at the line that begins so, as Ctrl-C does."""

    at: str = ""

    def say(self, line: str) -> None:
        super().say(line)
        if line.startswith(self.at):
            raise KeyboardInterrupt


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
# As Qwen3's: told not to think, it begins every answer after empty thoughts, which are "n o" here.
SWITCHED_TEMPLATE = (
    "{% set off = enable_thinking is defined and enable_thinking is false %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{% if off and m['role'] == 'assistant' %}n o {% endif %}"
    "{{ m['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% if off %}n o {% endif %}{% endif %}"
)
# As Llama 3.2's: the date before the conversation. Here it is the day's letter: "b" on the first.
DATED_TEMPLATE = (
    "{% if not day is defined %}{% set day = strftime_now('%d') | int %}{% endif %}"
    "<|im_start|>user {{ 'abcdefghijklmnopqrstuvwxyzabcdef'[day] }}<|im_end|> " + TEMPLATE
)
WORDS = [
    "<|im_end|>",
    "<|im_start|>",
    "<mask>",
    "<unk>",
    "user",
    "assistant",
    *"abcdefghijklmnopqrstuvwxyz",
]
MASK_TOKEN_ID = 2
CONFIG = DecoderConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=128,
    qk_norm=True,
)


def write_target(directory: Path, *, template: str = TEMPLATE) -> Path:
    """A random Qwen3 model and a word tokenizer, in Hugging Face form."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<mask>"],
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    config: dict[str, Any] = {"model_type": "qwen3", "tie_word_embeddings": False}
    for name in (*SIZES, "rms_norm_eps", "rope_theta"):
        config[name] = getattr(CONFIG, name)
    (directory / "config.json").write_text(json.dumps(config))
    variables = Target(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params = nn.meta.unbox(variables)["params"]
    tensors = {}
    for path, (name, _) in expected_tensors(CONFIG).items():
        leaf: Any = params
        for part in path:
            leaf = leaf[part]
        tensors[name] = np.array(leaf * (10.0 if leaf.ndim == 2 else 1.0))
    _never_generates(MASK_TOKEN_ID, tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def with_ends(target: Path, directory: Path, *ends: int) -> Path:
    """A copy of a target that generates up to one of these tokens."""
    copy = Path(shutil.copytree(target, directory))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return copy


def _never_generates(token: int, tensors: dict[str, np.ndarray]) -> None:
    """Gives a token a logit far below all others: no answer, and so no row, contains it."""
    # The last entry of the residual stream is that of the embedding, 1: no layer adds to it.
    tensors["model.embed_tokens.weight"][:, -1] = 1
    for name, weight in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[-1] = 0
    head = tensors["lm_head.weight"]
    head[token], head[:, -1] = 0, 0
    head[token, -1] = -1e4


def add_token(target: Path) -> Path:
    """Adds the token <new> to a target's tokenizer; it has no embedding."""
    path = target / "tokenizer.json"
    tree = json.loads(path.read_text())
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token |= {"id": len(WORDS), "content": "<new>", "special": True}
    path.write_text(json.dumps(tree | {"added_tokens": [*tree["added_tokens"], token]}))
    return target


def stack_layers(params: Any) -> Any:
    """Parameters of a target with its layers stacked under `layers/layer`, for `scan_layers`."""
    count = sum(name.startswith("layers_") for name in params)
    layers = [params[f"layers_{index}"] for index in range(count)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": {"layer": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


def write_conversations(
    path: Path, count: int, *, seed: int = 0, answers: bool = True, rounds: int = 1
) -> Path:
    """Random words asked and answered, `rounds` times per conversation, a conversation per line."""
    rng = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(4, 9)))

    lines = []
    for _ in range(count):
        turns = []
        for _ in range(rounds):
            turns.append({"role": "user", "content": words()})
            if answers:
                turns.append({"role": "assistant", "content": f"{words()} {words()}"})
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def seal(step: Path) -> None:
    """Writes the checksums of a checkpoint that a test has edited as if it had been saved so."""
    committed = step / "commit_success.txt"  # written after them
    words = committed.read_text()
    committed.unlink()
    write_checksums(step)
    committed.write_text(words)


def run_config(directory: Path, target: Path, **sections: Any) -> Path:
    """A YAML of a short run, its training and held-out rows beside it; sections override fields."""
    rows = write_conversations(directory / "rows.jsonl", 24)
    heldout = write_conversations(directory / "heldout.jsonl", 5, seed=1)
    tree: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "target": str(target),
        "dtype": "float32",
        "draft": {
            "num_hidden_layers": 1,
            "target_layer_ids": [0, 2],
            "block_size": 4,
            "mask_token_id": MASK_TOKEN_ID,
            "emb_dim": 8,
            "gru_hidden_dim": 8,
        },
        "data": {"train": str(rows), "eval": str(heldout), "max_length": 24, "batch_size": 8},
        "loss": {"num_anchors": 4},
        "train": {"steps": 6, "log_every": 2, "eval_every": 3, "checkpoint_every": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = directory / "config.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path
