"""The planted bugs of methods: at least two for each class of a loss."""

from __future__ import annotations

from tests.mutants.plant import Mutant, mutant_of

ORACLE = "test_oracles.py::test_oracle"
NUMPY = "test_losses.py::test_loss_value_and_gradient_equal_numpy"
TRL = "test_trl_parity.py::test_trl_parity_on_generated_pairs"
HEADS = "test_head_losses.py::test_step_equals_a_plain_computation"


def _of(function: str, *tests: str, **bugs: tuple[str, str]) -> list[Mutant]:
    """Return a mutant for each bug of a function, named after the file and the bug.

    Args:
        function: Name below ``spo.losses``.
        tests: Names of tests or rows of ``spo verify``; ``METHOD-NUMBER`` is a case of the oracle of that name.
        bugs: Right and wrong text, by name.
    """
    file = function.partition(".")[0]
    ids = [test if ":" in test else f"{ORACLE}[{test.rpartition('-')[0]}-{test}]" for test in tests]
    return [
        mutant_of(f"{file}_{bug}", f"losses.{function}", right, wrong, *ids) for bug, (right, wrong) in bugs.items()
    ]


SPO_FAMILY = (
    *_of(
        "spo.SPOLoss.of_pairs",
        "verify:spo:tabular:steps",
        "spo_hard-0",
        f"{NUMPY}[hard-spo]",
        without_1_over_alpha=(
            "-logsigmoid(alpha * policy_margin(pair)) / alpha",
            "-logsigmoid(alpha * policy_margin(pair))",
        ),
        alpha_outside_alone=("alpha * policy_margin(pair)", "policy_margin(pair)"),
    ),
    *_of(
        "spo.WeightedSPOLoss.weights",
        "test_losses.py::test_weighted_spo_gradient_holds_the_weight_fixed",
        "verify:spo_weighted:tabular:steps",
        gradient_through_the_weight=("pair.policy_chosen.detach()", "pair.policy_chosen"),
    ),
    *_of(
        "spo.WeightedSPOLoss.weights",
        "test_losses.py::test_spo_weight_is_symmetric_with_mean_one",
        weights_of_another_mean=("/ mu.mean()", "/ mu.sum()"),
    ),
    *_of(
        "choices.choice_losses",
        "spo_ranked-0",
        "spo_best_of_n-0",
        without_1_over_alpha=(".logsumexp(-1) / alpha", ".logsumexp(-1)"),
    ),
    *_of(
        "choices.choice_losses",
        "verify:spo_best_of_n:tabular:steps",
        "test_ranked.py::test_list_loss_at_equal_log_probs_counts_rankings[3]",
        among_fewer=("triu(1)", "triu(2)"),
    ),
    *_of(
        "ranked.SPORankedLoss.of_ranking",
        "spo_ranked-0",
        best_alone=(".sum(-1)", "[:, 0]"),
        mean_of_choices=(".sum(-1)", ".mean(-1)"),
    ),
    *_of(
        "best_of_n.SPOBestOfNLoss.of_ranking",
        "spo_best_of_n-0",
        every_choice=("[:, 0]", ".sum(-1)"),
        second_choice=("[:, 0]", "[:, 1]"),
    ),
)

