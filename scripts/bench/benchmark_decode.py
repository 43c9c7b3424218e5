"""Decoding of one target, plain and with drafters, here and in PyTorch, same prompts, one run.

Here: plain, speculative with a Domino draft, speculative with a plain DFlash draft. Beside them
transformers' `generate` and, on the DFlash draft, the `spec_generate` of NeMo AutoModel 0.7.0 and
of z-lab's dflash 0.1.0 (neither runs the Domino head). All greedy; the ways take turns prompt by
prompt. Then the parts of a cycle, what verifying costs against a single token, and batches. The
last line is JSON.

Trained drafts of a run are measured in float32 (`--domino RUN --dflash RUN`). On an accelerator

    python scripts/bench/benchmark_decode.py --shape qwen3-4b

fills the README's table instead: bfloat16, prompts, target and drafts random and made on the
device, alike in jax and torch (`benchmark_weights.py`). What such drafts guess right means nothing:
compare the time of a cycle ("verification") and of plain decoding, the prompt's reading included.
Draft weights are float32 here, as every verb reads them. It needs what `benchmark_step.py` says for
a machine without network; z-lab's program is left out. `--tiny` tries it anywhere.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark_cycle import batch_speed, cycle_parts, verification
from benchmark_record import add_record_option, record
from benchmark_workloads import SHAPES, draft_config, target_config

from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.draft.backbone import DraftModel
from domino_jax.interop.hf import save_hf_draft
from domino_jax.target.decoder import Target

CONTEXT = 512  # positions behind which parts are measured
OURS = ("plain", "domino", "dflash")

Way = Callable[[np.ndarray], tuple[list[int], int]]  # a prompt's answer and its verifications
TorchModels = tuple[Any, dict[str, Any]]  # a target and its DFlash drafts


@dataclasses.dataclass(frozen=True)
class Case:
    """What is decoded: a target, its Domino and DFlash drafts, prompts, tokens that end answers."""

    target: DecoderConfig
    target_params: Any
    drafts: dict[str, tuple[DraftConfig, Any]]
    prompts: list[np.ndarray]
    stops: tuple[int, ...]
    context: int
    torch_models: Callable[[], TorchModels]


def main() -> None:
    options = parsed_options()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device
    case = case_of_shape(options) if options.shape else case_of_runs(options)
    report = measured(case, options) | described(case, options)
    show(report)
    record(options.record, report, device=report)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--domino", type=Path, help="run directory of a Domino draft")
    parser.add_argument(
        "--dflash", type=Path, help="run directory of a DFlash draft of the same target"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, help="random target and drafts of this shape instead of runs"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="with --shape: widths that a CPU runs in seconds"
    )
    parser.add_argument("--prompts", type=Path, default=Path("configs/prompts/heldout.jsonl"))
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--proposals",
        choices=("serving", "block"),
        default="serving",
        help="tokens drafted per cycle: K - 1, or all",
    )
    parser.add_argument("--no-torch", action="store_true", help="only what is written here")
    add_record_option(parser)
    options = parser.parse_args()
    if (options.shape is None) != bool(options.domino and options.dflash):
        parser.error("give --domino RUN and --dflash RUN, or --shape alone")
    if options.tiny and not options.shape:
        parser.error("--tiny belongs to --shape")
    return options


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The figures: of the ways in turn, of a verification, of a cycle's parts, of batches."""
    prompts, count = case.prompts, options.max_new_tokens
    decoders = our_decoders(case, proposals=options.proposals)
    longest = max(map(len, prompts))
    modes = {name: our_way(*pair, longest=longest, count=count) for name, pair in decoders.items()}
    if not options.no_torch:
        modes |= torch_ways(*case.torch_models(), case.stops, count=count)
    report: dict[str, Any] = {"ways": take_turns(modes, prompts)}
    target = Target(case.target)
    report["verification"] = verification(target, case.target_params, context=case.context)
    report["cycle"] = {
        name: cycle_parts(*decoders[name], context=case.context) for name in case.drafts
    }
    report["batches"] = {
        size: batch_speed(*decoders["domino"], (prompts * size)[:size], count=count)
        for size in options.batch_sizes
    }
    return report


