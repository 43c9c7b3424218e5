"""An answer that streams: its seconds hold no compilation."""

from typing import Any

import jax
import pytest
from toy_models import PROMPTS, TARGET, draft_config, models

from domino_jax.decoding import generate
from domino_jax.decoding.generate import stream_answer
from domino_jax.decoding.speculate import make_decoder
from domino_jax.target.model import Target


@pytest.mark.parametrize("count", [1, 20])
def test_no_second_of_a_streamed_answer_is_a_compilation(
    target_params: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, temperature=0.9, top_p=0.9)
    compiled: list[str] = []
    at_start: list[int] = []
    begin = generate.start

    def listener(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def start(*args: Any, **options: Any) -> Any:
        at_start.append(len(compiled))
        return begin(*args, **options)

    monkeypatch.setattr(generate, "start", start)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        answer = stream_answer(
            decoder, weights, PROMPTS[1], max_new_tokens=count, show=lambda *_: None
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert len(answer.tokens) == count
    first, timed = at_start
    assert first < timed == len(compiled)
