"""Evaluation: diversity, intervals, and the numbers measured on samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spo.data import EvalPrompt, Reward
from spo.errors import UserError
from spo.evaluation import (
    EvaluationSettings,
    completions,
    distinct_n,
    distinct_samples,
    self_bleu,
    verdict_of_rewards,
)
from spo.evaluation.assess import Evaluation, Opponent, assess, draw_both
from spo.evaluation.completions import Draws
from spo.evaluation.judges import Judge, JudgedPair, RewardJudge, reward_judge
from spo.evaluation.opponents import find_opponents
from spo.forward.speed import Speed
from spo.notes import collect_notes
from spo.stats import Bootstrap
from tests.helpers import (
    BOS,
    EOS,
    FAST,
    PAD,
    PLAIN,
    VOCAB,
    completion_logps,
    every_completion,
    sequences,
    tiny_llama,
)

FAVOURITE = 9
SETTINGS: dict[str, Any] = {
    "num_prompts": 40,
    "selection_prompts": 0,
    "against": ["reference"],
    "samples_per_prompt": 2,
    "max_new_tokens": 6,
    "temperature": 1.0,
    "batch_size": 32,
    "confidence": 0.95,
    "bootstrap_samples": 500,
    "self_bleu_samples": 20,
    "seed": 0,
}


def count_reward(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
    """Count the favored token; a component is the negative length."""
    tokens = [[int(word[1:]) for word in text.split()] for text in completions]
    return {
        "reward": [float(ids.count(FAVOURITE)) for ids in tokens],
        "shortness": [-float(len(ids)) for ids in tokens],
    }


def decode(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def test_chosen_responses_may_be_missing_where_nobody_asked_for_them() -> None:
    settings = EvaluationSettings(**SETTINGS | {"against": ["chosen"], "num_prompts": 3})
    with pytest.raises(UserError, match="none of the test prompts has a chosen or desirable response"):
        find_opponents(settings, prompts(3), [])
    with collect_notes() as notes:
        assert find_opponents(settings, prompts(3), [], needs_chosen=False) == {}
    assert notes == {"notes/no_chosen_responses": 3.0}


def write_samples(folder: Path, count: int, seed: int) -> Path:
    """Write the samples of another run: sample 1 of prompt 2 is ``2.1``."""
    folder.mkdir()
    rows = [
        {"prompt_id": one.prompt_id, "sample_index": i, "completion": f"{one.prompt_id}.{i}", "tokens": 3}
        for one in prompts(3)
        for i in range(count)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"evaluation:\n  seed: {seed}\n")
    return folder


@pytest.mark.parametrize(("count", "seed", "noted"), [(1, 0, 1), (1, 1, 0), (2, 0, 0), (3, 1, 0)])
def test_samples_meet_independent_ones_of_another_run(tmp_path: Path, count: int, seed: int, noted: int) -> None:
    """Two runs draw samples of the same number and seed with the same random numbers."""
    other = write_samples(tmp_path / "other", count, seed)
    settings = EvaluationSettings(**SETTINGS | {"against": [str(other)], "samples_per_prompt": count})
    with collect_notes() as notes:
        found = find_opponents(settings, prompts(3), [])["other"]
    assert notes.get("notes/equal_evaluation_seeds", 0) == noted
    assert found == {(f"id{p}", i): (f"id{p}.{(i + 1) % count}", 3) for p in range(3) for i in range(count)}
    fewer = EvaluationSettings(**SETTINGS | {"against": [str(other)], "samples_per_prompt": 1})
    with collect_notes() as notes:
        found = find_opponents(fewer, prompts(3), [])["other"]
    assert found == {(f"id{p}", 0): (f"id{p}.{1 % count}", 3) for p in range(3)}
    assert notes.get("notes/equal_evaluation_seeds", 0) == noted


def tokens_of(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a sample: those of its text, and the EOS that its length counts if it is finished."""
    ids = [int(word[1:]) for word in row["completion"].split()]
    ids += [EOS] * (row["tokens"] - len(ids))
    assert ids.count(EOS) == (ids[-1] == EOS)
    return ids


