"""The planted bugs."""

from __future__ import annotations

from tests.mutants.plant import Mutant


def _mutant(name: str, function: str, right: str, wrong: str, *ids: str) -> Mutant:
    return Mutant(name, f"spo.{function}", ((right, wrong),), ids)


LOSS_TEST = "test_losses.py::test_loss_value_and_gradient_equal_numpy"
MICRO_TEST = "test_module.py::test_gradients_same_for_any_micro_batch"
GRADIENT_TEST = "test_module.py::test_gradient_is_mean_loss_plus_weighted_divergence"

LOSSES = (
    _mutant(
        "spo_without_1_over_alpha",
        "losses.spo.SPOLoss.of_pairs",
        "-logsigmoid(alpha * policy_margin(pair)) / alpha",
        "-logsigmoid(alpha * policy_margin(pair))",
        "verify:spo:tabular:steps",
        "verify:spo:tabular:optimum+kl",
        f"{LOSS_TEST}[hard-spo]",
    ),
    _mutant(
        "choices_without_1_over_alpha",
        "losses.choices.choice_losses",
        ".logsumexp(-1) / alpha",
        ".logsumexp(-1)",
        "verify:spo_ranked:tabular:steps",
    ),
    _mutant(
        "choices_among_fewer",
        "losses.choices.choice_losses",
        "triu(1)",
        "triu(2)",
        "verify:spo_best_of_n:tabular:steps",
        "test_ranked.py::test_list_loss_at_equal_log_probs_counts_rankings[3]",
    ),
    _mutant(
        "spo_weights_of_pairs_ignored",
        "losses.base.weighted",
        "losses * logps.weight",
        "losses",
        "verify:spo:tabular:steps",
        "verify:spo_ranked:tabular:steps",
        "test_losses.py::test_weights_scale_the_loss_and_labels_default_to_certain[spo]",
    ),
    _mutant(
        "soft_labels_ignored",
        "losses.base.PreferenceLoss.__call__",
        "if preference is None or",
        "if True or",
        f"{LOSS_TEST}[soft-dpo]",
        "test_losses.py::test_loss_ignores_swapping_the_pair_and_its_label[spo]",
    ),
    _mutant(
        "soft_labels_of_lists_ignored",
        "losses.base.ListLoss.__call__",
        "if preference is None",
        "if True",
        "test_ranked.py::test_list_of_two_equals_a_pair",
    ),
    _mutant(
        "dpo_per_token",
        "losses.dpo.DPOLoss.of_pairs",
        "policy_margin(pair) - reference_margin(pair)",
        "(policy_margin(pair) - reference_margin(pair)) / pair.chosen_length",
        "verify:dpo:tabular:steps",
        f"{LOSS_TEST}[hard-dpo]",
    ),
    _mutant(
        "dpo_beta_on_the_policy_alone",
        "losses.dpo.DPOLoss.of_pairs",
        "policy_margin(pair) - reference_margin(pair)",
        "policy_margin(pair) - reference_margin(pair) / beta",
        "verify:dpo:tabular:steps",
        f"{LOSS_TEST}[hard-dpo]",
    ),
    _mutant(
        "cdpo_smoothing_of_the_wrong_sign",
        "losses.dpo.DPOLoss.of_pairs",
        "-beta * margin",
        "beta * margin",
        "verify:cdpo:tabular:steps",
        f"{LOSS_TEST}[hard-cdpo]",
    ),
    _mutant(
        "reference_swaps_chosen_and_rejected",
        "losses.base.reference_margin",
        "pair.reference_chosen - pair.reference_rejected",
        "pair.reference_rejected - pair.reference_chosen",
        "verify:dpo:tabular:steps",
        f"{LOSS_TEST}[hard-dpo]",
    ),
    _mutant(
        "ipo_without_length_normalization",
        "losses.ipo.IPOLoss._ratios",
        "not self.length_normalize",
        "True",
        "verify:ipo:tabular:steps",
        f"{LOSS_TEST}[hard-ipo_mean]",
        "test_losses.py::test_ipo_sums_and_averages_differ_by_length",
    ),
    _mutant(
        "ipo_target_of_1_over_tau",
        "losses.ipo.IPOLoss.of_pairs",
        "1 / (2 * beta)",
        "1 / beta",
        "verify:ipo_sum:tabular:steps",
        f"{LOSS_TEST}[hard-ipo_sum]",
    ),
    _mutant(
        "gradient_through_the_weight_of_a_pair",
        "losses.spo.WeightedSPOLoss.weights",
        "pair.policy_chosen.detach()",
        "pair.policy_chosen",
        "test_losses.py::test_weighted_spo_gradient_holds_the_weight_fixed",
        "verify:spo_weighted:tabular:steps",
    ),
    _mutant(
        "wrong_optimum_of_dpo",
        "losses.dpo.DPOLoss.optimum",
        "rewards / beta",
        "rewards * beta",
        "verify:dpo:tabular:optimum",
        "test_exact.py::test_spo_and_dpo_optima_match_papers[0.3]",
    ),
)

