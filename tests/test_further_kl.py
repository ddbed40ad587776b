"""The KL to further models, which an evaluation measures along the samples of the policy."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data import EvalPrompt
from spo.errors import UserError
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Evaluation, assess, draw_both
from spo.evaluation.cached_completions import cached_completions
from spo.evaluation.completions import Draws
from spo.evaluation.judges import reward_judge
from spo.records.operational_keys import is_part_of_setting
from spo.runs.identity import differences, identity
from spo.stages.extra_references import load_further_kl
from spo.stages.from_config import resolve_values
from spo.stages.prepare import prepare_run
from tests.commands import TINY, job
from tests.helpers import EOS, FAST, PAD, model_spec, save_model, tiny_llama, tiny_tokenizer
from tests.test_evaluation import SETTINGS, count_reward, decode, prompts, tokens_of

COUNT = 6


def evaluate(further: dict[str, nn.Module], temperature: float = 1.0, **changes: Any) -> Evaluation:
    """Evaluate the policy of seed 0 against the reference of seed 1."""
    names = dict.fromkeys(further, "folder")
    settings = EvaluationSettings(**SETTINGS | {"temperature": temperature, "further_kl": names})
    drawn = draw_both(
        *(tiny_llama(seed) for seed in (0, 1)),
        (EOS,),
        PAD,
        prompts(COUNT),
        settings,
        FAST,
        decode,
        further=list(further.values()),
    )
    return assess(prompts(COUNT), *drawn, settings, reward_judge(count_reward), **changes)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_further_kl_agrees_with_logits_token_by_token(temperature: float) -> None:
    policy, other = tiny_llama(0), tiny_llama(7)
    found = evaluate({"reference": tiny_llama(1), "third": other}, temperature)
    of_prompt = {prompt.prompt_id: prompt.ids for prompt in prompts(COUNT)}
    sums = []
    for row in found.samples:
        asked, answer = of_prompt[row["prompt_id"]], tokens_of(row)
        ids = torch.tensor([[*asked, *answer]])
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(model(input_ids=ids).logits[0, len(asked) - 1 : -1] / temperature, -1)
                for model in (policy, other)
            )
        sums.append((ours.exp() * (ours - theirs)).sum().item())
    metrics = found.metrics
    assert metrics["eval/kl/third"] == pytest.approx(np.mean(sums), rel=1e-6)
    assert metrics["eval/kl/third_ci_low"] < metrics["eval/kl/third"] < metrics["eval/kl/third_ci_high"]
    for end in ("", "_ci_low", "_ci_high"):
        assert metrics[f"eval/kl/reference{end}"] == metrics[f"eval/kl{end}"]
    assert metrics["eval/kl/third"] != pytest.approx(metrics["eval/kl"], rel=0.01)


def test_further_models_change_no_other_number() -> None:
    alone, more = evaluate({}), evaluate({"third": tiny_llama(7)})
    assert more.samples == alone.samples
    new = {f"eval/kl/third{end}" for end in ("", "_ci_low", "_ci_high")}
    assert {key: value for key, value in more.metrics.items() if key not in new} == alone.metrics
    assert evaluate({"same": tiny_llama(0)}).metrics["eval/kl/same"] == pytest.approx(0.0, abs=1e-9)


def test_cache_keeps_the_further_kl(tmp_path: Path) -> None:
    prompt = [EvalPrompt("a", "test", (1, 2), "a")]
    settings = EvaluationSettings(**SETTINGS)
    draws = Draws(["x"], [1], [-1.0], [0.5], [-2.0], [1.0], [[0.25, math.inf]])

    def cached(digests: dict[str, Any]) -> Draws:
        return cached_completions(tmp_path, prompt, (), {"policy": digests}, "policy", settings, lambda: draws)

    assert cached({"further": ["a"]}) == cached({"further": ["a"]}) == draws
    assert len(list(tmp_path.rglob("draws.json"))) == 1
    cached({})
    assert len(list(tmp_path.rglob("draws.json"))) == 2


def test_weights_of_further_models_are_part_of_a_run_and_their_folder_is_not(tmp_path: Path) -> None:
    one, same, other = (
        save_model(tmp_path / name, scale=scale) for name, scale in zip("abc", (0.2, 0.2, 0.3), strict=True)
    )

    def of(*overrides: str) -> dict[str, Any]:
        return identity(compose(overrides, run_dir=tmp_path / "run"))

    plain = of()
    assert not any("further_kl" in key for key in [*plain, *plain["config"]])
    first, second, third = (of(f"evaluation.further_kl.first={path}") for path in (one, same, other))
    assert first == second and len({found["digest"] for found in (plain, first, third)}) == 3
    assert differences(first, third) == ["the weights of the models of evaluation.further_kl have changed"]
    assert not is_part_of_setting("evaluation.further_kl.first")


def test_further_models_are_checked(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")

    def found(value: str) -> str:
        return "\n".join(problems(compose([f"evaluation.further_kl.first={value}"])))

    assert found(str(folder)) == ""
    assert "evaluation.further_kl.first=./nowhere: there is no such folder" in found("./nowhere")
    assert "evaluation.further_kl.first=null: must be a Hugging Face folder or hub name" in found("null")
    wrong = "\n".join(problems(compose(["evaluation.further_kl=3"])))
    assert "evaluation.further_kl=3: must be a mapping" in wrong


def test_model_with_other_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    cfg = compose([f"evaluation.further_kl.odd={folder}"])
    prepared: Any = SimpleNamespace(spec=model_spec(), tokenizer=tiny_tokenizer(30))
    with pytest.raises(UserError, match=r"further_kl\.odd=.* cannot be a model to measure the KL to: its vocabulary"):
        load_further_kl(cfg, prepared)


@pytest.mark.slow
def test_command_measures_the_kl_to_further_models(cache_dir: Path, tmp_path: Path) -> None:
    words = [TINY, "judge=none", "method=dpo", "trainer.max_steps=1", f"paths.cache={cache_dir}"]
    reference = prepare_run(resolve_values(compose(words))).base
    metrics = job(tmp_path / "run", cache_dir, *words, f"evaluation.further_kl.start={reference}")
    for end in ("", "_ci_low", "_ci_high"):
        assert metrics[f"eval/kl/start{end}"] == metrics[f"eval/kl{end}"]
    assert metrics["eval/kl"] > 0 and not [key for key in metrics if key.startswith("val/kl/")]