def prompts(n: int) -> list[EvalPrompt]:
    return [EvalPrompt(f"id{i}", "test", (BOS, 3 + i % 20, 3 + i // 20), f"prompt {i}") for i in range(n)]


def evaluate(
    policy: nn.Module,
    reference: nn.Module,
    n: int = 40,
    all_prompts: bool = False,
    reward: Reward | None = count_reward,
    speed: Speed | None = None,
    **changes: Any,
) -> Evaluation:
    chosen = EvaluationSettings(**SETTINGS | {"num_prompts": n} | changes)
    speed = speed or FAST.resolve_for(policy, reference)
    drawn = draw_both(policy, reference, (EOS,), PAD, prompts(n), chosen, speed, decode)
    return assess(prompts(n), *drawn, chosen, reward_judge(reward), all_prompts)


def favoring(strength: float) -> nn.Module:
    """Return a model that favors one token by an offset of ``strength`` nats."""
    model = tiny_llama(scale=0.1)
    head = nn.Linear(16, VOCAB, bias=True, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)  # type: ignore[union-attr]
        head.bias.zero_()[FAVOURITE] = strength
    model.lm_head = head
    return model


# ------------------------------------------------------------------------------------------------------ diversity


def test_distinct_n_matches_counts_by_hand() -> None:
    texts = ["a b a b", "a b c"]  # bigrams: ab ba ab | ab bc
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 3 / 5
    assert distinct_n(["a b"], 3) == distinct_n([], 2) == distinct_n(["", "one"], 2) == 0.0


def test_self_bleu_matches_a_computation_by_hand() -> None:
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d e"]) == self_bleu([]) == 0.0
    # Each against the other: unigrams 4/5; smoothing adds one to both counts of the longer n-grams: 4/5, 3/4, 2/3.
    texts = ["a b c d e", "a b c d f"]
    expected = math.exp(sum(map(math.log, (4 / 5, (3 + 1) / (4 + 1), (2 + 1) / (3 + 1), (1 + 1) / (2 + 1)))) / 4)
    assert self_bleu(texts) == pytest.approx(expected, rel=1e-6)
    assert self_bleu(["a b c d e", "f g h i j"]) < self_bleu(texts)


# ------------------------------------------------------------------------------------------------------ intervals


def interval(values: Sequence[float], confidence: float, samples: int, seed: int) -> tuple[float, float]:
    found = Bootstrap(confidence=confidence, draws=samples, seed=seed).resample(range(len(values))).mean(values)
    return found.low, found.high


def test_bootstrap_interval_has_its_stated_coverage() -> None:
    rng = np.random.default_rng(0)
    truth, covered, widths = 0.6, 0, []
    for trial in range(300):
        wins = rng.binomial(1, truth, 60).astype(float).tolist()
        low, high = interval(wins, confidence=0.9, samples=400, seed=trial)
        covered += low <= truth <= high
        widths.append(high - low)
    assert 0.86 <= covered / 300 <= 0.94
    assert np.mean(widths) == pytest.approx(2 * 1.645 * math.sqrt(0.24 / 60), rel=0.05)


def test_bootstrap_interval_is_seeded_ordered_and_wider_for_more_confidence() -> None:
    values = np.random.default_rng(1).normal(size=50).tolist()
    first = interval(values, confidence=0.9, samples=1000, seed=3)
    assert first == interval(values, confidence=0.9, samples=1000, seed=3)
    wider = interval(values, confidence=0.99, samples=1000, seed=3)
    assert wider[0] < first[0] < np.mean(values) < first[1] < wider[1]
    assert interval([0.5] * 9, confidence=0.95, samples=10, seed=0) == (0.5, 0.5)


# --------------------------------------------------------------------------------------------------- the evaluation


def test_a_policy_equal_to_its_reference_has_no_kl_and_no_advantage() -> None:
    model = tiny_llama(scale=0.1)
    metrics = evaluate(model, tiny_llama(scale=0.1)).metrics
    assert metrics["eval/kl"] == 0
    assert metrics["eval/win_rate_ci_low"] <= 0.5 <= metrics["eval/win_rate_ci_high"]
    assert metrics["eval/win_rate_ci_low"] < metrics["eval/win_rate"] < metrics["eval/win_rate_ci_high"]


def test_evaluation_disables_dropout() -> None:
    model = tiny_llama(scale=0.1, dtype=torch.float32, attention_dropout=0.9, _attn_implementation="eager").train()
    metrics = evaluate(model, tiny_llama(scale=0.1, dtype=torch.float32), n=4).metrics
    assert metrics["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert model.training


def test_swapping_policy_and_reference_mirrors_the_win_rate() -> None:
    better, plain = favoring(2.0), favoring(0.0)
    ahead, behind = evaluate(better, plain).metrics, evaluate(plain, better).metrics
    assert ahead["eval/win_rate_ci_low"] > 0.6
    assert behind["eval/win_rate_ci_high"] < 0.4
    assert ahead["eval/reward"] > ahead["eval/reference/reward"]
    assert behind["eval/reward"] < behind["eval/reference/reward"]


def test_metrics_can_be_recomputed_from_the_samples() -> None:
    result = evaluate(favoring(1.0), favoring(0.0), n=15)
    rows, metrics = result.samples, result.metrics
    assert len(rows) == 30 and [row["sample_index"] for row in rows[:4]] == [0, 1, 0, 1]
    assert [row["prompt_id"] for row in rows[:4]] == ["id0", "id0", "id1", "id1"]
    wins = []
    for row in rows:
        mine, other = (count_reward([""], [row[key]])["reward"][0] for key in ("completion", "reference_completion"))
        assert (row["reward"], row["reference_reward"]) == (mine, other)
        drawn = [one["reward"] for one in row["references"]]
        assert drawn == [count_reward([""], [one["completion"]])["reward"][0] for one in row["references"]]
        verdicts = [1.0 if mine > one else 0.0 if mine < one else 0.5 for one in drawn]
        assert drawn[0] == other and row["references"][0]["completion"] == row["reference_completion"]
        assert [one["verdict"] for one in row["references"]] == verdicts and row["verdict"] == np.mean(verdicts)
        assert row["tokens"] == len(tokens_of(row))
        wins.append(row["verdict"])
    assert metrics["eval/win_rate"] == pytest.approx(np.mean(wins))
    assert metrics["eval/reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert metrics["eval/reward/shortness"] == pytest.approx(-np.mean([len(row["completion"].split()) for row in rows]))
    assert metrics["eval/length"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    texts = [row["completion"] for row in rows]
    assert metrics["eval/distinct_2"] == distinct_n(texts, 2)
    assert metrics["eval/self_bleu"] == pytest.approx(self_bleu(texts[:20]))
    assert metrics["eval/reference/distinct_2"] == distinct_n([row["reference_completion"] for row in rows], 2)
    assert "eval/reference/kl" not in metrics


def test_log_probs_of_samples_match_the_models() -> None:
    policy, reference = favoring(1.0), favoring(0.0)
    rows = evaluate(policy, reference, n=10, batch_size=3).samples
    ids = [prompt.ids for prompt in prompts(60)[:10] for _ in range(2)]
    completions = [tokens_of(row) for row in rows]
    batch = sequences(list(zip(ids, completions, strict=True)))
    for key, model in (("logp_policy", policy), ("logp_reference", reference)):
        np.testing.assert_allclose([row[key] for row in rows], completion_logps(model, batch).detach(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_speed_settings_do_not_change_metrics(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed with logits on demand against padded with all logits; parts of another size, and all at once."""
    models = favoring(1.0), favoring(0.0)
    plain = evaluate(*models, n=12, speed=PLAIN, temperature=temperature)
    for tokens, batch_size in ((16384, 32), (30, 5)):
        monkeypatch.setattr(completions, "SCORED_TOKENS", tokens)
        fast = evaluate(*models, n=12, temperature=temperature, batch_size=batch_size)
        assert fast.metrics == pytest.approx(plain.metrics, rel=1e-9)
        for row, other in zip(fast.samples, plain.samples, strict=True):
            assert row["completion"] == other["completion"]
            keys = ("logp_policy", "logp_reference")
            assert [row[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-9)


def test_deferred_logits_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models = favoring(1.0), favoring(0.0)
    speed = replace(FAST, max_logits=VOCAB * 8).resolve_for(*models)
    made: list[int] = []
    for model in models:
        model.lm_head.register_forward_hook(lambda _, args, out: made.append(out.shape[-2]))  # type: ignore[union-attr]
    chosen = EvaluationSettings(**SETTINGS | {"num_prompts": 6, "samples_per_prompt": 4})
    found = completions.draw(
        models[0], "policy", prompts(6), chosen, speed, (EOS,), PAD, decode, other=lambda: nullcontext(models[1])
    )
    scored = made[next(i for i, rows in enumerate(made) if rows == 0) :]  # after the sampling
    assert max(scored) == 8 and sum(scored) == 2 * sum(found.tokens)


def test_metrics_use_the_distribution_at_the_sampling_temperature() -> None:
    models = favoring(1.0), favoring(0.0)
    found = evaluate(*models, n=10, temperature=0.5, batch_size=7)
    ids = [prompt.ids for prompt in prompts(10) for _ in range(2)]
    logps: list[list[float]] = []
    entropies, kls = [], []
    for prompt, row in zip(ids, found.samples, strict=True):
        completion = torch.tensor(tokens_of(row))
        with torch.no_grad():
            logits = [model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] for model in models]
        ours, theirs = (torch.log_softmax(values / 0.5, -1) for values in logits)
        logps.append([values.gather(1, completion[:, None]).sum().item() for values in (ours, theirs)])
        entropies.append(-(ours.exp() * ours).sum().item())
        kls.append((ours.exp() * (ours - theirs)).sum().item())
    kept = [[row["logp_policy"], row["logp_reference"]] for row in found.samples]
    np.testing.assert_allclose(kept, logps, rtol=1e-6)
    assert found.metrics["eval/entropy_sequence"] == pytest.approx(np.mean(entropies))
    assert found.metrics["eval/kl"] == pytest.approx(np.mean(kls))


def test_kl_and_entropy_agree_with_enumeration() -> None:
    """Four tokens, three positions: 64 sequences, so the sampled means have an exact counterpart."""
    policy, reference = (
        tiny_llama(seed, scale=0.15, vocab_size=4, eos_token_id=None, pad_token_id=None) for seed in (0, 1)
    )
    everything = every_completion([1], 4, 3)
    with torch.no_grad():
        log_p, log_q = completion_logps(policy, everything), completion_logps(reference, everything)
    nothing = (20,)  # no token of this vocabulary, so nothing ends early
    many = {"num_prompts": 1, "samples_per_prompt": 3000, "max_new_tokens": 3, "batch_size": 3000}
    settings = EvaluationSettings(**SETTINGS | many | {"bootstrap_samples": 10, "self_bleu_samples": 2})
    prompt = EvalPrompt("id", "test", (1,), "")
    drawn = draw_both(policy, reference, nothing, PAD, [prompt], settings, FAST, decode)
    result = assess([prompt], *drawn, settings, None)
    metrics = result.metrics
    assert metrics["eval/length"] == 3
    assert metrics["eval/entropy_sequence"] == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=0.01)
    assert metrics["eval/entropy"] == pytest.approx(metrics["eval/entropy_sequence"] / 3)
    assert metrics["eval/kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=0.05)
    assert metrics["eval/reference/entropy_sequence"] == pytest.approx(-(log_q.exp() * log_q).sum().item(), rel=0.01)
    # entropy and kl agree with the plain estimates from the samples' own log-probs
    logps = np.array([[row["logp_policy"], row["logp_reference"]] for row in result.samples])
    assert -logps[:, 0].mean() == pytest.approx(metrics["eval/entropy_sequence"], rel=0.02)
    assert (logps[:, 0] - logps[:, 1]).mean() == pytest.approx(metrics["eval/kl"], rel=0.1)


def test_with_all_prompts_the_bootstrap_resamples_samples() -> None:
    model = tiny_llama(scale=0.1)
    one = {"n": 1, "samples_per_prompt": 200}
    sampled, whole = (evaluate(model, favoring(1.0), all_prompts=all_, **one).metrics for all_ in (False, True))
    assert "eval/win_rate_ci_low" not in sampled and "eval/win_rate_ci_high" not in sampled
    rate, width = whole["eval/win_rate"], whole["eval/win_rate_ci_high"] - whole["eval/win_rate_ci_low"]
    rows = evaluate(model, favoring(1.0), all_prompts=True, **one).samples  # sample i meets completion i alone
    assert rate == np.mean([verdict_of_rewards(row["reward"], row["reference_reward"]) for row in rows])
    assert len({row["reference_completion"] for row in rows}) > 50 and "references" not in rows[0]
    assert (
        rate == pytest.approx(sampled["eval/win_rate"], abs=0.1)
        and 0.02 < width < 2 * 1.96 * math.sqrt(rate * (1 - rate) / 200) * 1.1
    )


def test_several_draws_of_the_reference_are_all_compared() -> None:
    """All pairs of samples, by hand; draws have their own seed, so that another seed of the run meets the same ones."""
    models, judge = (favoring(1.0), favoring(0.0)), Favourable()
    shared: dict[str, Any] = {"n": 12, "reference_samples": 5, "reference_seed": 7}
    first, other = (evaluate(*models, **shared, seed=seed) for seed in (0, 1))
    drawn = [[one["completion"] for one in row["references"]] for row in first.samples]
    assert all(len(one) == 5 for one in drawn) and sorted(drawn[0]) == sorted(drawn[1])  # two samples of one prompt
    assert drawn[0][0] == drawn[1][-1]  # each sample is shown beside another one
    assert [[one["completion"] for one in row["references"]] for row in other.samples] == drawn
    assert [row["completion"] for row in first.samples] != [row["completion"] for row in other.samples]

    rates = []
    for row in first.samples:
        rewards = count_reward([""] * 6, [row["completion"], *(one["completion"] for one in row["references"])])[
            "reward"
        ]
        rates.append(np.mean([(rewards[0] > one) + 0.5 * (rewards[0] == one) for one in rewards[1:]]))
    assert first.metrics["eval/win_rate"] == pytest.approx(np.mean(rates), abs=1e-12)
    by_judge = judged(judge, n=12, seed=0, reference_samples=5, reference_seed=7)
    assert len(judge.asked) == 12 * 2 * 5
    for key in ("win_rate", "win_rate_ci_low", "win_rate_length_controlled", "win_rate_length_controlled_ci_high"):
        assert by_judge.metrics[f"eval/{key}"] == first.metrics[f"eval/{key}"]
    once = [row for row in first.samples if row["sample_index"] == 0]
    rewards = [one["reward"] for row in once for one in row["references"]]
    assert first.metrics["eval/reference/reward"] == pytest.approx(np.mean(rewards))
    lengths = [one["tokens"] for row in once for one in row["references"]]
    assert first.metrics["eval/reference/length"] == pytest.approx(np.mean(lengths))


def test_more_draws_of_the_reference_are_the_same_and_some_more() -> None:
    models = favoring(1.0), favoring(0.0)
    few, many = (evaluate(*models, n=6, reference_samples=count, reference_seed=3).samples for count in (2, 4))
    for row, longer in zip(few, many, strict=True):
        texts, more = ({one["completion"] for one in found["references"]} for found in (row, longer))
        assert texts <= more


def test_several_draws_narrow_the_interval_of_the_win_rate() -> None:
    models = favoring(0.3), favoring(0.0)
    widths = []
    for count in (1, 16):
        found = evaluate(*models, n=60, samples_per_prompt=1, reference_samples=count, bootstrap_samples=2000).metrics
        widths.append(found["eval/win_rate_ci_high"] - found["eval/win_rate_ci_low"])
        sole = evaluate(favoring(0.0), favoring(0.0), n=60, samples_per_prompt=1, reference_samples=count).metrics
        assert sole["eval/win_rate_ci_low"] < 0.5 < sole["eval/win_rate_ci_high"]
    assert widths[1] < 0.85 * widths[0]


def test_diversity_of_the_reference_needs_as_many_completions_as_the_policy() -> None:
    models = favoring(1.0), favoring(0.0)
    equal, more, fewer = (
        evaluate(*models, n=6, samples_per_prompt=2, reference_samples=count).metrics for count in (2, 5, 1)
    )
    for name in ("distinct_2", "self_bleu", "distinct_samples"):
        key = f"eval/reference/{name}"
        assert equal[key] == more[key] and key not in fewer and f"eval/{name}" in fewer
    assert "eval/reference/entropy" in fewer


def test_without_a_reward_the_win_rate_is_absent() -> None:
    result = evaluate(tiny_llama(), tiny_llama(), n=4, reward=None)
    assert not [key for key in result.metrics if "reward" in key or "win_rate" in key]
    assert not {"reward", "reference_reward", "verdict"} & set(result.samples[0])
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_evaluation_is_seeded_and_reports_progress() -> None:
    first, again, other = (evaluate(favoring(1.0), favoring(0.0), n=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert [row["completion"] for row in first.samples] != [row["completion"] for row in other.samples]
    done: list[int] = []
    settings = EvaluationSettings(**SETTINGS | {"num_prompts": 7, "samples_per_prompt": 1, "batch_size": 3})
    model = tiny_llama()
    draw_both(model, model, (EOS,), PAD, prompts(7), settings, FAST, decode, done.append)
    assert sum(done) == 14 and max(done) == 3


# ------------------------------------------------------------------------------------------- judges and opponents


class Favourable:
    """A judge that only compares: the completion with more of the favorite token wins; no answer to some prompts."""

    identity: dict[str, Any] = {"judge": "favorable"}  # noqa: RUF012

    def __init__(self, silent: Sequence[str] = ()) -> None:
        self.silent = silent
        self.asked: list[JudgedPair] = []

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> None:
        return None

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        self.asked += comparisons
        return [None if one.prompt in self.silent else self.verdict(one) for one in comparisons]

    @staticmethod
    def verdict(one: JudgedPair) -> float:
        first, second = count_reward(["", ""], [one.first, one.second])["reward"]
        return verdict_of_rewards(first, second)

    def usage(self) -> dict[str, float]:
        return {"calls": float(len(self.asked))}


def judged(judge: Judge, n: int = 20, opponents: dict[str, Opponent] | None = None, **changes: Any) -> Evaluation:
    settings = EvaluationSettings(**SETTINGS | {"num_prompts": n} | changes)
    models = favoring(1.0), favoring(0.0)
    drawn = draw_both(*models, (EOS,), PAD, prompts(n), settings, FAST, decode)
    return assess(prompts(n), *drawn, settings, judge, opponents=opponents)


def test_a_comparing_judge_agrees_with_its_reward() -> None:
    by_reward, by_judge = evaluate(favoring(1.0), favoring(0.0), n=20), judged(Favourable())
    for row, other in zip(by_reward.samples, by_judge.samples, strict=True):
        assert row["verdict"] == other["verdict"] and "reward" not in other and "reference_reward" not in other
    rates = {key: value for key, value in by_reward.metrics.items() if "win_rate" in key}
    assert {key: by_judge.metrics[key] for key in rates} == rates and len(rates) == 6
    assert not [key for key in by_judge.metrics if "reward" in key]


def test_an_unanswered_comparison_is_null_and_does_not_count() -> None:
    rows = (found := judged(Favourable(silent=["prompt 0", "prompt 1"]))).samples
    assert [row["verdict"] for row in rows[:4]] == [None] * 4
    answered = [row["verdict"] for row in rows[4:]]
    assert None not in answered and found.metrics["eval/win_rate"] == pytest.approx(np.mean(answered))
    silent = judged(Favourable(silent=[f"prompt {i}" for i in range(20)]))
    assert not [key for key in silent.metrics if "win_rate" in key]


def test_only_requested_opponents_are_judged() -> None:
    judge = Favourable()
    found = judged(judge, against=[])
    assert judge.asked == [] and "eval/win_rate" not in found.metrics and "verdict" not in found.samples[0]
    assert "eval/reference/entropy" in found.metrics


@pytest.mark.parametrize("judge", [Favourable(), reward_judge(count_reward)], ids=["compares", "scores"])
def test_further_opponents_have_their_own_win_rates(judge: Judge) -> None:
    best, worst = ("w9 w9 w9 w9 w9 w9", 6), ("", 1)
    opponents = {
        "best": {(f"id{i}", k): best for i in range(20) for k in range(2)},
        "half": {(f"id{i}", k): worst for i in range(10) for k in range(2)},
    }
    found = judged(judge, opponents=opponents)
    metrics, rows = found.metrics, found.samples
    assert metrics["eval/win_rate/best"] < 0.1 and metrics["eval/win_rate/half"] > 0.5
    assert (metrics["eval/prompts/best"], metrics["eval/prompts/half"]) == (20, 10)
    ends = ("", "_ci_low", "_ci_high")
    for name in ("", "/best", "/half"):
        for kind in ("", "_length_controlled"):
            low, rate, high = (metrics[f"eval/win_rate{name}{kind}{ends[i]}"] for i in (1, 0, 2))
            assert low <= rate <= high
    assert rows[0]["opponents"]["best"]["completion"] == best[0] and rows[0]["opponents"]["best"]["tokens"] == 6
    assert "half" in rows[19]["opponents"] and "half" not in rows[20]["opponents"]
    verdicts = [row["opponents"]["half"]["verdict"] for row in rows[:20]]
    assert metrics["eval/win_rate/half"] == pytest.approx(np.mean(verdicts))
    assert ("reward" in rows[0]["opponents"]["best"]) == isinstance(judge, RewardJudge)


def test_an_opponent_with_the_same_samples_is_a_tie() -> None:
    rows = judged(Favourable()).samples
    own = {(row["prompt_id"], row["sample_index"]): (row["completion"], row["tokens"]) for row in rows}
    metrics = judged(Favourable(), opponents={"itself": own}).metrics
    for kind in ("", "_length_controlled"):
        rate, low, high = (metrics[f"eval/win_rate/itself{kind}{end}"] for end in ("", "_ci_low", "_ci_high"))
        assert rate == 0.5 and low < 0.5 and high == pytest.approx(1 - low)


def test_metrics_do_not_depend_on_the_batch_size() -> None:
    whole = evaluate(favoring(1.0), favoring(0.0), n=13, batch_size=26)
    for size in (1, 4, 64):
        other = evaluate(favoring(1.0), favoring(0.0), n=13, batch_size=size)
        assert other.metrics == pytest.approx(whole.metrics, rel=1e-9)
        assert [row["completion"] for row in other.samples] == [row["completion"] for row in whole.samples]
    # nor does what is drawn for a prompt depend on how many others there are
    fewer = evaluate(favoring(1.0), favoring(0.0), n=5)
    assert [row["completion"] for row in fewer.samples] == [row["completion"] for row in whole.samples[:10]]


def test_distinct_samples_averages_over_prompts() -> None:
    assert distinct_samples([["a", "a", "b", "b"], ["a", "b", "c", "d"]]) == 0.75
    found = evaluate(favoring(1.0), favoring(0.0), n=6, samples_per_prompt=5)
    texts = [[row["completion"] for row in found.samples[first : first + 5]] for first in range(0, 30, 5)]
    assert found.metrics["eval/distinct_samples"] == distinct_samples(texts)
    assert "eval/reference/distinct_samples" in found.metrics
    assert "eval/distinct_samples" not in evaluate(favoring(1.0), favoring(0.0), n=6, samples_per_prompt=1).metrics


def test_metrics_have_intervals_around_them() -> None:
    metrics = evaluate(favoring(1.0), favoring(0.0)).metrics
    for name in ("reward", "kl", "entropy", "entropy_sequence", "length", "win_rate", "win_rate_length_controlled"):
        assert metrics[f"eval/{name}_ci_low"] < metrics[f"eval/{name}"] < metrics[f"eval/{name}_ci_high"], name


def test_cached_completions_are_not_drawn_again() -> None:
    stored: dict[str, Draws] = {}
    drawn: list[str] = []

    def cache(stage: str, settings: EvaluationSettings, draw: Callable[[], Draws]) -> Draws:
        if stage not in stored:
            drawn.append(stage)
            stored[stage] = Draws(**json.loads(json.dumps(asdict(draw()))))
        return stored[stage]

    settings = EvaluationSettings(**SETTINGS | {"num_prompts": 6})
    models = favoring(1.0), favoring(0.0)
    first, again = (draw_both(*models, (EOS,), PAD, prompts(6), settings, FAST, decode, cache=cache) for _ in range(2))
    assert first == again and drawn == ["policy", "reference"]
    assert first == draw_both(*models, (EOS,), PAD, prompts(6), settings, FAST, decode)
