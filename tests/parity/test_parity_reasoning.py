"""`mask_reasoning_content` against NeMo AutoModel 0.7.0's loss mask.

Both take the same conversation and the same template.
"""

from typing import Any

import pytest
from chats import encoded
from tiny import write_target

from domino_jax.target.load import load_tokenizer

# The block is there only where there is reasoning, so that NeMo, which compares renderings, finds
# its tags as well.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{% if m.get('reasoning_content') %}<think> {{ m['reasoning_content'] }} </think> {% endif %}"
    "{{ m['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
ASK = {"role": "user", "content": "a b c"}


def answer(content: str, reasoning: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | (
        {"reasoning_content": reasoning} if reasoning else {}
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_target(tmp_path_factory.mktemp("target"), template=TEMPLATE))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [ASK, answer("d e", "f g h")],
        [ASK, answer("d e")],
        [ASK, answer("d", "f g"), ASK, answer("e")],
        [ASK, answer("d", "f g"), ASK, answer("e i", "j")],
    ],
)
def test_loss_mask_equals_nemos(
    tokenizer: Any, messages: list[dict[str, Any]], masked: bool
) -> None:
    from nemo_automodel.components.datasets.llm.formatting_utils import format_chat_template

    eos = tokenizer.eos_token_id
    theirs = format_chat_template(
        tokenizer,
        messages,
        eos,
        eos,
        mask_reasoning_content=masked,
        mask_generation_prompt=True,
        unshifted=True,
    )
    row = encoded(messages, tokenizer, mask_reasoning_content=masked)
    assert row is not None and row.input_ids.tolist() == list(theirs["input_ids"])
    assert row.loss_mask.tolist() == [bool(x) for x in theirs["loss_mask"]]


def test_reasoning_changes_the_mask(tokenizer: Any) -> None:
    messages = [ASK, answer("d e", "f g h")]
    rows = [encoded(messages, tokenizer, mask_reasoning_content=masked) for masked in (False, True)]
    # <think> f g h </think> d e and the end of the turn; then without the first five
    assert [row.loss_mask.sum() for row in rows] == [8, 3]
