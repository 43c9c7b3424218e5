"""Measurements of a drafter, one file of prompts after the other, for the verb `evaluate`.

Imports jax; `evaluate.py` imports this module once the arguments are checked.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax import __version__
from domino_jax.base.files import file_sha256
from domino_jax.cli.loading import Drafter, Loaded
from domino_jax.cli.shared import reporter, user_cache
from domino_jax.data.conversations import encode_prompt, read_messages, stop_token_ids
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import Answer, asked, check_length, pieces
from domino_jax.draft.backbone import DraftModel
from domino_jax.evaluation.answer_cache import cached_answers, prompts_sha256
from domino_jax.evaluation.endpoint import compare_with_server
from domino_jax.evaluation.evaluate import SERVING, plain_answers
from domino_jax.evaluation.evaluate import evaluate as evaluate_set
from domino_jax.evaluation.record import Evaluator, measured
from domino_jax.evaluation.servers import Server, ask
from domino_jax.evaluation.timing import cycle_times
from domino_jax.target.decoder import Target

EXAMPLES = 3  # answers of each set that are kept, with who wrote each token
CYCLE_CONTEXT = 256  # tokens behind the cycle that is timed


def evaluator_of(
    drafter: Drafter, temperature: float, *, seed: int, max_new_tokens: int
) -> Evaluator:
    """The settings of an evaluation, as its record holds them."""
    return Evaluator(
        target=drafter.record.target,
        target_sha256=drafter.target_sha256,
        chat_template=drafter.record.chat_template,
        step=drafter.step,
        block_size=drafter.config.block_size,
        head=drafter.config.projector_type,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=drafter.config.dtype,
    )


class Measurement:
    """A drafter measured on one file of prompts after the other."""

    def __init__(
        self,
        loaded: Loaded,
        drafter: Drafter,
        evaluator: Evaluator,
        *,
        batch_size: int,
        timed: int,
        replay: bool,
    ) -> None:
        self._loaded = loaded
        self._evaluator = evaluator
        self._batch_size = batch_size
        self._timed = timed
        self._replay = replay
        self._kwargs = evaluator.chat_template.kwargs
        self._weights = Weights(loaded.params, drafter.params)
        self._decoder = make_decoder(
            Target(loaded.config),
            DraftModel(drafter.config),
            proposals="serving",
            temperature=evaluator.temperature,
            stop_ids=stop_token_ids(loaded.tokenizer, self._kwargs),
        )
        self._device = f"{jax.devices()[0].platform}:{jax.devices()[0].device_kind}"

    def of_set(
        self, name: str, path: Path, limit: int | None, server: Server | None
    ) -> dict[str, Any]:
        """The record of a file."""
        texts, prompts = self._prompts(path, limit)
        # First: where it fails, nothing was measured in vain.
        served = server and ask(
            server,
            prompts,
            max_new_tokens=self._evaluator.max_new_tokens,
            stop_ids=self._decoder.stop_ids,
            reporter=reporter,
        )
        plain = self._plain(prompts) if self._evaluator.temperature == 0 else None
        reporter.say(f"{name}: compiling")
        figures = evaluate_set(
            self._decoder,
            self._weights,
            prompts,
            max_new_tokens=self._evaluator.max_new_tokens,
            batch_size=self._batch_size,
            timed=self._timed,
            replay=self._replay,
            plain=plain,
            seed=self._evaluator.seed,
            reporter=reporter,
        )
        examples = [
            {"prompt": text, "pieces": pieces(self._loaded.tokenizer, answer)}
            for text, answer in zip(texts[:EXAMPLES], figures.answers, strict=False)
        ]
        # `replayed` for who asks why few outputs were compared.
        source = {"file": str(path), "sha256": file_sha256(path), "replayed": self._replay}
        where = {"measured": measured(self._device)}
        record = source | figures.as_json() | {"examples": examples} | where
        if served and plain is not None:
            text_of = functools.partial(self._loaded.tokenizer.decode, skip_special_tokens=True)
            ours = figures.modes[SERVING].per_prompt
            record["endpoint"] = compare_with_server(served, plain, ours, text_of=text_of).as_json()
        return record

    def cycle(self) -> dict[str, Any]:
        """The record of a cycle's times, in the middle of an answer."""
        reporter.say("timing the parts of a cycle")
        times = cycle_times(self._decoder, self._weights, context=CYCLE_CONTEXT)
        return times.as_json() | {"measured": measured(self._device)}

    def _plain(self, prompts: list[np.ndarray]) -> Sequence[Answer]:
        """The target's own answers, decoded once for all drafts."""
        identity = {
            "target": self._evaluator.target_sha256,
            "prompts": prompts_sha256(prompts),
            "stop_ids": list(self._decoder.stop_ids),
            "max_new_tokens": self._evaluator.max_new_tokens,
            "dtype": self._evaluator.dtype,
            "device": self._device,
            "jax": jax.__version__,
            "domino_jax": __version__,
        }
        compute = functools.partial(
            plain_answers,
            self._decoder,
            self._weights,
            prompts,
            max_new_tokens=self._evaluator.max_new_tokens,
            batch_size=self._batch_size,
            reporter=reporter,
        )
        cache = user_cache("answers", verb="evaluate")
        return cached_answers(cache, identity, compute, reporter=reporter)

    def _prompts(self, path: Path, limit: int | None) -> tuple[list[str], list[np.ndarray]]:
        """The first prompts of a file as text and as token ids; tells which lines are left out."""
        usable, bad_lines = read_messages(path)
        # Told and passed over: a set is measured on what can be used of it.
        for bad in bad_lines:
            reporter.say(f"{path}:{bad.line}: {bad.reason}")
        texts, prompts = [], []
        for line, messages in usable[:limit]:
            question = asked(messages)
            prompts.append(encode_prompt(question, self._loaded.tokenizer, self._kwargs))
            check_length(self._decoder, prompts[-1], source=f"{path}:{line}")
            texts.append(question[-1]["content"])
        return texts, prompts