WITH_A_REFERENCE = (
    *_of(
        "dpo.DPOLoss.of_pairs",
        "verify:dpo:tabular:steps",
        "dpo-0",
        f"{NUMPY}[hard-dpo]",
        per_token=("log_ratio_margin(pair)", "log_ratio_margin(pair) / pair.chosen_length"),
        beta_twice=("margin = log_ratio_margin(pair)", "margin = beta * log_ratio_margin(pair)"),
    ),
    *_of(
        "dpo.DPOLoss.of_pairs",
        "verify:cdpo:tabular:steps",
        "cdpo-0",
        f"{NUMPY}[hard-cdpo]",
        smoothing_of_the_wrong_sign=("-beta * margin", "beta * margin"),
    ),
    *_of(
        "dpo.DPOLoss.optimum",
        "verify:dpo:tabular:optimum",
        "test_exact.py::test_spo_and_dpo_optima_match_papers[0.3]",
        wrong_optimum=("rewards / beta", "rewards * beta"),
    ),
    *_of(
        "margins.reference_margin",
        "verify:dpo:tabular:steps",
        f"{NUMPY}[hard-dpo]",
        reference_exchanged=(
            "pair.reference_chosen - pair.reference_rejected",
            "pair.reference_rejected - pair.reference_chosen",
        ),
    ),
    *_of(
        "ipo.IPOLoss._ratios",
        "verify:ipo:tabular:steps",
        "ipo_mean-0",
        "test_losses.py::test_ipo_sums_and_averages_differ_by_length",
        without_length_normalization=("per_token(pair, ratios) if self.length_normalize else ratios", "ratios"),
    ),
    *_of(
        "ipo.IPOLoss.of_pairs",
        "verify:ipo_sum:tabular:steps",
        "ipo_sum-0",
        target_of_1_over_tau=("1 / (2 * beta)", "1 / beta"),
    ),
    *_of("hinge.HingeLoss.of_pairs", "hinge-2", without_hinge=(".relu()", "")),
    *_of("hinge.HingeLoss.of_pairs", "hinge-0", beta_as_margin=("1 - beta * log_ratio", "beta - log_ratio")),
    *_of(
        "exo.EXOLoss.of_pairs",
        "exo_pair-2",
        unweighted=("chosen.exp() * (chosen", "(chosen"),
        targets_exchanged=("target_chosen, target_rejected)", "target_rejected, target_chosen)"),
    ),
    *_of(
        "minor_dpo.MinorDPOLoss.of_pairs",
        "minor_dpo-0",
        rejected_always_penalized=("rejected.relu()", "rejected"),
        penalized_below=("rejected.relu()", "-(-rejected).relu()"),
    ),
    *_of(
        "nca.NCALoss.of_pairs",
        "nca_pair-0",
        regularizer_doubled=(") / 2", ")"),
        rejected_raised=("logsigmoid(-rejected)", "logsigmoid(rejected)"),
    ),
    *_of(
        "apo_zero.APOZeroLoss.of_pairs",
        "apo_zero-0",
        chosen_lowered=("(-beta * chosen)", "(beta * chosen)"),
        rejected_raised=("(beta * rejected)", "(-beta * rejected)"),
    ),
    *_of(
        "apo_down.APODownLoss.of_pairs",
        "apo_down-0",
        chosen_raised=("(beta * chosen)", "(-beta * chosen)"),
        margin_of_the_other_sign=("-beta * (chosen", "beta * (chosen"),
    ),
    *_of(
        "discopop.DiscoPOPLoss.of_pairs",
        "discopop-0",
        without_beta=("beta * log_ratio_margin", "log_ratio_margin"),
        without_mixture=("(-mixture).sigmoid() * logsigmoid", "logsigmoid"),
    ),
    *_of("f_dpo.FDPOLoss.slope", "fdpo_js-0", js_is_reverse_kl=("return logsigmoid(ratio)", "return ratio")),
    *_of("f_dpo.FDPOLoss.slope", "fdpo_forward_kl-0", forward_kl_of_the_other_sign=("-(-ratio)", "-ratio")),
    *_of(
        "dpo_length_normalized.LengthNormalizedDPOLoss.of_pairs",
        "sigmoid_norm-0",
        of_sums=("per_token(pair, both_log_ratios(pair))", "both_log_ratios(pair)"),
        without_beta=("beta * (chosen - rejected)", "(chosen - rejected)"),
    ),
    *_of(
        "spl.SPLLoss.of_pairs",
        "spl-0",
        one_weight=("beta * reference_margin", "alpha * reference_margin"),
        beta_for_alpha=("alpha * policy_margin", "beta * policy_margin"),
    ),
    *_of(
        "aps.APSLoss.of_pairs",
        "aps-0",
        unscaled=("-scale * logsigmoid", "-logsigmoid"),
        without_price=("+ self._price(scale)", ""),
    ),
)

NOISY_LABELS = (
    *_of(
        "rdpo.RDPOLoss.of_pairs",
        "rdpo-0",
        biased=(" / (1 - 2 * share)", ""),
        smoothed_as_cdpo=("share * logsigmoid(-logit) -", "-share * logsigmoid(-logit) -"),
    ),
    *_of(
        "rosepo.RosePOLoss.of_pairs",
        "rosepo-0",
        weight_not_reduced=("-(1 - flipped) *", "-1 *"),
        flip_ignored=("flipped * logsigmoid(-logit)", "flipped * logsigmoid(logit)"),
    ),
)

