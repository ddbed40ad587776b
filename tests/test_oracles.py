"""Each shipped loss against numbers of other implementations: values and gradients in float64.

``tests/data/oracles.json`` has numbers that the authors' code, TRL, or a second implementation with 60 digits gave; its
``readme`` explains the schema. ``SPO_ORACLES`` names another file of the same schema. This file has no formula of a
loss: it says which shipped class an oracle's name stands for, with which options, and where its inputs go.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.losses import (
    AlphaDPOLoss,
    AlphaSPINLoss,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    APSLoss,
    BAPOLoss,
    BCOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPONLLLoss,
    EXOLoss,
    EXORewardLoss,
    FDPOLoss,
    HashedWords,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    LDDPOLoss,
    LengthNormalizedDPOLoss,
    MinorDPOLoss,
    MRPOLoss,
    NCALoss,
    ORPOLoss,
    RDPOLoss,
    RosePOLoss,
    RPOLoss,
    RPOUnpairedLoss,
    RSOHingeLoss,
    SequentialPOLoss,
    SimPOLoss,
    SLiCLoss,
    SPLLoss,
    SPOBestOfNLoss,
    SPOLoss,
    SPORankedLoss,
    SPPOLoss,
    TDPOLoss,
    UPOLoss,
    WPOLoss,
)
from spo.losses.base import Loss
from spo.objective import ScoredBatch
from spo.ops import KL_ESTIMATORS
from spo.types import CompletionLogps, LabelledLogps, ListLogps, PairLogps, PreferenceBatch, Sequences

ORACLES = Path(os.environ.get("SPO_ORACLES", Path(__file__).parent / "data" / "oracles.json"))
NOT_SHIPPED = (
    "lore_cosine",
    "lore_squared",
    "few_shot_reward",
    "mrpo_naive",
    "exo_dpo_rw",
    "exo_dpo_pref",
    "rpo_diagonal",
    "sppo_single",
)
"""Oracles of losses that are not methods of the package: reward models, and variants that papers compare with."""
TOLERANCE = 1e-9
OTHERS_CODE = ("official", "trl")

Params = dict[str, Any]
Inputs = dict[str, Tensor]
Evaluate = Callable[[Params, Inputs], Tensor]

# ------------------------------------------------------------------------------------------------ inputs of the losses


def pairs(x: Inputs, **more: Any) -> PairLogps:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    names += ("chosen_length", "rejected_length", "preference")
    return PairLogps(**{name: x[name] for name in names if name in x}, **more)


def both(x: Inputs, name: str, dim: int) -> Tensor:
    """Return the numbers of chosen and of rejected."""
    return torch.stack([x[f"{name}_chosen"], x[f"{name}_rejected"]], dim)


def lists(x: Inputs, **more: Any) -> ListLogps:
    order = torch.arange(x["policy"].shape[1]).expand(x["policy"].shape)
    mask = torch.ones_like(order, dtype=torch.bool)
    return ListLogps(x["policy"], mask, order, x.get("reference"), **more)


def labelled(x: Inputs, **more: Any) -> LabelledLogps:
    chosen, rejected = x["policy_chosen"], x["policy_rejected"]
    label = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)]).detach()
    reference = torch.cat([x["reference_chosen"], x["reference_rejected"]])
    return LabelledLogps(torch.cat([chosen, rejected]), label, reference, **more)


def first_two(x: Inputs) -> PairLogps:
    policy, reference = x["policy"].unbind(-1), x["reference"].unbind(-1)
    return PairLogps(policy[0], policy[1], reference[0], reference[1])


def batch_of(lengths: Tensor, labels: Tensor | None = None) -> PreferenceBatch:
    """Return pairs whose prompts have one token, first all chosen and then all rejected completions.

    Args:
        lengths: ``(2 * B,)`` tokens of each completion.
        labels: ``(2 * B, T)`` tokens of the completions.
    """
    lengths = lengths.long()
    width = int(lengths.max())
    ids = torch.zeros(len(lengths), width + 1, dtype=torch.long)
    if labels is not None:
        ids[:, 1:] = labels[:, :width]
    sequences = Sequences(ids, torch.ones_like(lengths), lengths + 1)
    return PreferenceBatch(sequences, torch.arange(len(lengths) // 2))


def tokens_of(x: Inputs, name: str, batch: PreferenceBatch) -> Tensor:
    """Return ``(M, ...)`` numbers of the completion tokens, from padded ones of chosen and of rejected."""
    padded = torch.cat([x[f"{name.replace('*', side)}"] for side in ("chosen", "rejected")])
    lengths = batch.sequences.completion_length
    return torch.cat([row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)])


def scored_tokens(x: Inputs) -> ScoredBatch:
    """Return a batch of which each model's token log-probs are known, and not its logits."""
    batch = batch_of(torch.cat([x["chosen_length"], x["rejected_length"]]))
    scored = ScoredBatch(batch, torch.empty(0), torch.empty(0))
    known = {"policy_tokens": "policy_*_tokens", "reference_tokens": "reference_*_tokens"}
    if "policy_chosen_log_sum_sq" in x:
        known["policy_log_sum_squares"] = "policy_*_log_sum_sq"
    # They are cached properties: what is set is what a forward pass would have found.
    vars(scored).update({name: tokens_of(x, source, batch) for name, source in known.items()})
    return scored


