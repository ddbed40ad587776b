"""Planted bugs of the rounds of self-play."""

from __future__ import annotations

from tests.mutants.plant import mutant_of

ENUMERATED = "test_pairing.py::test_accepted_completions_follow_the_written_out_distribution[heights1-3]"

ROUNDS = (
    mutant_of(
        "rejection_with_the_highest_of_the_first_pass",
        "rounds.pairing.rejection_sample",
        "highest = max(rewards[position] for position in remaining)",
        "highest = max(rewards)",
        ENUMERATED,
    ),
    mutant_of(
        "rejection_multiplied_by_beta",
        "rounds.pairing.rejection_sample",
        "- highest) / beta",
        "- highest) * beta",
        ENUMERATED,
        "test_pairing.py::test_first_accepted_of_independent_candidates_has_its_closed_form[3]",
        "test_pairing.py::test_a_pass_accepts_in_proportion_to_exp_reward",
    ),
    mutant_of(
        "rejection_ends_after_a_pass_only",
        "rounds.pairing.rejection_sample",
        "if len(accepted) == keep:",
        "if False:",
        "test_pairing.py::test_equal_rewards_are_accepted_in_order[0.0]",
        "test_pairing.py::test_accepted_completions_follow_the_written_out_distribution[heights0-1]",
    ),
    mutant_of(
        "rejection_accepts_what_it_rejects",
        "rounds.pairing.rejection_sample",
        "random.random() >=",
        "random.random() <",
        ENUMERATED,
    ),
    mutant_of(
        "accepted_ones_paired_with_the_next",
        "rounds.pairing.RejectionSampling.choose",
        "zip(accepted[::2], accepted[1::2], strict=False)",
        "zip(accepted, accepted[1:], strict=False)",
        "test_pairing.py::test_pairing_of_scores[pairing10-scores10-expected10]",
    ),
    mutant_of(
        "pairs_of_equal_scores",
        "rounds.pairing._pairs",
        "if scores[a] != scores[b]",
        "",
        "test_pairing.py::test_pairing_of_scores[pairing2-scores2-expected2]",
        "test_pairing.py::test_choices_are_ordered_and_use_the_random_numbers_given[pairing1]",
    ),
    mutant_of(
        "win_rates_summed_in_order",
        "rounds.scoring._compared",
        "fmean(verdict(prompt, own, other) for other in group)",
        "sum(verdict(prompt, own, other) for other in group) / len(group)",
        "test_round_scores.py::test_equal_verdicts_give_equal_scores_in_any_order",
    ),
    mutant_of(
        "win_rates_of_losses",
        "rounds.scoring.win_rates_of_rewards",
        "sigmoid(own - other)",
        "sigmoid(other - own)",
        "test_round_scores.py::test_rewards_become_scores_and_mean_sigmoids",
        "test_rounds_theory.py::test_win_rates_among_few_samples_are_those_of_a_smaller_eta",
    ),
    mutant_of(
        "verdicts_not_turned_for_the_swapped_pair",
        "evaluation.judges.base.compare_all",
        "1 - answer",
        "answer",
        "test_round_scores.py::test_comparing_judge_is_asked_about_all_different_pairs_once",
        "test_best_of.py::test_best_by_wins_against_the_others_in_both_orders",
    ),
    mutant_of(
        "sppo_targets_not_centered",
        "losses.sppo.SPPOLoss.of_pairs",
        "win_rates - 0.5",
        "win_rates",
        "test_rounds_theory.py::test_sppo_minimum_has_its_closed_form[2.0]",
        "test_rounds_theory.py::test_sppo_with_the_exact_normalizer_is_the_multiplicative_update[4.0]",
    ),
    mutant_of(
        "alpha_spin_with_the_weights_exchanged",
        "losses.alpha_spin.AlphaSPINLoss._ratios",
        "(1 - self.base_weight) * ratio + self.base_weight *",
        "self.base_weight * ratio + (1 - self.base_weight) *",
        "test_rounds_theory.py::test_alpha_spin_is_spin_without_the_base_and_refers_to_it_alone_with_all_weight",
        "test_rounds_theory.py::test_fixed_point_of_alpha_spin_lies_between_data_and_base[0.3]",
    ),
    mutant_of(
        "dpo_without_beta",
        "losses.dpo.DPOLoss.of_pairs",
        "losses = -logsigmoid(beta * margin)",
        "losses = -logsigmoid(margin)",
        "test_rounds_theory.py::test_spin_does_not_move_at_the_distribution_of_the_data[0.1]",
        "test_rounds_theory.py::test_rounds_of_dpo_add_up_and_rounds_of_spo_do_not",
        "test_rounds_theory.py::test_spin_round_has_its_closed_form[3.0]",
    ),
)
