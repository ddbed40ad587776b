"""The final evaluation on two processes: each has a share of the work, and every number is that of one process."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.config.compose import compose
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import assess, draw_both
from spo.evaluation.cached_completions import cached_completions
from spo.evaluation.completions import Draws
from spo.evaluation.judges import reward_judge
from spo.evaluation.judges.local import LanguageModelJudge, RewardModelJudge
from spo.evaluation.judges.together import judging
from spo.evaluation.pair_metrics import Scoring, pair_metrics
from spo.losses import DPOLoss
from spo.models import FrozenReference
from spo.notes import add_notes, collect_notes, note, written_notes
from spo.processes import join, rank
from spo.records.files import write_json
from spo.stages.assemble import assemble
from spo.stages.checkpointing import fit
from spo.stages.from_config import resolve_values
from spo.stages.length import with_length
from spo.stages.prepare import prepare_run
from spo.stages.saved import release_models
from spo.types import PairLogps
from tests.commands import TINY
from tests.helpers import EOS, FAST, PAD, PLAIN, random_pairs, run_on_two_ranks, tiny_llama, tiny_tokenizer
from tests.test_evaluation import SETTINGS, count_reward, decode, favoring, prompts
from tests.test_judges import (
    COMPLETIONS,
    PROMPTS,
    QUESTIONS,
    language_model,
    reward_model,
    save_language_model,
    save_reward_model,
)

PROMPT_COUNTS, PAIR_COUNTS = (1, 3), (1, 7)


class Centered(DPOLoss):
    """A loss with a metric of each pair that depends on all others, as their order does not."""

    extra_metrics = ("method/centered",)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        ranks = torch.arange(len(pair), dtype=torch.float64)
        centered = (pair.policy_chosen - pair.policy_chosen.mean()) * ranks
        return {**super().metrics(pair, alpha=alpha, beta=beta), "method/centered": centered}


def evaluated(folder: Path, count: int) -> dict[str, Any]:
    """Evaluate twice with a cache, and return all numbers and rows, and what this process drew each time."""
    settings = EvaluationSettings(**SETTINGS | {"num_prompts": count, "further_kl": {"between": ""}})
    models, found = (favoring(1.0), favoring(0.0)), {}
    further = [favoring(0.5)]
    digests = {"policy": "p", "reference": "r"}
    for time in ("first", "again"):
        stages: list[str] = []
        drawn: list[int] = []

        def cache(stage: str, own: EvaluationSettings, draw: Callable[[], Draws], stages: list[str] = stages) -> Draws:
            def noted() -> Draws:
                stages.append(stage)
                return draw()

            return cached_completions(folder / "cache", prompts(count), (EOS,), digests, stage, own, noted)

        ours, theirs = draw_both(
            *models, (EOS,), PAD, prompts(count), settings, FAST, decode, drawn.append, cache=cache, further=further
        )
        result = assess(prompts(count), ours, theirs, settings, reward_judge(count_reward))
        assert 0 < result.metrics["eval/kl/between"] < result.metrics["eval/kl"]
        found[time] = {
            "draws": [asdict(ours), asdict(theirs)],
            "metrics": result.metrics,
            "samples": result.samples,
            "stages": stages,
            "drawn": sum(drawn),
        }
    return found


def scored(count: int) -> dict[str, float]:
    reference = FrozenReference()
    reference.model = tiny_llama(1)
    scoring = Scoring(Centered(), {"alpha": 0.2, "beta": 0.1}, tiny_llama(0), reference, PLAIN)
    return pair_metrics(scoring, random_pairs(count, seed=1), batch_size=2, pad_token_id=PAD)


def judged(folder: Path, models: Path) -> dict[str, Any]:
    """Let two judges answer, and return their answers in the first process, and the batches that this one ran."""
    found: dict[str, Any] = {}
    ask: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "rewards": (reward_model(models / "rewards", batch_size=2), lambda judge: judge.scores(PROMPTS, COMPLETIONS)),
        "answers": (language_model(models / "answers", folder), lambda judge: judge.verdicts(QUESTIONS)),
        "function": (reward_judge(count_reward), lambda judge: judge.scores([""], ["w9 w8"])),
    }
    for name, (judge, answer) in ask.items():
        batches: list[int] = []
        if isinstance(judge, RewardModelJudge | LanguageModelJudge):
            judge.forwards.compute = partial(noted, judge.forwards.compute, batches)
        with judging(judge) as is_first:
            if is_first:
                found[name] = {"answers": answer(judge), "again": answer(judge), "usage": judge.usage()}
        found[f"batches of {name}"] = batches
    return found


def noted(compute: Callable[[Any], Any], batches: list[int], batch: Sequence[Any]) -> Any:
    batches.append(len(batch))
    return compute(batch)


def everything(folder: Path, models: Path) -> dict[str, Any]:
    return {
        "evaluated": {str(count): evaluated(folder, count) for count in PROMPT_COUNTS},
        "scored": {str(count): scored(count) for count in PAIR_COUNTS},
        "judged": judged(folder, models),
    }


def near(value: Any) -> Any:
    """Return what equals all numbers within a nested value up to their rounding, and all else exactly."""
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, rel=1e-12, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    save_reward_model(tmp_path / "rewards", tiny_tokenizer())
    save_language_model(tmp_path / "answers")
    run_on_two_ranks(__name__, tmp_path)
    both = [json.loads((tmp_path / f"{one}.json").read_text()) for one in (0, 1)]
    one = json.loads(json.dumps(everything(tmp_path / "one", tmp_path)))
    for process, two in enumerate(both):
        assert two["scored"] == near(one["scored"])
        for count in PROMPT_COUNTS:
            expected, found = one["evaluated"][str(count)], two["evaluated"][str(count)]
            for time in ("first", "again"):
                for key in ("draws", "metrics", "samples", "stages"):
                    assert found[time][key] == near(expected[time][key]), (count, time, key)
            assert found["first"]["stages"] == ["policy", "reference"] and found["again"]["stages"] == []
            # Two completions per prompt of each model, and the first process has the odd prompt.
            assert found["first"]["drawn"] == 4 * ((count + 1 - process) // 2) and found["again"]["drawn"] == 0
    judged_by_one, judged_by_two = one["judged"], both[0]["judged"]
    for name in ("rewards", "answers", "function"):
        assert judged_by_two[name] == near(judged_by_one[name])
        assert name not in both[1]["judged"]
    assert (judged_by_one["answers"]["usage"]["calls"], judged_by_one["answers"]["usage"]["cached"]) == (8, 8)
    for name in ("rewards", "answers"):
        batches = [two["judged"][f"batches of {name}"] for two in both]
        assert all(batches) and sum(map(sum, batches)) == sum(judged_by_one[f"batches of {name}"])


def run_as_one_of_two(folder: Path) -> None:
    join("cpu")
    write_json(folder / f"{rank()}.json", everything(folder / "two", folder))
    torch.distributed.destroy_process_group()


def test_notes_of_other_processes_are_added_once(caplog: pytest.LogCaptureFixture) -> None:
    with collect_notes():
        note("both", "counted by both", 1)
        note("other", "seen by the other one", 3)
        others = written_notes()
    caplog.clear()
    with collect_notes() as notes:
        note("both", "counted by both", 2)
        add_notes(others)
    assert notes == {"notes/both": 2, "notes/other": 3}
    assert caplog.messages == ["counted by both", "seen by the other one"]


@pytest.mark.slow
def test_evaluation_has_the_memory_of_the_training(tmp_path: Path) -> None:
    """Nothing holds the weights of policy and references, or the state of the optimizer."""
    words = [TINY, "method=dpo", "judge=none", "logger=record", "trainer.max_steps=2", f"paths.cache={tmp_path}"]
    composed = compose(words, run_dir=tmp_path / "run")
    prepared = prepare_run(resolve_values(composed))
    cfg = with_length(composed, len(prepared.pairs.train))
    parts = assemble(cfg, prepared, [])
    fit(parts, None)
    module, trainer = parts.module, parts.trainer
    held: list[Tensor] = [*module.policy.parameters(), *module.reference.weights()]
    held += [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    assert module.reference.moves is False and len(held) > 3 * len(list(module.policy.parameters()))
    watched = [weakref.ref(tensor) for tensor in held]
    del held
    release_models(module, trainer)
    gc.collect()
    assert [one() is None for one in watched] == [True] * len(watched)


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
