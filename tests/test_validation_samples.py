"""Samples at validations: win rate, reward, KL, entropy and length of the same samples, compared by value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spo import processes
from spo.callbacks import ValidationSamples
from spo.data import EvalPrompt
from spo.errors import JudgeError
from spo.evaluation import EvaluationSettings
from spo.evaluation.judges import Judge, reward_judge
from spo.losses import DPOLoss
from spo.models import AdapterOffReference, FrozenReference, LoraSettings, PrecomputedReference
from spo.records.files import read_jsonl
from spo.sampling import sample as draw
from spo.types import Sequences
from tests.helpers import BOS, EOS, PAD, Spied, in_processes, make_module, model_spec, save_model, tiny_llama

FAVORITE = 9
SETTINGS: dict[str, Any] = {
    "num_prompts": 1,
    "selection_prompts": 0,
    "samples_per_prompt": 3,
    "max_new_tokens": 6,
    "temperature": 1.0,
    "batch_size": 16,
    "against": ["reference"],
    "confidence": 0.95,
    "bootstrap_samples": 50,
    "self_bleu_samples": 0,
    "seed": 0,
}
PROMPTS = [EvalPrompt(f"id{i}", "selection", (BOS, 3 + i % 20, 3 + i // 20), f"prompt {i}") for i in range(60)]


def count_favorite(_: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
    return {"reward": [float(text.split().count(f"w{FAVORITE}")) for text in completions]}


def decode(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


class Logged:
    """Stands for a run's trainer: its step and what it was given to log."""

    def __init__(self) -> None:
        self.global_step, self.is_global_zero = 0, True
        self.rows: list[dict[str, float]] = []
        self.loggers = [SimpleNamespace(log_metrics=lambda row, step: self.rows.append({"step": step, **row}))]


