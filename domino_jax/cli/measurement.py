"""Measurements of a drafter, one file of prompts after the other, for the verb `evaluate`.

Imports jax; `evaluate.py` imports this module once the arguments are checked.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from domino_jax import __version__
from domino_jax.base.errors import InputError
from domino_jax.base.files import file_sha256
from domino_jax.base.user_cache import user_cache
from domino_jax.cli.loading import Loaded
from domino_jax.cli.shared import reporter
from domino_jax.data.forms import nothing_usable, question
from domino_jax.data.prompt import prompt_of, stop_token_ids
from domino_jax.data.reading import Reading
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, check_prompt, pieces
from domino_jax.evaluation.answer_cache import cached_answers, prompts_sha256
from domino_jax.evaluation.endpoint import compare_with_server
from domino_jax.evaluation.evaluate import SERVING, plain_answers
from domino_jax.evaluation.evaluate import evaluate as evaluate_set
from domino_jax.evaluation.record import Evaluator, measured
from domino_jax.evaluation.servers import Server, ask
from domino_jax.evaluation.timing import cycle_times
from domino_jax.training.checkpoint import StoredDraft

EXAMPLES = 3  # answers of each set that are kept, with who wrote each token
CYCLE_CONTEXT = 256  # tokens behind the cycle that is timed


@dataclass(frozen=True)
class Measurement:
    """A drafter measured on one file of prompts after the other."""

    loaded: Loaded
    drafter: StoredDraft
    evaluator: Evaluator
    batch_size: int
    timed: int
    replay: bool

    @functools.cached_property
    def _decoder(self) -> Decoder:
        kwargs = self.evaluator.chat_template.kwargs
        return self.loaded.decoder(
            self.drafter.record.config,
            proposals="serving",
            temperature=self.evaluator.temperature,
            stop_ids=stop_token_ids(self.loaded.tokenizer, kwargs, end_ids=self.loaded.end_ids),
        )

    @property
    def _weights(self) -> Weights:
        return Weights(self.loaded.params, self.drafter.params)

    def of_set(
        self, name: str, path: Path, limit: int | None, server: Server | None
    ) -> dict[str, Any]:
        """The record of a file."""
        texts, prompts = self._prompts(path, limit)
        # First: where it fails, nothing was measured in vain.
        served = server and ask(
            server,
            prompts,
            max_new_tokens=self.evaluator.max_new_tokens,
            stop_ids=self._decoder.stop_ids,
            reporter=reporter,
        )
        plain = self._plain(prompts) if self.evaluator.temperature == 0 else None
        reporter.say(f"{name}: compiling")
        figures = evaluate_set(
            self._decoder,
            self._weights,
            prompts,
            max_new_tokens=self.evaluator.max_new_tokens,
            batch_size=self.batch_size,
            timed=self.timed,
            replay=self.replay,
            plain=plain,
            seed=self.evaluator.seed,
            reporter=reporter,
        )
        examples = [
            {"prompt": text, "pieces": pieces(self.loaded.tokenizer, answer)}
            for text, answer in zip(texts[:EXAMPLES], figures.answers, strict=False)
        ]
        # `replayed` for who asks why few outputs were compared.
        source = {"file": str(path), "sha256": file_sha256(path), "replayed": self.replay}
        where = {"measured": measured(_device())}
        record = source | figures.as_json() | {"examples": examples} | where
        if served and plain is not None:
            text_of = functools.partial(self.loaded.tokenizer.decode, skip_special_tokens=True)
            ours = figures.modes[SERVING].per_prompt
            record["endpoint"] = compare_with_server(served, plain, ours, text_of=text_of)
        return record

    def cycle(self) -> dict[str, Any]:
        """The record of a cycle's times, in the middle of an answer."""
        reporter.say("timing the parts of a cycle")
        times = cycle_times(self._decoder, self._weights, context=CYCLE_CONTEXT)
        return times.as_json() | {"measured": measured(_device())}

    def _plain(self, prompts: list[np.ndarray]) -> Sequence[Answer]:
        """The target's own answers, decoded once for all drafts."""
        identity = {
            "target": self.evaluator.target_sha256,
            "prompts": prompts_sha256(prompts),
            "stop_ids": list(self._decoder.stop_ids),
            "max_new_tokens": self.evaluator.max_new_tokens,
            "dtype": self.evaluator.dtype,
            "device": _device(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "domino_jax": __version__,
        }
        compute = functools.partial(
            plain_answers,
            self._decoder,
            self._weights,
            prompts,
            max_new_tokens=self.evaluator.max_new_tokens,
            batch_size=self.batch_size,
            reporter=reporter,
        )
        cache = user_cache("answers", needs="domino evaluate")
        return cached_answers(
            cache,
            identity,
            compute,
            prompts=len(prompts),
            vocab_size=self.loaded.config.vocab_size,
            reporter=reporter,
        )

    def _prompts(self, path: Path, limit: int | None) -> tuple[list[str], list[np.ndarray]]:
        """The first prompts of a file as text and as token ids; tells which lines are left out."""
        texts: list[str] = []
        prompts: list[np.ndarray] = []
        tokenizer, kwargs = self.loaded.tokenizer, self.evaluator.chat_template.kwargs
        reading = Reading(path, tokenizer, kwargs)
        for conversation in reading.conversations():
            if len(prompts) == limit:
                continue  # its line is counted
            source = f"{path}:{conversation.line}"
            try:
                prompt = prompt_of(conversation, tokenizer, kwargs)
            except InputError as error:
                raise InputError(f"{source}: {error}") from error
            check_prompt(self._decoder, prompt, tokenizer, source=source)
            prompts.append(prompt)
            asked = question(conversation)
            texts.append(asked[-1]["content"] if asked else tokenizer.decode(prompt))
        # A set is measured on its usable lines.
        for words in (*reading.bad_lines.report(path), *reading.report()):
            reporter.say(words)
        if not prompts:
            raise nothing_usable(path, reading.bad_lines)
        return texts, prompts


def _device() -> str:
    """What computes, as jax calls it."""
    device = jax.devices()[0]
    return f"{device.platform}:{device.device_kind}"
