"""The planted bugs."""

from __future__ import annotations

from tests.mutants.losses import OF_METHODS
from tests.mutants.plant import Mutant, mutant_of
from tests.mutants.rounds import ROUNDS

MICRO_TEST = "test_module.py::test_gradients_same_for_any_micro_batch"
GRADIENT_TEST = "test_module.py::test_gradient_is_mean_loss_plus_weighted_divergence"

SHARED = (
    mutant_of(
        "weights_of_rows_ignored",
        "losses.base.weighted",
        "losses * logps.weight",
        "losses",
        "verify:spo:tabular:steps",
        "verify:spo_ranked:tabular:steps",
        "test_losses.py::test_weights_scale_the_loss_and_labels_default_to_certain[spo]",
    ),
    mutant_of(
        "soft_labels_ignored",
        "losses.base.PreferenceLoss.__call__",
        "if preference is None or",
        "if True or",
        "test_losses.py::test_loss_value_and_gradient_equal_numpy[soft-dpo]",
        "test_losses.py::test_loss_ignores_swapping_the_pair_and_its_label[spo]",
    ),
    mutant_of(
        "soft_labels_of_lists_ignored",
        "losses.base.ListLoss.__call__",
        "if preference is None",
        "if True",
        "test_ranked.py::test_list_of_two_equals_a_pair",
    ),
    mutant_of(
        "state_of_the_last_completion_token",
        "objective.scored.ScoredBatch.prompt_states",
        "lengths.cumsum(0) - lengths",
        "lengths.cumsum(0) - 1",
        "test_policy_states.py::test_states_are_those_of_a_plain_forward_pass[padded-plain]",
    ),
)

DIVERGENCES = (
    mutant_of(
        "kl_of_the_other_sign",
        "objective.enumerated.EnumeratedDivergence.terms",
        "return self.weight(step)",
        "return -self.weight(step)",
        "verify:spo:tabular:steps",
        "verify:spo:tabular:optimum+kl",
    ),
    mutant_of(
        "kl_doubled",
        "objective.enumerated.EnumeratedDivergence.terms",
        "return self.weight(step)",
        "return 2 * self.weight(step)",
        "verify:spo:tabular:steps",
        "verify:spo:tabular:optimum+kl",
    ),
    mutant_of(
        "kl_halved",
        "regularizers.base.Regularizer.weight_at",
        "return beta if",
        "return beta / 2 if",
        "verify:spo:tabular:steps",
        "test_regularizers.py::test_weight_follows_beta_or_is_a_number",
    ),
    mutant_of(
        "kl_of_the_other_direction",
        "regularizers.enumerated_kl.EnumeratedKL.__call__",
        "kl(policy_logps, reference_logps)",
        "kl(reference_logps, policy_logps)",
        "verify:spo:tabular:steps",
        "verify:ipo:tabular:steps",
    ),
    mutant_of(
        "kl_as_a_sum_over_prompts",
        "objective.enumerated.EnumeratedDivergence.terms",
        "divergence.mean()",
        "divergence.sum()",
        "verify:spo:tabular:steps",
        "verify:ipo:tabular:steps",
    ),
    mutant_of(
        "sampled_kl_of_the_other_sign",
        "objective.samples.SampleDivergence.terms",
        "return weight * divergence.sum()",
        "return -weight * divergence.sum()",
        "verify:spo:tabular:sampled",
        f"{GRADIENT_TEST}[spo_global]",
    ),
    mutant_of(
        "sampled_kl_doubled",
        "objective.samples.SampleDivergence.terms",
        "return weight * divergence.sum()",
        "return 2 * weight * divergence.sum()",
        "verify:spo:tabular:sampled",
        f"{GRADIENT_TEST}[spo_global]",
    ),
    mutant_of(
        "sampled_kl_as_a_mean_of_micro_batches",
        "objective.samples.SampleDivergence.terms",
        "divergence.sum() / len(index)",
        "divergence.sum() / len(part)",
        "test_kl_estimators.py::test_step_gradient_is_mean_over_micro_batches[tokenwise]",
    ),
    mutant_of(
        "k1_in_place_of_the_estimator",
        "regularizers.global_kl.GlobalKL.__call__",
        "KL_ESTIMATORS[self.estimator]",
        'KL_ESTIMATORS["k1"]',
        "verify:spo:tabular:sampled",
        "test_regularizers.py::test_local_and_global_kl_are_same_function_of_sequences",
    ),
    mutant_of(
        "k1_for_k3",
        "ops.divergence.k3_kl",
        "torch.expm1(w) - w",
        "-w",
        "test_kl_estimators.py::test_estimate_never_negative[k3]",
        "test_kl_estimators.py::test_batch_equals_loop_over_tokens[k3]",
    ),
    mutant_of(
        "token_kl_per_token",
        "ops.divergence.tokenwise_kl",
        "sum_per_sequence(token_kl(policy_logits, reference_logits), sequences)",
        "sum_per_sequence(token_kl(policy_logits, reference_logits), sequences) / sequences.completion_length",
        "verify:spo:tabular:sampled",
        "test_kl_estimators.py::test_batch_equals_loop_over_tokens[tokenwise]",
    ),
    mutant_of(
        "local_kl_of_the_chosen_alone",
        "types.PreferenceBatch.mean_per_pair",
        "self.per_completion(values).sum(0) / self.mask().sum(0)",
        "self.per_completion(values)[0]",
        f"{GRADIENT_TEST}[ipo_local]",
    ),
)