def validated(
    module: Spied, folder: Path, num_prompts: int | None = None, judge: Judge | None = None, **changes: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the row and the samples of one validation, on all of the prompts by default."""
    callback = ValidationSamples(str(folder / "samples.validation.jsonl"), num_prompts)
    settings = EvaluationSettings(**SETTINGS | changes)
    callback.attach(PROMPTS, settings, judge or reward_judge(count_favorite), (EOS,), PAD, decode)
    trainer = Logged()
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    [row] = trainer.rows
    return row, read_jsonl(callback.path)


def measured_one_by_one(policy: nn.Module, reference: nn.Module, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return KL, entropy and length by a plain forward pass over each sample."""
    prompts = {prompt.prompt_id: list(prompt.ids) for prompt in PROMPTS}
    kl, entropy, length = 0.0, 0.0, 0
    for sample in samples:
        ids = [int(word[1:]) for word in sample["completion"].split()]
        ids += [EOS] * (sample["tokens"] - len(ids))
        whole = torch.tensor([[*prompts[sample["prompt_id"]], *ids]])
        with torch.no_grad():
            p, q = (
                model(input_ids=whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1) for model in (policy, reference)
            )
        kl += float((p.exp() * (p - q)).sum())
        entropy -= float((p.exp() * p).sum())
        length += len(ids)
    return {"kl": kl / len(samples), "entropy": entropy / length, "length": length / len(samples)}


def test_kl_entropy_and_length_are_those_of_the_samples(tmp_path: Path) -> None:
    policy, reference = tiny_llama(0), tiny_llama(1)
    module = make_module(policy, loss=DPOLoss(), reference=FrozenReference(), reference_model=reference)
    row, samples = validated(module, tmp_path)
    assert len(samples) == 3 * len(PROMPTS)
    expected = measured_one_by_one(policy, reference, samples)
    assert expected["kl"] > 1 and len({sample["tokens"] for sample in samples}) > 1
    for name, value in expected.items():
        assert row[f"val/samples/{name}"] == pytest.approx(value, rel=1e-6), name
    assert row["val/samples/reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / len(samples))
    assert row["val/samples/win_rate"] == pytest.approx(sum(sample["verdict"] for sample in samples) / len(samples))


def test_before_the_first_step_the_kl_is_zero_and_the_win_rate_about_one_half(tmp_path: Path) -> None:
    module = make_module(tiny_llama(0), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(0))
    row, samples = validated(module, tmp_path)
    assert row["val/samples/kl"] == pytest.approx(0, abs=1e-9)
    # The draws are independent, and an interval of 95% contains the truth. This seed is not one of the 5%.
    assert row["val/samples/win_rate_ci_low"] < 0.5 < row["val/samples/win_rate_ci_high"]
    same = sum(sample["completion"] == sample["reference_completion"] for sample in samples)
    assert same < len(samples) / 2


def test_adapter_switched_off_scores_the_samples(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", scale=0.3)
    lora = LoraSettings(r=2, alpha=4.0, dropout=0.5, target_modules="all-linear")
    policy: Any = model_spec(lora=lora, dtype="float64").policy(folder, seed=0)
    module = make_module(policy, loss=DPOLoss(), reference=AdapterOffReference())
    assert validated(module, tmp_path)[0]["val/samples/kl"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    row, samples = validated(module, tmp_path)
    policy.eval()
    base = model_spec(dtype="float64").policy(folder, seed=0)
    assert row["val/samples/kl"] == pytest.approx(measured_one_by_one(policy, base, samples)["kl"], rel=1e-6) != 0


def test_reference_that_cannot_score_samples_gives_neither_kl_nor_win_rate(tmp_path: Path) -> None:
    module = make_module(tiny_llama(0), loss=DPOLoss(), reference=PrecomputedReference(str(tmp_path), 100))
    row, samples = validated(module, tmp_path)
    assert row.keys() == {"step", "val/samples/reward", "val/samples/entropy", "val/samples/length"}
    assert "logp_reference" not in samples[0] and "reference_completion" not in samples[0]


@pytest.mark.parametrize(("num_prompts", "expected"), [(7, 7), (60, 60), (1000, 60), (None, 60)])
def test_number_of_prompts_may_exceed_the_split(num_prompts: int | None, expected: int, tmp_path: Path) -> None:
    module = make_module(tiny_llama(0), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(0))
    _, samples = validated(module, tmp_path, num_prompts, samples_per_prompt=2)
    assert [sample["sample_index"] for sample in samples] == [0, 1] * expected
    assert len({sample["prompt_id"] for sample in samples}) == expected


def test_processes_share_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [
        make_module(tiny_llama(0), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(1))
        for _ in range(3)
    ]
    drawn = [0, 0, 0]

    def counted(model: nn.Module, prompts: Sequence[Any], **settings: Any) -> Sequences:
        drawn[processes.rank()] += len(prompts)
        return draw(model, prompts, **settings)

    monkeypatch.setattr("spo.evaluation.completions.sample", counted)
    row, samples = validated(modules[0], tmp_path, 5)
    assert drawn == [2 * 3 * 5, 0, 0]

    def work() -> tuple[dict[str, float], list[dict[str, Any]]]:
        (folder := tmp_path / str(processes.rank())).mkdir()
        return validated(modules[processes.rank()], folder, 5)

    drawn[:] = [0, 0, 0]
    for other, its_samples in in_processes(3, work, monkeypatch):
        assert other == pytest.approx(row, rel=1e-12)
        assert [one["completion"] for one in its_samples] == [one["completion"] for one in samples]
    assert drawn == [2 * 3 * 2, 2 * 3 * 2, 2 * 3]


class Broken:
    """A judge that is out of service."""

    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> dict[str, list[float]]:
        raise JudgeError("the endpoint does not answer")


def test_failing_judge_leaves_the_other_numbers_and_names_those_that_are_missing(tmp_path: Path) -> None:
    module = make_module(tiny_llama(0), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(1))
    callback = ValidationSamples(str(tmp_path / "samples.validation.jsonl"), 5)
    callback.attach(PROMPTS, EvaluationSettings(**SETTINGS), Broken(), (EOS,), PAD, decode)  # type: ignore[arg-type]
    trainer = Logged()
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert trainer.rows[0].keys() == {"step", *(f"val/samples/{name}" for name in ("kl", "entropy", "length"))}
    names = ("win_rate", "win_rate_ci_low", "win_rate_ci_high", "reward")
    assert callback.unanswered == {f"val/samples/{name}" for name in names}
    callback.judge = reward_judge(count_favorite)
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert callback.unanswered == set() and "val/samples/win_rate" in trainer.rows[1]