def our_decoders(case: Case, *, proposals: str) -> dict[str, tuple[Decoder, Weights]]:
    """The ways of this project by name: without a draft, and with each."""
    target = Target(case.target)
    plain = make_decoder(target, stop_ids=case.stops)
    decoders = {"plain": (plain, Weights(case.target_params))}
    for name, (config, params) in case.drafts.items():
        draft = DraftModel(config)
        decoder = make_decoder(target, draft, proposals=proposals, stop_ids=case.stops)
        decoders[name] = (decoder, Weights(case.target_params, params))
    return decoders


def described(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured: the case, its limits, the device and the versions."""
    versions = {"jax": jax.__version__}
    if not options.no_torch:
        import benchmark_nemo

        versions |= benchmark_nemo.versions()
    return {
        "shape": options.shape,
        "tiny": options.tiny,
        "dtype": case.target.dtype,
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "context": case.context,
        "proposals": options.proposals,
        "prompts": len(case.prompts),
        "max_new_tokens": options.max_new_tokens,
        "versions": versions,
    }


def case_of_runs(options: argparse.Namespace) -> Case:
    """Trained drafts of two runs and their target, in float32."""
    from domino_jax.cli.loading import load_run
    from domino_jax.data.forms import read_conversations
    from domino_jax.data.prompt import prompt_of, stop_token_ids
    from domino_jax.target.resolve import resolve_target

    jax.config.update("jax_default_matmul_precision", "highest")
    loaded, domino = load_run(options.domino, "float32", max_new_tokens=options.max_new_tokens)
    _, dflash = load_run(options.dflash, "float32", max_new_tokens=options.max_new_tokens)
    usable = read_conversations(options.prompts).conversations
    kwargs = domino.record.chat_template.kwargs

    def torch_models() -> TorchModels:
        import torch
        from dflash import DFlashDraftModel
        from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel
        from transformers import AutoModelForCausalLM

        path = resolve_target(domino.record.target)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with tempfile.TemporaryDirectory() as directory:
            draft = Path(directory) / "draft"
            save_hf_draft(draft, dflash.record.config, dflash.params, dtype="float32")
            whole = {"dtype": torch.float32}
            return model, {
                "nemo": Qwen3DFlashDraftModel.from_pretrained(
                    draft, attn_implementation="sdpa", **whole
                ),
                "zlab": DFlashDraftModel.from_pretrained(draft, **whole),
            }

    return Case(
        target=loaded.config,
        target_params=loaded.params,
        drafts={
            "domino": (domino.record.config, domino.params),
            "dflash": (dflash.record.config, dflash.params),
        },
        prompts=[prompt_of(each, loaded.tokenizer, kwargs) for each in usable[: options.limit]],
        stops=stop_token_ids(loaded.tokenizer, kwargs, end_ids=loaded.end_ids),
        context=CONTEXT,
        torch_models=torch_models,
    )


def case_of_shape(options: argparse.Namespace) -> Case:
    """A random target, drafts and prompts, made on the device; nothing ends an answer early."""
    import benchmark_ours

    target = target_config(options.shape, dtype=benchmark_ours.default_dtype(), tiny=options.tiny)
    configs = {"domino": draft_config(target), "dflash": draft_config(target, domino=False)}
    context = 32 if options.tiny else CONTEXT
    ids = np.random.default_rng(0).integers(
        0, configs["dflash"].mask_token_id, (options.limit, context)
    )

    def torch_models() -> TorchModels:
        import benchmark_nemo

        draft = benchmark_nemo.draft_model(configs["dflash"], target, attention="sdpa")
        return benchmark_nemo.target_model(target), {"nemo": draft}

    return Case(
        target=target,
        target_params=benchmark_ours.target_params(target),
        drafts={
            name: (config, benchmark_ours.draft_params(config)) for name, config in configs.items()
        },
        prompts=list(ids.astype(np.int32)),
        stops=(),
        context=context,
        torch_models=torch_models,
    )


def our_way(decoder: Decoder, weights: Weights, *, longest: int, count: int) -> Way:
    """Tokens and verifications of one prompt; every prompt uses the same compiled loop."""
    cache_len = required_cache_len(decoder, longest, count)

    def run(prompt: np.ndarray) -> tuple[list[int], int]:
        (answer,) = generate(decoder, weights, [prompt], max_new_tokens=count, cache_len=cache_len)
        return answer.tokens.tolist(), answer.verifications

    return run


def torch_ways(
    model: Any, drafts: dict[str, Any], stops: tuple[int, ...], *, count: int
) -> dict[str, Way]:
    """transformers and programs with a draft; verifications are counted at the target's forward."""
    import torch
    from benchmark_nemo import crop_to_length

    crop_to_length()
    calls: list[None] = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))

    def mode(run: Callable[[Any], Any]) -> Way:
        def counted(prompt: np.ndarray) -> tuple[list[int], int]:
            calls.clear()
            with torch.inference_mode():
                out = run(torch.tensor(prompt[None].astype(np.int64), device=model.device))
            return out[0, len(prompt) :].tolist(), len(calls) - 1  # the first call reads the prompt

        return counted

    limits = {"max_new_tokens": count, "do_sample": False, "eos_token_id": list(stops) or None}
    modes = {"transformers": mode(lambda ids: model.generate(ids, **limits))}
    for name, draft in drafts.items():
        modes[name] = mode(
            lambda ids, draft=draft: draft.eval().spec_generate(
                target=model,
                input_ids=ids,
                max_new_tokens=count,
                stop_token_ids=list(stops),
                temperature=0.0,
            )
        )
    return modes


