"""Rollouts: the draft drafts and the target verifies inside the training process.

As `domino evaluate` has them do with a checkpoint: greedily, the head included, K - 1 proposals of
each block. Held-out conversations are the prompts, each without the answer that it ends with:

    prompts -> batches of one shape, the last one filled up -> answers -> tau, shares by position
               read and answered by one program each                      `evaluation.counts`
"""

from collections.abc import Callable

import jax

from domino_jax.data.prompt import stop_token_ids
from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.draft.backbone import DraftModel
from domino_jax.evaluation.counts import acceptance, tau
from domino_jax.sharding import axis_size
from domino_jax.target.tokens import end_token_ids
from domino_jax.training.run import Run, RunInputs
from domino_jax.training.step import TrainState

# `tau`; `marginal_1` to `marginal_P` and `conditional_1` to `conditional_P` of P proposals (see
# `counts.Acceptance`), None where nothing came so far; the counts `tokens` and `prompts`.
RolloutFigures = dict[str, float | None]


class Rollout:
    """Lets the draft of a run answer its prompts.

    The target stays as training holds it, its layers stacked and split over the mesh; the prompts
    of a batch are split over the devices as the rows of a step are.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._decoder = rollout_decoder(run.inputs)

    def __call__(
        self, state: TrainState, *, stop_requested: Callable[[], bool]
    ) -> RolloutFigures | None:
        """The figures, or None where the run was asked to stop between two batches."""
        inputs = self._run.inputs
        # As `HeldOut`: what is exported is measured.
        params = state.params if state.ema is None else state.ema
        weights = Weights(self._run.target_params, params)
        size = prompts_at_once(inputs)
        # Of all batches, though most are shorter: each other bucket would be another program.
        longest = max(map(len, inputs.prompts))
        answers: list[Answer] = []
        for begin in range(0, len(inputs.prompts), size):
            if stop_requested():
                return None
            answers += generate(
                self._decoder,
                weights,
                inputs.prompts[begin : begin + size],
                max_new_tokens=inputs.cadence.rollout_tokens,
                size=size,
                longest=longest,
            )
        figures: RolloutFigures = {"tau": tau(answers)}
        shares = vars(acceptance(answers, self._decoder.proposals))
        for kind in ("marginal", "conditional"):
            for position, share in enumerate(shares[kind], start=1):
                figures[f"{kind}_{position}"] = share
        tokens = sum(len(answer.tokens) for answer in answers)
        return figures | {"tokens": tokens, "prompts": len(answers)}


def rollout_decoder(run: RunInputs) -> Decoder:
    """Target and draft of a run as they decode what is measured."""
    return make_decoder(
        run.program.target,
        DraftModel(run.record.config),
        proposals="serving",
        stop_ids=stop_token_ids(
            run.tokenizer, run.record.chat_template.kwargs, end_ids=end_token_ids(run.target)
        ),
    )


def prompts_at_once(run: RunInputs) -> int:
    """Prompts of a batch, all devices together."""
    # As many as a micro-batch has rows, which the mesh divides, or fewer where there are fewer.
    parts = axis_size("batch", run.mesh)
    needed = -(-len(run.prompts) // parts) * parts
    return min(run.shape.batch_size, needed)


def target_cache_bytes(run: RunInputs) -> int:
    """What the target's keys and values of a batch of prompts take, all devices together."""
    decoder = rollout_decoder(run)
    longest = max(map(len, run.prompts))
    cache_len = required_cache_len(decoder, longest, run.cadence.rollout_tokens)

    # Shapes alone: a dry run holds none of it.
    cache = jax.eval_shape(
        lambda: decoder.target.empty_cache(batch=prompts_at_once(run), cache_len=cache_len)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def rollout_words(figures: RolloutFigures) -> str:
    """What a person watches of it: tau, and the shares of each position."""
    words = f"rolled out: tau {figures['tau']:.2f}"
    for kind in ("marginal", "conditional"):
        shares = [share for name, share in figures.items() if name.startswith(kind)]
        told = ["-" if share is None else f"{share:.2f}" for share in shares]
        words += f"  {kind} {' '.join(told)}"
    return words