SAMPLING = (
    mutant_of(
        "buffer_at_temperature_0.7",
        "sampling.buffer.SampleBuffer.refresh",
        "temperature=1.0",
        "temperature=0.7",
        "verify:spo:tabular:sampled",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_buffer_samples_follow_the_policy",
    ),
    mutant_of(
        "tokens_drawn_at_temperature_0.7",
        "sampling.draw.relative_weights",
        "/ temperature",
        "/ (0.7 * temperature)",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_samples_follow_the_exact_distribution[static]",
    ),
    mutant_of(
        "probe_at_temperature_0.7",
        "watch.Probe._measure",
        "temperature=1.0",
        "temperature=0.7",
        "test_health.py::test_probe_agrees_with_enumeration",
    ),
    mutant_of(
        "stale_buffer_never_refreshed",
        "sampling.buffer.SampleBuffer.is_stale",
        "self.drawn_at is None or step - self.drawn_at >= self.refresh_every",
        "self.drawn_at is None",
        "verify:spo:tabular:sampled",
        "test_sampling.py::test_buffer_is_stale_at_first_and_every_few_steps",
    ),
    mutant_of(
        "only_the_first_stop_token_ends",
        "sampling.generate.as_sequences",
        "torch.tensor(stop_ids, device",
        "torch.tensor(stop_ids[:1], device",
        "test_stops.py::test_both_samplers_stop_at_the_first_of_the_stop_tokens",
    ),
    mutant_of(
        "stop_token_left_out_of_a_sample",
        "sampling.generate.as_sequences",
        "(is_stop.cumsum(1) - is_stop == 0)",
        "(is_stop.cumsum(1) == 0)",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_first_generated_eos_ends_a_completion",
    ),
)

TOKENS = (
    mutant_of(
        "mean_over_tokens_in_place_of_the_sum",
        "ops.logps.sum_per_sequence",
        ".sum(dim=1)",
        ".sum(dim=1) / sequences.completion_length",
        "verify:spo:tabular:steps",
        "verify:dpo:tabular:steps",
        "test_ops.py::test_sum_per_sequence_value_and_gradient",
    ),
    mutant_of(
        "labels_shifted_by_one",
        "ops.logps.completion_targets",
        "sequences.completion_index)",
        "sequences.completion_index - 1)",
        "verify:spo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    mutant_of(
        "first_completion_token_left_out",
        "types.Sequences.completion_mask",
        ">= self.prompt_length[:, None]",
        "> self.prompt_length[:, None]",
        "verify:spo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    mutant_of(
        "last_completion_token_left_out",
        "types.Sequences.completion_mask",
        "& self.attention_mask",
        "& (self._positions() < self.length[:, None] - 1)",
        "verify:dpo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    mutant_of(
        "last_prompt_token_included",
        "types.Sequences.completion_mask",
        ">= self.prompt_length[:, None]",
        ">= self.prompt_length[:, None] - 1",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
        "test_ops.py::test_masks_follow_positions_if_bos_eos_and_pad_coincide",
    ),
    mutant_of(
        "a_padding_token_counted",
        "types.Sequences.attention_mask",
        "< self.length[:, None]",
        "<= self.length[:, None]",
        "verify:spo:tabular:steps",
        "test_ops.py::test_masks_follow_positions_if_bos_eos_and_pad_coincide",
    ),
    mutant_of(
        "reference_logps_of_the_other_completion",
        "data.collate._per_sequence",
        "return values.flatten()",
        "return values.flip(0).flatten()",
        "data/test_batches.py::test_reference_logps_follow_their_pairs",
        "test_module.py::test_precomputed_reference_logps_are_used",
    ),
)

