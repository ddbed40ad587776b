"""Synthetic run directories with the files of a training run and known effects."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

ANIMALS = ("goat", "owl", "fox", "crow", "hare", "mouse")
THINGS = ("kite", "boat", "flute", "lamp", "drum", "map")
STEPS = 60
TITLES = {
    "spo": "Soft Preference Optimization",
    "dpo": "Direct Preference Optimization",
    "ipo": "Identity Preference Optimization",
}
# Lift of the reward over the reference, KL and entropy of each method at alpha = beta = 0.1.
CHARACTER = {"spo": (1.1, 24.0, 0.95), "dpo": (0.85, 17.0, 0.78), "ipo": (0.55, 9.0, 0.88)}


def write_run(
    folder: Path,
    *,
    method: str = "spo",
    seed: int = 1,
    alpha: float | None = None,
    beta: float = 0.1,
    prompts: int = 48,
    samples: int = 1,
    lift: float | None = None,
    luck: int | None = None,
    changes: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    judge: bool = True,
    finished: bool = True,
    error: str | None = None,
    trained: Mapping[str, float] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """Write a run directory.

    Args:
        folder: Folder of the sweep, in which the run directory is named as jobs are.
        method: Name of the method.
        seed: Random seed of the run.
        alpha: Coefficient alpha; ``None`` for a method that does not read it.
        beta: Coefficient beta.
        prompts: Number of prompts of the test split.
        samples: Number of samples per prompt.
        lift: Reward of the policy over the reference; ``None`` for a value that follows from the coefficients.
        luck: Seed of the samples; ``None`` for one of this run.
        changes: Changes of the flat configuration.
        provenance: Changes of ``inputs`` in the provenance.
        judge: Whether there are rewards and verdicts.
        finished: Whether there are final numbers.
        error: Reason why the last attempt failed; ``None`` for no failure.
        trained: Changes of the budget in ``metrics.json``.
        without: Keys that are left out of ``metrics.json``.
    """
    config = _config(method, seed, alpha, beta, prompts, samples) | dict(changes or {})
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    coefficients = "" if alpha is None else f"_alpha-{alpha:g}"
    run_dir = folder / f"method-{method}{coefficients}_beta-{beta:g}_seed-{seed}"
    run_dir.mkdir(parents=True)
    made, kl, entropy = _truth(method, alpha, beta)
    generator = random.Random(f"{digest if luck is None else luck} {seed if luck is not None else ''}")
    # A seed shifts the rewards of all its samples.
    shift = generator.gauss(0, 0.05)
    rows = _samples(generator, seed, prompts, samples, (made if lift is None else lift) + shift, kl, entropy, judge)
    config = dict(sorted(config.items()))
    identity = {"adapter": None, "code": "0.1.0+0123456789ab", "config": config, "data": None, "weights": None}
    _json(run_dir / "identity.json", {**identity, "digest": digest})
    nested = _nested(config)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(nested))
    follow = {"evaluation.seed": "${seed}", "scheduler.num_training_steps": "${trainer.max_steps}"}
    if config.get("data.subset_seed") == seed:
        follow["data.subset_seed"] = "${seed}"
    composed = _nested({**config, **follow})
    (run_dir / "composed.yaml").write_text(yaml.safe_dump(composed))
    inputs = {"reference_sha256": "ab" * 32, "pairs_sha256": "cd" * 32, **(provenance or {})}
    _json(run_dir / "provenance.json", {"code": identity["code"], "inputs": inputs, "seeds": {"seed": seed}})
    history = _history(generator, kl, entropy, finished)
    _lines(run_dir / "history.jsonl", history)
    if finished:
        metrics = {**{k: v for row in history for k, v in row.items() if k != "step"}, **_metrics(generator, rows, kl)}
        metrics |= _trained(config) | dict(trained or {})
        _json(run_dir / "metrics.json", {key: value for key, value in metrics.items() if key not in set(without)})
        _lines(run_dir / "samples.jsonl", rows)
    if error is not None:
        _json(run_dir / "failure.json", {"error": error, "traceback": "...", "at": "2030-01-01", "attempts": 1})
    return run_dir


def write_sweep(folder: Path, *, seeds: Iterable[int] = (1, 2, 3), grid: bool = False, **settings: Any) -> Path:
    """Write runs of SPO, DPO and IPO, with one setting or nine each."""
    for seed in seeds:
        alphas, betas = ((0.03, 0.1, 0.3), (0.03, 0.1, 0.3)) if grid else ((0.1,), (0.1,))
        for alpha in alphas:
            for beta in betas:
                write_run(folder, method="spo", seed=seed, alpha=alpha, beta=beta, **settings)
        nine = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0) if grid else (0.1,)
        for method in ("dpo", "ipo"):
            for beta in nine:
                write_run(folder, method=method, seed=seed, beta=beta, **settings)
    return folder


def _truth(method: str, alpha: float | None, beta: float) -> tuple[float, float, float]:
    """Return lift, KL and entropy of a policy whose reward grows with its KL, up to a point."""
    gain, kl, entropy = CHARACTER.get(method, CHARACTER["dpo"])
    away = 0.5 * math.log10(beta / 0.1) + (0.4 * math.log10((alpha or 0.1) / 0.1))
    kl *= 10 ** (-0.8 * away)
    return gain * math.exp(-((away + 0.1) ** 2) * 1.6), kl, min(1.35, entropy * 10 ** (0.18 * away))


def _config(method: str, seed: int, alpha: float | None, beta: float, prompts: int, samples: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "beta._target_": "spo.schedules.Constant",
        "beta.value": beta,
        "data.batch_size": 32,
        "data.path": None,
        "data.source._target_": "spo.data.stories.StoriesSource",
        "data.seed": 0,
        "evaluation.num_prompts": prompts,
        "evaluation.samples_per_prompt": samples,
        "evaluation.batch_size": 64,
        "evaluation.seed": seed,
        "judge._target_": "spo.evaluation.judges.RewardJudge",
        "method.name": method,
        "method.title": TITLES.get(method, method.upper()),
        "method.loss._target_": f"spo.losses.{method.upper()}Loss",
        "model.path": None,
        "model.initial._target_": "spo.models.tiny.build",
        "optimizer.lr": 0.001,
        "scheduler.num_training_steps": STEPS,
        "seed": seed,
        "sft.max_steps": 300,
        "trainer.max_steps": STEPS,
    }
    if alpha is not None:
        config |= {"alpha._target_": "spo.schedules.Constant", "alpha.value": alpha}
    return config


def _samples(
    generator: random.Random, seed: int, prompts: int, samples: int, lift: float, kl: float, entropy: float, judge: bool
) -> list[dict[str, Any]]:
    rows = []
    for prompt in range(prompts):
        of_prompt = random.Random(f"prompt {prompt}")
        animal, thing = of_prompt.choice(ANIMALS), of_prompt.choice(THINGS)
        hardness = of_prompt.gauss(0, 0.6)
        for index in range(samples):
            of_reference = random.Random(f"reference {prompt} {index} {seed}")
            theirs, reference_reward = _story(of_reference, animal, thing), 5 + hardness + of_reference.gauss(0, 1.1)
            ours, reward = _story(generator, animal, thing), 5 + hardness + lift + generator.gauss(0, 1.0)
            tokens = max(8, round(generator.gauss(52, 9)))
            logp = -entropy * tokens * generator.uniform(0.8, 1.2)
            row = {
                "prompt_id": f"{prompt:016x}",
                "split": "test",
                "sample_index": index,
                "prompt": f"{of_prompt.choice(('Tom', 'Mia', 'Leo'))} the {animal} wanted a {thing}.",
                "completion": ours,
                "tokens": tokens,
                "logp_policy": logp,
                "logp_reference": logp - kl * generator.uniform(0.4, 1.6),
                "reference_completion": theirs,
                "reference_tokens": max(8, round(of_reference.gauss(55, 10))),
            }
            if judge:
                verdict = 0.5 + 0.5 * ((reward > reference_reward) - (reward < reference_reward))
                row |= {"reward": reward, "reference_reward": reference_reward, "verdict": verdict}
            rows.append(row)
    return rows


def _story(generator: random.Random, animal: str, thing: str) -> str:
    search = generator.choice(
        ("looked behind every stone", "asked a wise owl", "baked bread and sold it", "dug a hole")
    )
    place = generator.choice(("under a log", "by the river", "in the old barn", "on the hill"))
    end = generator.choice((f"The {animal} hugged the {thing} and laughed.", "Then it rained.", "They shared it."))
    return f" But it was lost. The {animal} {search}. At last it lay {place}. {end}"


def _metrics(generator: random.Random, rows: list[dict[str, Any]], kl: float) -> dict[str, float]:
    def mean(key: str) -> float:
        return fmean(row[key] for row in rows)

    metrics = {
        "eval/kl": kl * generator.uniform(0.93, 1.07),
        "eval/entropy": -sum(row["logp_policy"] for row in rows) / sum(row["tokens"] for row in rows),
        "eval/entropy_sequence": -mean("logp_policy"),
        "eval/distinct_2": generator.uniform(0.28, 0.34),
        "eval/self_bleu": generator.uniform(0.18, 0.24),
        "eval/length": mean("tokens"),
        "eval/reference/entropy": 1.31,
        "eval/reference/distinct_2": 0.36,
        "eval/reference/self_bleu": 0.16,
        "eval/reference/length": mean("reference_tokens"),
        "eval/rewards/accuracies": generator.uniform(0.6, 0.7),
        "data/pairs_used": 1900,
    }
    if "verdict" in rows[0]:
        wins = mean("verdict")
        metrics |= {
            "eval/win_rate": wins,
            "eval/win_rate_ci_low": max(0.0, wins - 0.12),
            "eval/win_rate_ci_high": min(1.0, wins + 0.12),
            "eval/win_rate_length_controlled": min(1.0, wins + 0.03),
            "eval/reward": mean("reward"),
            "eval/reference/reward": mean("reference_reward"),
            "val/win_rate": min(1.0, max(0.0, wins + generator.gauss(0, 0.02))),
            "val/reward": mean("reward") + generator.gauss(0, 0.05),
        }
    return metrics


def _trained(config: Mapping[str, Any]) -> dict[str, float]:
    steps = config["trainer.max_steps"]
    tokens = 640.0 * steps if config["method.name"] == "spo" else 0.0
    return {
        "trained/steps": steps,
        "trained/pairs": steps * config["data.batch_size"],
        "trained/sampled_tokens": tokens,
        "trained/changed_share": 1.0,
    }


def _history(generator: random.Random, kl: float, entropy: float, finished: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(2, (STEPS if finished else STEPS // 2) + 1, 2):
        done = step / STEPS
        row = {
            "step": step,
            "train/loss": 0.7 * math.exp(-done) + generator.gauss(0, 0.02),
            "train/rewards/margins": 2 * done + generator.gauss(0, 0.1),
            "train/rewards/accuracies": min(1.0, 0.5 + 0.25 * done + generator.gauss(0, 0.03)),
            "train/kl": kl * done**1.3 * generator.uniform(0.85, 1.15),
            "train/entropy": 1.31 + (entropy - 1.31) * done + generator.gauss(0, 0.01),
            "train/logps/chosen": -60 - 6 * done,
            "train/logps/rejected": -66 - 16 * done,
            "train/grad_norm": 3 + generator.random(),
        }
        if step % 10 == 0:
            row |= {
                "val/loss": 0.72 * math.exp(-0.9 * done) + generator.gauss(0, 0.01),
                "val/rewards/margins": 1.8 * done,
                "val/rewards/accuracies": min(1.0, 0.5 + 0.2 * done + generator.gauss(0, 0.01)),
                "val/kl": kl * done**1.3,
                "val/entropy": 1.31 + (entropy - 1.31) * done,
            }
        rows.append(row)
    return rows


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2))


def _lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