DIVERGENCES = (
    _mutant(
        "kl_of_the_other_sign",
        "objective.enumerated.EnumeratedDivergence.terms",
        "return self.weight(step)",
        "return -self.weight(step)",
        "verify:spo:tabular:steps",
        "verify:spo:tabular:optimum+kl",
    ),
    _mutant(
        "kl_doubled",
        "objective.enumerated.EnumeratedDivergence.terms",
        "return self.weight(step)",
        "return 2 * self.weight(step)",
        "verify:spo:tabular:steps",
        "verify:spo:tabular:optimum+kl",
    ),
    _mutant(
        "kl_halved",
        "regularizers.base.Regularizer.weight_at",
        "return beta if",
        "return beta / 2 if",
        "verify:spo:tabular:steps",
        "test_regularizers.py::test_weight_follows_beta_or_is_a_number",
    ),
    _mutant(
        "kl_of_the_other_direction",
        "regularizers.enumerated_kl.EnumeratedKL.__call__",
        "kl(policy_logps, reference_logps)",
        "kl(reference_logps, policy_logps)",
        "verify:spo:tabular:steps",
        "verify:ipo:tabular:steps",
    ),
    _mutant(
        "kl_as_a_sum_over_prompts",
        "objective.enumerated.EnumeratedDivergence.terms",
        "divergence.mean()",
        "divergence.sum()",
        "verify:spo:tabular:steps",
        "verify:ipo:tabular:steps",
    ),
    _mutant(
        "sampled_kl_of_the_other_sign",
        "objective.samples.SampleDivergence.terms",
        "return weight * divergence.sum()",
        "return -weight * divergence.sum()",
        "verify:spo:tabular:sampled",
        f"{GRADIENT_TEST}[spo_global]",
    ),
    _mutant(
        "sampled_kl_doubled",
        "objective.samples.SampleDivergence.terms",
        "return weight * divergence.sum()",
        "return 2 * weight * divergence.sum()",
        "verify:spo:tabular:sampled",
        f"{GRADIENT_TEST}[spo_global]",
    ),
    _mutant(
        "sampled_kl_as_a_mean_of_micro_batches",
        "objective.samples.SampleDivergence.terms",
        "divergence.sum() / len(index)",
        "divergence.sum() / len(part)",
        "test_kl_estimators.py::test_step_gradient_is_mean_over_micro_batches[tokenwise]",
    ),
    _mutant(
        "k1_in_place_of_the_estimator",
        "regularizers.global_kl.GlobalKL.__call__",
        "KL_ESTIMATORS[self.estimator]",
        'KL_ESTIMATORS["k1"]',
        "verify:spo:tabular:sampled",
        "test_regularizers.py::test_local_and_global_kl_are_same_function_of_sequences",
    ),
    _mutant(
        "k1_for_k3",
        "ops.divergence.k3_kl",
        "torch.expm1(w) - w",
        "-w",
        "test_kl_estimators.py::test_estimate_never_negative[k3]",
        "test_kl_estimators.py::test_batch_equals_loop_over_tokens[k3]",
    ),
    _mutant(
        "token_kl_per_token",
        "ops.divergence.tokenwise_kl",
        "sum_per_sequence(token_kl(policy_logits, reference_logits), sequences)",
        "sum_per_sequence(token_kl(policy_logits, reference_logits), sequences) / sequences.completion_length",
        "verify:spo:tabular:sampled",
        "test_kl_estimators.py::test_batch_equals_loop_over_tokens[tokenwise]",
    ),
    _mutant(
        "local_kl_of_the_chosen_alone",
        "types.PreferenceBatch.mean_per_pair",
        "self.per_completion(values).sum(0) / self.mask().sum(0)",
        "self.per_completion(values)[0]",
        f"{GRADIENT_TEST}[ipo_local]",
    ),
)