REFERENCE_FREE = (
    *_of("rso_hinge.RSOHingeLoss.of_pairs", "rso_hinge-2", without_hinge=(".relu()", "")),
    *_of("rso_hinge.RSOHingeLoss.of_pairs", "rso_hinge-0", divided_by_beta=("beta * policy", "1 / beta * policy")),
    *_of(
        "slic.SLiCLoss.of_pairs",
        "slic-0",
        without_hinge=(".relu()", ""),
        likelihood_unweighted=("self.nll_weight * chosen_nll", "chosen_nll"),
    ),
    *_of(
        "simpo.SimPOLoss.of_pairs",
        "simpo-0",
        target_without_beta=("- beta * self", "- self"),
        of_sums=("per_token(pair, both_policy_logps(pair))", "both_policy_logps(pair)"),
    ),
    *_of(
        "orpo.ORPOLoss.of_pairs",
        "orpo-0",
        odds_unweighted=("- beta * logsigmoid", "- logsigmoid"),
        probabilities_for_odds=("_log_odds(chosen) - _log_odds(rejected)", "chosen - rejected"),
    ),
    *_of("cpo.CPOLoss.of_pairs", "cpo_preference-0", without_beta=("beta * policy_margin", "policy_margin")),
    *_of("cpo.CPOLoss.of_pairs", f"{TRL}[cpo-padded]", likelihood_of_sums=(", self.nll_mean)", ")")),
)

TOKENS = (
    *_of(
        "tdpo.TDPOLoss.of_pairs",
        "tdpo2-0",
        gradient_of_the_chosen=("chosen.detach() if self.detach_chosen else chosen", "chosen"),
    ),
    *_of("tdpo.TDPOLoss.of_pairs", "tdpo2-0", kl_unweighted=("self.kl_weight * divergence", "divergence")),
    *_of("tdpo.forward_kl", "tdpo_from_logits-0", reverse_kl=("log_q.exp() * difference", "-log_p.exp() * difference")),
    *_of("wpo.WPOLoss.weights", "wpo-0", mean_of_the_completions=(".sum(0)", ".mean(0)")),
    *_of("wpo.likeness", "wpo-0", unnormalized=(" - scored.policy_log_sum_squares", "")),
    *_of(
        "ld_dpo.LDDPOLoss._ratios",
        "ld_dpo-0",
        tail_counts_fully=("self.tail_weight * (whole", "(whole"),
        tail_alone=("return prefix + ", "return "),
    ),
)

WHOLE_BATCH = (
    *_of("aot.AOTLoss.of_pairs", "aot-2", unsorted=("below.sort(stable=True).values[place]", "below")),
    *_of("aot.AOTLoss.of_pairs", "aot_unpaired-0", paired=("if self.unpaired else", "if not self.unpaired else")),
    *_of(
        "alpha_dpo.AlphaDPOLoss.target_margins",
        "alpha_dpo-0",
        gradient_of_the_target=(".detach()", ""),
        not_centered=("(margins - mean)", "margins"),
    ),
    *_of(
        "rpo.RPOLoss.of_pairs", "rpo-0", sum_over_prompts=("(chosen, rejected).mean(-1)", "(chosen, rejected).sum(-1)")
    ),
    *_of("rpo.prompt_weights", "rpo-0", inverse_temperature=("- 1) / temperature", "- 1) * temperature")),
)

UNPAIRED = (
    *_of("kto.KTOLoss.of_labels", "kto-0", without_reference_point=(" - self.reference_point(logps)", "")),
    *_of(
        "kto.KTOLoss.reference_point",
        "test_losses.py::test_reference_point_of_kto_is_not_below_zero",
        reference_point_below_zero=(".clamp(min=0)", ""),
    ),
    *_of("bco.BCOLoss.of_labels", "bco_delta-3", without_shift=(" - self.mean_ratio(logps)", "")),
    *_of("bco.BCOLoss.of_labels", "bco_pair-0", label_ignored=("logit, -logit)", "logit, logit)")),
    *_of(
        "rpo_unpaired.RPOUnpairedLoss.of_labels",
        "rpo_unpaired-0",
        each_comparison_twice=(") / 2", ")"),
        sum_over_comparisons=(" / share.sum().clamp(min=torch.finfo(share.dtype).tiny)", ""),
    ),
    *_of(
        "upo.UPOLoss.weights",
        f"{HEADS}[padded-None-upo]",
        "test_head_losses.py::test_likelihood_has_the_weight_of_the_advantage_and_its_limit",
        weight_with_gradient=(".detach()", ""),
    ),
    *_of(
        "upo.UPOLoss.values_of",
        f"{HEADS}[padded-None-upo]",
        value_moves_the_policy=("prompt_states.detach()", "prompt_states"),
    ),
)