def take_turns(modes: dict[str, Any], prompts: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Every way answers every prompt, the first once more before that to compile and warm up."""
    seconds: dict[str, float] = dict.fromkeys(modes, 0.0)
    answers: dict[str, list[tuple[list[int], int]]] = {name: [] for name in modes}
    for name, mode in modes.items():
        for prompt in (
            {len(prompt): prompt for prompt in prompts}.values() if name in OURS else prompts[:1]
        ):
            mode(prompt)
    for number, prompt in enumerate(prompts, start=1):
        for name, mode in modes.items():
            began = time.perf_counter()
            answers[name].append(mode(prompt))
            seconds[name] += time.perf_counter() - began
        print(f"{number}/{len(prompts)} prompts", file=sys.stderr)
    figures = {}
    for name, rows in answers.items():
        tokens, checks = sum(len(tokens) for tokens, _ in rows), sum(checks for _, checks in rows)
        same = sum(
            ours == plain for (ours, _), (plain, _) in zip(rows, answers["plain"], strict=True)
        )
        figures[name] = {
            "tokens_per_second": tokens / seconds[name],
            "tau": (tokens - len(rows))
            / checks,  # the first token of an answer comes from reading the prompt
            "seconds_per_verification": seconds[name] / checks,
            "tokens": tokens,
            "verifications": checks,
            "answers_equal_to_plain": same,
        }
    return figures


def show(report: dict[str, Any]) -> None:
    """The figures in words."""
    for name, mode in report["ways"].items():
        equal = f"{mode['answers_equal_to_plain']}/{report['prompts']} answers equal to plain"
        cycle = f"{mode['seconds_per_verification'] * 1e3:.2f} ms a verification"
        print(
            f"{name:13} {mode['tokens_per_second']:6.1f} tokens/s  tau {mode['tau']:.3f}  "
            f"{cycle}  {equal}"
        )
    single = report["verification"][1]
    print(f"one pass of the target, context {report['context']}: ", end="")
    print(
        ", ".join(
            f"{size} tokens {s * 1e3:.2f} ms ({s / single:.2f}x)"
            for size, s in report["verification"].items()
        )
    )
    for name, parts in report["cycle"].items():
        whole = parts["cycle"]
        shares = ", ".join(
            f"{part} {s / whole:.0%}" for part, s in parts.items() if part != "cycle"
        )
        print(f"cycle of {name}: {whole * 1e3:.2f} ms: {shares}")
    for size, batch in report["batches"].items():
        print(f"batch {size}: {batch['tokens_per_second']:.1f} tokens/s, tau {batch['tau']:.3f}")


if __name__ == "__main__":
    main()