def scored_logits(x: Inputs) -> ScoredBatch:
    """Return a batch with the logits of each model; the label at t + 1 is what the logits at t predict."""
    labels = torch.cat([x["chosen_labels"], x["rejected_labels"]]).long()[:, 1:]
    counted = labels != -100
    completions = [row[is_counted] for row, is_counted in zip(labels, counted, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True)
    batch = batch_of(counted.sum(1), padded)

    def logits(model: str) -> Tensor:
        every = torch.cat([x[f"{model}_chosen_logits"], x[f"{model}_rejected_logits"]])
        return every[:, :-1][counted]

    return ScoredBatch(batch, logits("policy"), logits("reference"))


def sampled(x: Inputs, estimator: Any) -> Tensor:
    """Return the estimates of the KL on sequences of one token with given log-probs, from a vocabulary of two."""

    def logits(logp: Tensor) -> Tensor:
        return torch.stack([logp, (-logp.expm1()).log()], -1)

    sequences = batch_of(torch.ones(len(x["policy"]))).sequences
    return KL_ESTIMATORS[estimator](logits(x["policy"]), logits(x["reference"]), sequences)


def tokenwise(x: Inputs) -> Tensor:
    length = x["length"].long()
    batch = batch_of(length)
    inside = torch.arange(x["policy_logits"].shape[1]) < length[:, None]
    return KL_ESTIMATORS["tokenwise"](x["policy_logits"][inside], x["reference_logits"][inside], batch.sequences)


# ------------------------------------------------------------------------------ oracles and the classes that they test


def of(loss: Loss[Any], logps: Any, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    return loss(logps, alpha=alpha, beta=beta)


def on_pairs(make: Callable[..., Loss[Any]], beta: str = "beta", **options: str) -> Evaluate:
    """Return the evaluation of a loss on pairs whose options are parameters of the oracle.

    Args:
        make: Class, or a function that makes a loss.
        beta: Parameter of the oracle that is beta.
        options: Parameter of the oracle for each option of the loss.
    """

    def evaluate(p: Params, x: Inputs) -> Tensor:
        return of(make(**{option: p[name] for option, name in options.items()}), pairs(x), beta=p.get(beta, 1.0))

    return evaluate


def bco(p: Params, x: Inputs, shift: bool) -> Tensor:
    loss = BCOLoss(shift=shift)
    loss.total += p.get("delta", 0.0) / p["beta"]
    loss.count += 1
    # A pair counts as two completions, so each has the weight two in a mean over pairs.
    return of(loss, labelled(x, weight=torch.full((2 * len(x["policy_chosen"]),), 2.0).double()), beta=p["beta"])


def alpha_dpo(p: Params, x: Inputs) -> Tensor:
    loss = AlphaDPOLoss(p["alpha"], p["gamma_beta_ratio"])
    loss.mean += x["state_mean"]
    loss.std += x["state_std"]
    loss.update_statistics(pairs({name: value.detach() for name, value in x.items()}))
    return of(loss, pairs(x), beta=p["beta"])


def kto(p: Params, x: Inputs) -> Tensor:
    loss = KTOLoss(p["desirable_weight"], p["undesirable_weight"], skip_zeros=True)
    rows = len(x["policy_chosen"]) + len(x["policy_rejected"])

    def mismatched(name: str) -> Tensor:
        # Rows beyond those of the oracle have equal log-probs, which HALOs does not count.
        return torch.nn.functional.pad(x[name], (0, max(0, rows - len(x[name]))))

    other = CompletionLogps(mismatched("policy_kl"), torch.ones(1), mismatched("reference_kl"))
    return of(loss, labelled(x, extra={"mismatched": other}), beta=p["beta"])


def mrpo(p: Params, x: Inputs, index: Any) -> Tensor:
    weight = None if p["a"] < 0 else p["a"]
    loss = MRPOLoss(weight=weight, clip=abs(p["epsilon"]), adaptive_clip=p["epsilon"] >= 0, index=index)
    base = {"reference_chosen": x["base_chosen"], "reference_rejected": x["base_rejected"]}
    return of(loss, pairs(x | base, references={"extra": both(x, "extra", 0)}), beta=p["beta"])


def rpo_unpaired(p: Params, x: Inputs) -> Tensor:
    embedding = torch.cat([x["chosen_embedding"], x["rejected_embedding"]])
    return of(
        RPOUnpairedLoss(p["tau"], embedder=HashedWords()),
        labelled(x, features={"prompt_embedding": embedding}),
        beta=p["beta"],
    )


def bapo(p: Params, x: Inputs, form: Any) -> Tensor:
    base = CompletionLogps(x["policy_base"], torch.ones_like(x["policy_base"]), x["reference_base"])
    return of(BAPOLoss(p["lam"], form, per_token=False), pairs(x, extra={"anchor": base}), beta=p["beta"])


def upo(p: Params, x: Inputs) -> Tensor:
    # The oracle is of the advantage-weighted likelihood alone.
    loss = UPOLoss(
        1.0, p["temperature"], p["tau"], value_weight=0.0, max_weight=math.inf, reward=None, desirable_weight=0.0
    )
    zeros, ones = torch.zeros_like(x["policy"]), torch.ones_like(x["policy"])
    logps = LabelledLogps(
        x["policy"],
        ones,
        zeros,
        terms={"value": x["value"]},
        features={"auxiliary_reward": x["reward"]},
        extra={"mismatched": CompletionLogps(zeros, ones, zeros)},
    )
    return of(loss, logps)


def tdpo(p: Params, is_second: bool) -> TDPOLoss:
    return TDPOLoss(p["alpha"], detach_chosen=True) if is_second else TDPOLoss(1.0, detach_chosen=False)


def tdpo_from_logits(p: Params, x: Inputs) -> Tensor:
    loss = tdpo(p, p["tdpo2"])
    return of(loss, scored_logits(x).inputs_of(loss), beta=p["beta"])


def on_tokens(make: Callable[[Params], Loss[Any]]) -> Evaluate:
    """Return the evaluation of a loss that reads the log-probs of single tokens."""

    def evaluate(p: Params, x: Inputs) -> Tensor:
        loss = make(p)
        return of(loss, scored_tokens(x).inputs_of(loss), beta=p["beta"])

    return evaluate


EVALUATIONS: dict[str, Evaluate] = {
    "dpo": on_pairs(DPOLoss),
    "dpo_soft": on_pairs(DPOLoss),
    "cdpo": on_pairs(DPOLoss, label_smoothing="epsilon"),
    "ipo_sum": on_pairs(partial(IPOLoss, length_normalize=False), "tau"),
    "ipo_mean": on_pairs(IPOLoss),
    "hinge": on_pairs(HingeLoss),
    "rdpo": on_pairs(RDPOLoss, label_smoothing="label_smoothing"),
    "exo_pair": on_pairs(EXOLoss, label_smoothing="label_smoothing"),
    "nca_pair": on_pairs(NCALoss),
    "bco_pair": partial(bco, shift=False),
    "bco_delta": partial(bco, shift=True),
    "sppo_hard": on_pairs(partial(SPPOLoss, reduction="sum")),
    "apo_zero": on_pairs(APOZeroLoss),
    "apo_down": on_pairs(APODownLoss),
    "discopop": on_pairs(DiscoPOPLoss, temperature="tau"),
    "sigmoid_norm": on_pairs(LengthNormalizedDPOLoss),
    "fdpo_forward_kl": on_pairs(partial(FDPOLoss, "forward_kl")),
    "fdpo_js": on_pairs(partial(FDPOLoss, "js")),
    "fdpo_alpha": on_pairs(partial(FDPOLoss, "alpha"), divergence_alpha="f_alpha"),
    "aot": on_pairs(AOTLoss, label_smoothing="label_smoothing"),
    "aot_unpaired": on_pairs(partial(AOTLoss, unpaired=True), label_smoothing="label_smoothing"),
    "ld_dpo": on_tokens(lambda p: LDDPOLoss(p["ld_alpha"])),
    "wpo": on_tokens(lambda p: WPOLoss()),
    "dpo_plus_nll": on_tokens(lambda p: DPONLLLoss(p["eta"], "batch")),
    "cpo_preference": on_pairs(partial(CPOLoss, nll_weight=0.0)),
    "simpo": lambda p, x: of(SimPOLoss(p["gamma"] / p["beta"]), pairs(x), beta=p["beta"]),
    "rso_hinge": on_pairs(RSOHingeLoss),
    "orpo": on_pairs(ORPOLoss),
    "tdpo1": lambda p, x: of(tdpo(p, False), pairs(x, terms={"kl": both(x, "kl", 0)}), beta=p["beta"]),
    "tdpo2": lambda p, x: of(tdpo(p, True), pairs(x, terms={"kl": both(x, "kl", 0)}), beta=p["beta"]),
    "tdpo_from_logits": tdpo_from_logits,
    "sppo": lambda p, x: of(SPPOLoss(True), pairs(x, features={"win_rate": both(x, "prob", -1)}), beta=p["beta"]),
    "spin": on_pairs(DPOLoss),
    "spin_hinge": on_pairs(HingeLoss),
    "exo_rw": lambda p, x: of(
        EXORewardLoss(p["beta_r"]), lists(x, features={"reward": x["rewards"]}), beta=p["beta_pi"]
    ),
    "exo_pref_official": lambda p, x: of(EXOLoss(targets="official"), first_two(x), beta=p["beta_pi"]),
    "rpo": lambda p, x: of(
        RPOLoss(p["tau"], embedder=HashedWords()),
        pairs(x, features={"prompt_embedding": x["prompt_embedding"]}),
        beta=p["beta"],
    ),
    "rpo_unpaired": rpo_unpaired,
    "slic": on_pairs(SLiCLoss, nll_weight="lambda_coef"),
    "mrpo": partial(mrpo, index="code"),
    "mrpo_index_own": partial(mrpo, index="own"),
    "alpha_dpo": alpha_dpo,
    "upo_advantage_mle": upo,
    "kto": kto,
    "spo": lambda p, x: of(SPOLoss(), pairs(x), alpha=p["alpha"]),
    "spo_hard": lambda p, x: of(SPOLoss(), pairs(x), alpha=p["alpha"]),
    "spo_best_of_n": lambda p, x: of(SPOBestOfNLoss(), lists(x), alpha=p["alpha"]),
    "spo_ranked": lambda p, x: of(SPORankedLoss(), lists(x), alpha=p["alpha"]),
    "kl_tokenwise": lambda p, x: tokenwise(x),
    "kl_k1": lambda p, x: sampled(x, "k1"),
    "kl_k2": lambda p, x: sampled(x, "k2"),
    "kl_k3": lambda p, x: sampled(x, "k3"),
    "minor_dpo": on_pairs(MinorDPOLoss),
    "rosepo": lambda p, x: of(RosePOLoss(), pairs(x, features={"flip_probability": x["epsilon"]}), beta=p["beta"]),
    "spl": lambda p, x: of(SPLLoss(), pairs(x), alpha=p["a"], beta=p["b"]),
    "aps": on_pairs(APSLoss, t_min="t_min", t_max="t_max", rho="rho"),
    "aps_quadratic": on_pairs(partial(APSLoss, "quadratic"), t_min="t_min", rho_0="rho0"),
    "alpha_spin": lambda p, x: of(
        AlphaSPINLoss(p["a"]), pairs(x, references={"base": both(x, "base", 0)}), beta=p["beta"]
    ),
    "sequential_po": lambda p, x: of(
        SequentialPOLoss(), pairs(x, features={"earlier_reward": both(x, "earlier_reward", -1)}), beta=p["beta"]
    ),
    "bapo_squared": partial(bapo, form="squared"),
    "bapo_hinge": partial(bapo, form="hinge"),
}


def methods() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ORACLES.read_text())["methods"]
    return found


def cases() -> Iterator[Any]:
    for method, oracle in methods().items():
        if method not in NOT_SHIPPED:
            yield from (pytest.param(method, case, id=f"{method}-{case['id']}") for case in oracle["cases"])


@pytest.mark.parametrize(("method", "case"), cases())
def test_oracle(method: str, case: dict[str, Any]) -> None:
    assert method in EVALUATIONS, f"{method} has an oracle, but no shipped class: add it to EVALUATIONS"
    inputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}
    leaves = {name: inputs[name].requires_grad_() for name in case["grad"]}
    losses = EVALUATIONS[method](case["params"], inputs)
    assert losses.dtype == torch.float64
    assert_close(losses.mean(), case["loss"])
    each = case.get("loss_per_pair", ())
    if len(each) == losses.numel():
        assert_close(losses, each)
    slopes = torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True)
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        assert_close(torch.zeros_like(leaf) if slope is None else slope, case["grad"][name])


def assert_close(found: Tensor, expected: Any) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    error = (found.detach() - expected).abs() / (1 + expected.abs())
    assert found.shape == expected.shape
    assert error.max() <= TOLERANCE, (found, expected)


def test_thirty_methods_have_an_oracle_from_code_that_is_not_ours() -> None:
    assert sum(oracle["source"] in OTHERS_CODE for name, oracle in methods().items() if name in EVALUATIONS) >= 30