SAMPLING = (
    _mutant(
        "buffer_at_temperature_0.7",
        "sampling.buffer.SampleBuffer.refresh",
        "temperature=1.0",
        "temperature=0.7",
        "verify:spo:tabular:sampled",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_buffer_samples_follow_the_policy",
    ),
    _mutant(
        "tokens_drawn_at_temperature_0.7",
        "sampling.draw.next_tokens",
        "/ temperature",
        "/ (0.7 * temperature)",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_samples_follow_the_exact_distribution[static]",
    ),
    _mutant(
        "probe_at_temperature_0.7",
        "watch.Probe._measure",
        "temperature=1.0",
        "temperature=0.7",
        "test_health.py::test_probe_agrees_with_enumeration",
    ),
    _mutant(
        "stale_buffer_never_refreshed",
        "sampling.buffer.SampleBuffer.is_stale",
        "self.drawn_at is None or step - self.drawn_at >= self.refresh_every",
        "self.drawn_at is None",
        "verify:spo:tabular:sampled",
        "test_sampling.py::test_buffer_is_stale_at_first_and_every_few_steps",
    ),
    _mutant(
        "only_the_first_stop_token_ends",
        "sampling.generate.sample",
        "torch.tensor(stop_ids, device=device)",
        "torch.tensor(stop_ids[:1], device=device)",
        "test_stops.py::test_both_samplers_stop_at_the_first_of_the_stop_tokens",
    ),
    _mutant(
        "stop_token_left_out_of_a_sample",
        "sampling.generate.sample",
        "(is_stop.cumsum(1) - is_stop == 0)",
        "(is_stop.cumsum(1) == 0)",
        "verify:spo:tiny:sampler",
        "test_sampling.py::test_first_generated_eos_ends_a_completion",
    ),
)

TOKENS = (
    _mutant(
        "mean_over_tokens_in_place_of_the_sum",
        "ops.logps.sum_per_sequence",
        ".sum(dim=1)",
        ".sum(dim=1) / sequences.completion_length",
        "verify:spo:tabular:steps",
        "verify:dpo:tabular:steps",
        "test_ops.py::test_sum_per_sequence_value_and_gradient",
    ),
    _mutant(
        "labels_shifted_by_one",
        "ops.logps.completion_targets",
        "sequences.completion_index)",
        "sequences.completion_index - 1)",
        "verify:spo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    _mutant(
        "first_completion_token_left_out",
        "types.Sequences.completion_mask",
        ">= self.prompt_length[:, None]",
        "> self.prompt_length[:, None]",
        "verify:spo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    _mutant(
        "last_completion_token_left_out",
        "types.Sequences.completion_mask",
        "& self.attention_mask",
        "& (self._positions() < self.length[:, None] - 1)",
        "verify:dpo:tabular:steps",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
    ),
    _mutant(
        "last_prompt_token_included",
        "types.Sequences.completion_mask",
        ">= self.prompt_length[:, None]",
        ">= self.prompt_length[:, None] - 1",
        "test_ops.py::test_log_probs_count_completion_tokens_only",
        "test_ops.py::test_masks_follow_positions_if_bos_eos_and_pad_coincide",
    ),
    _mutant(
        "a_padding_token_counted",
        "types.Sequences.attention_mask",
        "< self.length[:, None]",
        "<= self.length[:, None]",
        "verify:spo:tabular:steps",
        "test_ops.py::test_masks_follow_positions_if_bos_eos_and_pad_coincide",
    ),
    _mutant(
        "reference_logps_of_the_other_completion",
        "data.collate._per_sequence",
        "return values.flatten()",
        "return values.flip(0).flatten()",
        "data/test_batches.py::test_reference_logps_follow_their_pairs",
        "test_module.py::test_precomputed_reference_logps_are_used",
    ),
)