STEPS = (
    mutant_of(
        "mean_of_micro_batch_means",
        "objective.pairs.Pairs.terms",
        "return total * scale",
        "return total * self.run.world_size / len(batch) / len(window.micro_batches)",
        "verify:dpo:tabular:steps",
        f"{MICRO_TEST}[dpo]",
    ),
    mutant_of(
        "sum_of_micro_batch_means",
        "objective.pairs.Pairs.terms",
        "return total * scale",
        "return total * self.run.world_size / len(batch)",
        "verify:spo:tabular:steps",
        f"{MICRO_TEST}[dpo]",
    ),
    mutant_of(
        "weights_of_micro_batches_in_place_of_the_step",
        "objective.pairs.Pairs._score_ahead",
        "len(batches) == 1 or",
        "True or",
        "verify:spo_weighted:tabular:steps",
        "test_joint_losses.py::test_batches_do_not_change_a_loss_of_all_pairs[pairs]",
    ),
    mutant_of(
        "schedules_one_step_ahead",
        "objective.pairs.Pairs.losses",
        "self.run.alpha(step), self.run.beta(step)",
        "self.run.alpha(step + 1), self.run.beta(step + 1)",
        "test_module.py::test_step_uses_its_own_coefficients_and_learning_rate",
    ),
    mutant_of(
        "weight_of_the_kl_one_step_ahead",
        "objective.base.Divergence.weight",
        "self.run.beta(step)",
        "self.run.beta(step + 1)",
        "test_module.py::test_step_uses_its_own_coefficients_and_learning_rate",
    ),
    mutant_of(
        "linear_schedule_one_step_longer",
        "schedules.fixed.Linear.fraction",
        "max(self.steps - 1, 1)",
        "max(self.steps, 1)",
        "test_schedules.py::test_linear_reaches_its_end_and_stays",
    ),
    mutant_of(
        "warm_up_two_steps_at_a_time",
        "module.AlignmentModule._step",
        "cast(LRScheduler, self.lr_schedulers()).step()",
        "[cast(LRScheduler, self.lr_schedulers()).step() for _ in range(2)]",
        "test_module.py::test_step_uses_its_own_coefficients_and_learning_rate",
    ),
    Mutant(
        "clipping_after_the_step",
        "spo.module.AlignmentModule._step",
        (
            ("grad_norm = clip", "optimizer.step(); grad_norm = clip"),
            ("grad_norm, group):\n        optimizer.step()", "grad_norm, group):\n        pass"),
        ),
        ("test_module.py::test_gradient_clipping_limits_norm[0.01]",),
    ),
    mutant_of(
        "policy_in_place_of_the_reference",
        "models.reference.FrozenReference.active",
        "yield self.model",
        "yield policy",
        "verify:dpo:tabular:steps",
        "verify:spo:tabular:steps",
        f"{GRADIENT_TEST}[dpo]",
    ),
    mutant_of(
        "gradient_through_the_reference",
        "models.reference.AdapterOffReference.active",
        "torch.no_grad()",
        "torch.enable_grad()",
        "test_references.py::test_reference_used_inside_step_keeps_policy_gradient",
    ),
    mutant_of(
        "seed_ignored_in_the_order",
        "data.windows._order",
        "windows.seed",
        "0",
        "data/test_batches.py::test_order_depends_on_seed_and_step_only",
    ),
)

METRICS = (
    mutant_of(
        "accuracy_counts_ties_as_right",
        "losses.base.is_higher",
        "(chosen > rejected)",
        "(chosen >= rejected)",
        "test_losses.py::test_equal_implicit_rewards_count_one_half",
    ),
    mutant_of(
        "ties_of_the_win_rate_lost",
        "evaluation.winrate.verdict_of_rewards",
        "0.5 + 0.5 * ((first > second) - (first < second))",
        "float(first > second)",
        "test_evaluation.py::test_an_opponent_with_the_same_samples_is_a_tie",
    ),
    mutant_of(
        "bootstrap_over_samples",
        "stats.Bootstrap.resample",
        "generator = np.random.default_rng(self.seed)",
        "generator, units = np.random.default_rng(self.seed), [*range(len(units))]",
        "test_winrate.py::test_samples_of_a_prompt_are_resampled_together",
    ),
    Mutant(
        "mean_of_batch_means_in_metrics",
        "spo.metrics.sums.SumsAndCounts._sum_stored",
        (
            ("(~missing).sum()", "len(tensors)"),
            (
                "elements.masked_fill(missing, 0).sum()",
                "sum(tensor.mean() for tensor in tensors)",
            ),
        ),
        ("test_metrics.py::test_every_element_counts_once_for_any_batching",),
    ),
    mutant_of(
        "holm_without_its_maximum",
        "stats.holm",
        "max(highest, min(",
        "max(0.0, min(",
        "test_stats.py::test_holm_by_hand",
    ),
)

MUTANTS = (*SHARED, *OF_METHODS, *DIVERGENCES, *SAMPLING, *TOKENS, *STEPS, *METRICS, *ROUNDS)
