"""What went wrong for users of the other trainers, and the tests that keep it from happening here.

Beside each test stands what was changed by hand to see it fail (2026-11-24). Every test was tried
alone, and alone under each of its changes where a semicolon parts several; every time it failed for
what the entry says.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# What happened there · the tests here, each with the faults that it was seen to fail under.
PITFALLS = {
    "shift_label missing from the saved config": {
        "interop/test_hf_config.py::test_config_json_has_what_every_reader_insists_on": (
            "interop/hf.py: shift_label not written (what was saved does not read back)"
        ),
    },
    "shift_label guessed on load": {
        "interop/test_hf_config_read.py::test_load_refuses_other_configs": (
            "interop/hf.py: shift_label read with a default"
        ),
    },
    "rotary frequencies rounded to bfloat16 by a model-wide cast": {
        "layers/test_rotary.py::test_rotary_is_as_exact_as_float32_up_to_100k_positions": (
            "layers.py: frequencies cast to bfloat16"
        ),
    },
    "rotary base or partial factor read from the wrong key, or written under one key only": {
        "interop/test_hf_config_read.py::test_load_refuses_other_configs": (
            "interop/hf.py: base read at the top alone; partial_rotary_factor accepted"
        ),
        "target/test_decoder_keys.py::test_read_decoder_config_refuses": (
            "target/load.py: the first base taken though another differs; "
            "partial_rotary_factor accepted"
        ),
        "interop/test_hf_config.py::test_config_json_has_what_every_reader_insists_on": (
            "interop/hf.py: no base in rope_parameters"
        ),
    },
    "context up to and with the anchor": {
        "draft/test_mask.py::test_context_span_ends_strictly_before_the_anchor": (
            "draft/mask.py: the anchor included"
        ),
    },
    "labels shifted by one": {
        "draft/test_blocks.py::test_make_blocks_equals_the_loop": (
            "draft/blocks.py: labels from the anchor itself on; target_ids alone one earlier"
        ),
    },
    "hidden state off by one layer": {
        "target/test_target_model.py::test_target_equals_transformers": (
            "target/model.py: a layer's input captured, unrolled; the same, scanned"
        ),
    },
    "mask token aliases eos, pad or bos, or changes on resume or import": {
        "config/test_run.py::test_make_draft_config_refuses_what_does_not_fit_the_target": (
            "config.py: special tokens not compared"
        ),
        "interop/test_start.py::test_a_mask_token_that_became_special_is_refused_on_resume": (
            "training/inputs.py: pad left out of the special tokens"
        ),
        "cli/test_export_import.py::test_import_checks_mask_token_template_and_shape": (
            "cli/shared.py: special tokens not compared"
        ),
        "training/test_loop.py::test_a_run_directory_belongs_to_its_settings": (
            "training/loop.py: mask_token_id free to change"
        ),
    },
    "no valid anchor in a batch: crash or hang": {
        "training/test_modules.py::test_a_batch_without_anchors_has_no_loss_and_no_gradient": (
            "training/modules.py: divided by the divisor alone"
        ),
        "training/test_step.py::test_a_batch_without_anchors_moves_nothing_and_is_counted": (
            "training/step.py: divided by the loss weight alone; "
            "training/metrics.py: such a batch not counted"
        ),
    },
    "fully masked attention rows: NaN": {
        "kernels/test_block_attention.py::"
        "test_block_attention_of_an_unused_slot_sees_its_own_block_only": (
            "kernels/block_attention.py: own block masked with -inf where the context is, "
            "which gives NaN"
        ),
    },
    "a boolean mask added as +1 and 0": {
        "kernels/test_block_attention.py::test_tiled_form_equals_the_definition": (
            "kernels/block_attention.py: `scores + seen`"
        ),
    },
    "merged softmaxes: the log-sum-exp's gradient is dropped without a word": {
        "kernels/test_block_attention.py::test_tiled_form_equals_the_definition": (
            "kernels/block_attention.py: a score's gradient without the merged output's part, "
            "in the context; in the own block"
        ),
    },
    "shapes that depend on the data: recompilation late in an epoch": {
        "data/test_pipeline.py::test_batches_are_the_padded_rows": (
            "data/pipeline.py: padded to the longest of a batch"
        ),
        "data/test_pipeline.py::test_heldout_batches_drop_nothing": (
            "data/pipeline.py: padded to the longest of a batch"
        ),
        "training/test_loop.py::test_the_step_is_compiled_once": (
            "data/pipeline.py: padded to the longest of a batch; "
            "training/loop.py: the step jitted anew every time; "
            "the held-out pass jitted anew every time"
        ),
        "training/test_step.py::test_one_trace_serves_many_steps": (
            "training/step.py: the step counter turned into float32 by the first step"
        ),
    },
    "whole logits twice": {
        "kernels/test_vocabulary_loss.py::"
        "test_vocabulary_loss_in_chunks_holds_the_logits_of_one_chunk": (
            "kernels/vocabulary_loss.py: chunk_blocks ignored"
        ),
    },
    "a dense mask of gigabytes": {
        "training/test_modules.py::test_no_array_has_the_shape_of_the_dense_mask": (
            "draft/backbone.py: the definition of block attention, "
            "with scores over the whole context"
        ),
    },
    "head not saved, random embedding exported, unknown keys skipped": {
        "interop/test_hf.py::test_hf_tensors_names_every_tensor_of_the_format_and_no_other": (
            "interop/hf.py: embed_proj left out; an embedding added"
        ),
        "interop/test_hf_load.py::test_load_refuses_other_tensors": (
            "interop/hf.py: check_tensors left out on load"
        ),
    },
    "gamma None silently off or on": {
        "training/test_loss.py::test_position_weights_equal_the_loop": (
            "training/loss.py: None read as 7; no decay whatever gamma is"
        ),
        "training/test_loop.py::test_the_resolved_recipe_is_printed_and_stored": (
            "training/loop.py: the recipe not printed; only run_dir stored"
        ),
    },
    "a tied head ignored": {
        "target/test_target_model.py::test_lm_head_weight_is_the_embedding_only_when_tied": (
            "target/model.py: zeros where no head is stored; the embedding always"
        ),
    },
    "resume replays the epoch or loses the order": {
        "training/test_resume.py::test_a_run_that_is_stopped_ends_with_the_same_bits": (
            "training/checkpoint.py: `data` left out of what is restored; "
            "training/loop.py: a fresh iterator after restoring; "
            "another shuffle seed after a restart; saved after the next rows were taken"
        ),
        "training/test_resume.py::test_a_killed_process_goes_on_with_the_same_bits": (
            "training/loop.py: saved after the next rows were taken, "
            "except by the last step (fails after SIGKILL)"
        ),
    },
    "an unfinished save picked up": {
        "training/test_resume.py::test_an_unfinished_save_is_never_picked_up": (
            "training/checkpoint.py: the newest directory taken, whatever Orbax says of it, "
            "in load_draft; the same in restore_checkpoint "
            "(both stop at step 8, which is not whole)"
        ),
    },
    "trained at 98 %, served at 10 %: drafting differs from training": {
        "decoding/test_speculate.py::test_a_cycle_drafts_what_training_would_predict": (
            "decoding/speculate.py: block positions one later"
        ),
    },
    "trained at 98 %, served at 10 %: another chat template": {
        "cli/test_decode.py::test_another_chat_template_is_refused": (
            "cli/shared.py: the hashes not compared"
        ),
    },
    "averages biased by short batches": {
        "training/test_step.py::test_metric_means_weigh_by_tokens_and_blocks": (
            "training/metrics.py: mean of the batches' losses; of their acceptance lengths; "
            "of their base accuracies"
        ),
        "training/test_step.py::test_micro_batches_give_the_gradient_of_one_large_batch": (
            "training/step.py: the mean of the micro-batches' gradients"
        ),
    },
    "bfloat16 masters and softmax": {
        "layers/test_dense.py::test_dense_keeps_a_float32_master_and_computes_in_its_dtype": (
            "layers.py: masters in `dtype`"
        ),
        "kernels/test_vocabulary_loss.py::"
        "test_vocabulary_loss_of_bfloat16_states_has_float32_logits": (
            "kernels/products.py: logits in bfloat16, then cast to float32"
        ),
    },
    "offline states fill the disk": {
        "training/test_capture.py::test_the_size_is_told_first_and_limited": (
            "training/capture.py: the limit not asked; the size not told"
        ),
    },
    "a batch without anchors still moves the weights through the moments": {
        "training/test_step.py::test_a_batch_without_anchors_moves_nothing_and_is_counted": (
            "training/step.py: every finite update taken"
        ),
        "training/test_step.py::test_eight_devices_equal_one": (
            "training/step.py: every finite update taken"
        ),
    },
    "a NaN is trained on, saved, and the good checkpoints are rotated away": {
        "training/test_step.py::test_one_micro_batch_that_is_not_finite_skips_the_step": (
            "training/step.py: taken whatever loss and norm are; sums of a skipped step added up"
        ),
        "training/test_skips.py::test_parameters_that_overflowed_are_never_saved": (
            "training/loop.py: saved whatever they are"
        ),
        "training/test_skips.py::test_a_poisoned_line_is_named_skipped_and_survived": (
            "training/step.py: taken whatever loss and norm are; "
            "data/conversations.py: lines counted without empty ones"
        ),
        "training/test_skips.py::test_a_run_that_goes_astray_stops_with_finite_checkpoints": (
            "training/skips.py: never too many"
        ),
    },
    "a flipped bit in a checkpoint trains on in silence": {
        "training/test_checkpoint.py::test_damage_is_named_and_the_one_before_is_taken": (
            "training/checkpoint.py: no file looked at"
        ),
        "test_files.py::test_every_flipped_bit_is_damage": (
            "files.py: missing and new files alone looked for"
        ),
    },
    "a run that lost its checkpoints begins again without a word": {
        "training/test_checkpoint.py::test_a_run_without_a_good_checkpoint_never_begins_again": (
            "training/checkpoint.py: none left taken for none saved"
        ),
    },
    "resumed with other data, weights, tokens or another template": {
        "training/test_checkpoint.py::test_what_changed_is_named": (
            "training/run_directory.py: inputs not compared; the template not compared"
        ),
        "training/test_checkpoint.py::test_a_draft_is_not_used_with_another_target": (
            "cli/shared.py: not compared"
        ),
    },
    "the log of a resumed run differs from that of an undisturbed one": {
        "training/test_resume.py::test_a_run_that_is_stopped_ends_with_the_same_bits": (
            "training/loop.py: a new window after a start; "
            "the held-out pass that was cut off left out"
        ),
        "training/test_metrics.py::test_a_log_that_was_changed_is_refused": (
            "training/metrics.py: not compared"
        ),
    },
    "an evaluator that does not say what it measured": {
        "cli/test_verbs.py::test_from_prompts_to_an_evaluated_run": (
            "cli/decode.py: no chat_template in evaluation.json; "
            "report.py: no proposals above the table"
        ),
    },
}
NAMED = sorted({name for tests in PITFALLS.values() for name in tests})


@pytest.mark.parametrize("name", NAMED)
def test_the_named_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