STEPS = (
    _mutant(
        "mean_of_micro_batch_means",
        "objective.pairs.Pairs.terms",
        "return total * scale",
        "return total * self.run.world_size / len(batch) / len(window.micro_batches)",
        "verify:dpo:tabular:steps",
        f"{MICRO_TEST}[dpo]",
    ),
    _mutant(
        "sum_of_micro_batch_means",
        "objective.pairs.Pairs.terms",
        "return total * scale",
        "return total * self.run.world_size / len(batch)",
        "verify:spo:tabular:steps",
        f"{MICRO_TEST}[dpo]",
    ),
    _mutant(
        "weights_of_micro_batches_in_place_of_the_step",
        "objective.pairs.Pairs._score_ahead",
        "len(batches) == 1 or",
        "True or",
        "verify:spo_weighted:tabular:steps",
        "test_joint_losses.py::test_batches_do_not_change_a_loss_of_all_pairs[pairs]",
    ),
    _mutant(
        "schedules_one_step_ahead",
        "objective.pairs.Pairs.losses",
        "self.run.alpha(step), self.run.beta(step)",
        "self.run.alpha(step + 1), self.run.beta(step + 1)",
        "test_module.py::test_step_uses_its_own_coefficients_and_learning_rate",
    ),
    _mutant(
        "weight_of_the_kl_one_step_ahead",
        "objective.base.Divergence.weight",
        "self.run.beta(step)",
        "self.run.beta(step + 1)",
        "test_module.py::test_step_uses_its_own_coefficients_and_learning_rate",
    ),
    _mutant(
        "linear_schedule_one_step_longer",
        "schedules.fixed.Linear.fraction",
        "max(self.steps - 1, 1)",
        "max(self.steps, 1)",
        "test_schedules.py::test_linear_reaches_its_end_and_stays",
    ),
    _mutant(
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
    _mutant(
        "policy_in_place_of_the_reference",
        "models.reference.FrozenReference.active",
        "yield self.model",
        "yield policy",
        "verify:dpo:tabular:steps",
        "verify:spo:tabular:steps",
        f"{GRADIENT_TEST}[dpo]",
    ),
    _mutant(
        "gradient_through_the_reference",
        "models.reference.AdapterOffReference.active",
        "torch.no_grad()",
        "torch.enable_grad()",
        "test_references.py::test_reference_used_inside_step_keeps_policy_gradient",
    ),
    _mutant(
        "seed_ignored_in_the_order",
        "data.windows._order",
        "windows.seed",
        "0",
        "data/test_batches.py::test_order_depends_on_seed_and_step_only",
    ),
)

HEADS_TEST = "test_head_losses.py::test_step_equals_a_plain_computation"

HEADS = (
    _mutant(
        "upo_weight_with_gradient",
        "losses.upo.UPOLoss.weights",
        ".detach()",
        "",
        f"{HEADS_TEST}[padded-None-upo]",
        "test_head_losses.py::test_likelihood_has_the_weight_of_the_advantage_and_its_limit",
    ),
    _mutant(
        "upo_value_moves_the_policy",
        "losses.upo.UPOLoss.values_of",
        "prompt_states.detach()",
        "prompt_states",
        f"{HEADS_TEST}[padded-None-upo]",
    ),
    _mutant(
        "self_supervised_po_repeated_versions_counted",
        "losses.self_supervised_po.SelfSupervisedPOLoss._mean",
        "places[1:] != places[:-1]",
        "places[1:] >= 0",
        f"{HEADS_TEST}[padded-None-self_supervised_po]",
    ),
    _mutant(
        "self_supervised_po_keeps_the_share",
        "losses.self_supervised_po.Damaged.tokens",
        "share=self.share",
        "share=1 - self.share",
        "test_head_losses.py::test_versions_are_the_tokens_of_their_texts[no_bos]",
    ),
    _mutant(
        "state_of_the_last_completion_token",
        "objective.scored.ScoredBatch.prompt_states",
        "lengths.cumsum(0) - lengths",
        "lengths.cumsum(0) - 1",
        "test_policy_states.py::test_states_are_those_of_a_plain_forward_pass[padded-plain]",
    ),
)

METRICS = (
    _mutant(
        "accuracy_counts_ties_as_right",
        "losses.base.is_higher",
        "(chosen > rejected)",
        "(chosen >= rejected)",
        "test_losses.py::test_equal_implicit_rewards_count_one_half",
    ),
    _mutant(
        "ties_of_the_win_rate_lost",
        "evaluation.winrate.verdict_of_rewards",
        "0.5 + 0.5 * ((first > second) - (first < second))",
        "float(first > second)",
        "test_evaluation.py::test_an_opponent_with_the_same_samples_is_a_tie",
    ),
    _mutant(
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
    _mutant(
        "holm_without_its_maximum",
        "stats.holm",
        "max(highest, min(",
        "max(0.0, min(",
        "test_stats.py::test_holm_by_hand",
    ),
)

MUTANTS = (*LOSSES, *DIVERGENCES, *SAMPLING, *TOKENS, *STEPS, *HEADS, *METRICS)