LISTS_AND_SCORES = (
    *_of(
        "exo_rw.EXORewardLoss.of_ranking",
        "exo_rw-0",
        rewards_unscaled=(" / self.reward_temperature", ""),
        forward_kl=("choice.exp() *", "-target.exp() *"),
    ),
)

SELF_PLAY = (
    *_of(
        "sppo.SPPOLoss.of_pairs",
        "sppo-0",
        multiplied_by_beta=("- 0.5) / beta", "- 0.5) * beta"),
        sum_of_squares=("squares.mean(-1)", "squares.sum(-1)"),
    ),
    *_of(
        "alpha_spin.AlphaSPINLoss._ratios",
        "alpha_spin-2",
        weights_exchanged=("(1 - self.base_weight) * ratio", "self.base_weight * ratio"),
        without_base=("(logp - of_base)", "logp"),
    ),
    *_of(
        "sequential_po.SequentialPOLoss.of_pairs",
        "sequential_po-0",
        earlier_rewards_added=("- (earlier", "+ (earlier"),
        earlier_rewards_scaled=("beta * margin - (", "beta * margin - beta * ("),
    ),
)

SEVERAL_REFERENCES = (
    *_of(
        "mrpo.MRPOLoss._weights",
        "mrpo-0",
        weights_not_exchanged=('weights.flip(0) if self.index == "code" else weights', "weights"),
    ),
    *_of("mrpo.MRPOLoss._clipped", "mrpo_index_own-0", room_of_the_other=("self.clip - of_chosen", "of_chosen")),
)

FURTHER_TERMS = (
    *_of("bapo.BAPOLoss.anchors", "bapo_squared-0", absolute=("ratio**2", "ratio.abs()")),
    *_of("bapo.BAPOLoss.anchors", "bapo_hinge-0", hinge_above=("(-ratio).relu()", "ratio.relu()")),
    *_of(
        "dpo_nll.DPONLLLoss.of_pairs",
        "dpo_plus_nll-0",
        likelihood_of_sums=(", self.nll_mean)", ")"),
        likelihood_lowered=("+ self.nll_weight", "- self.nll_weight"),
    ),
    *_of(
        "mix.MixLoss.__call__",
        f"{TRL}[sigmoid+nca_pair-padded]",
        unweighted=("self.weights[name] * ", ""),
        mean=(".sum(0)", ".mean(0)"),
    ),
    *_of(
        "sft.SFTLoss.of_pairs", f"{NUMPY}[hard-sft]", likelihood_lowered=("-pair.policy_chosen", "pair.policy_chosen")
    ),
    *_of("sft.SFTLoss.of_pairs", f"{NUMPY}[hard-sft_mean]", sums_for_means=("losses / pair.chosen_length", "losses")),
    *_of(
        "self_supervised_po.SelfSupervisedPOLoss._mean",
        f"{HEADS}[padded-None-self_supervised_po]",
        repeated_versions_counted=("places[1:] != places[:-1]", "places[1:] >= 0"),
    ),
    *_of(
        "self_supervised_po.Damaged.tokens",
        "test_head_losses.py::test_versions_are_the_tokens_of_their_texts[no_bos]",
        keeps_the_share=("share=self.share", "share=1 - self.share"),
    ),
)

OF_METHODS = (
    *SPO_FAMILY,
    *WITH_A_REFERENCE,
    *NOISY_LABELS,
    *REFERENCE_FREE,
    *TOKENS,
    *WHOLE_BATCH,
    *UNPAIRED,
    *LISTS_AND_SCORES,
    *SELF_PLAY,
    *SEVERAL_REFERENCES,
    *FURTHER_TERMS,
)
