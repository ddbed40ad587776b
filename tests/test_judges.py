"""Rewards and judges: both orders, the cache, an endpoint that misbehaves, models against their own forward passes."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from spo import cli
from spo.config.checks import problems
from spo.config.compose import compose
from spo.evaluation.judges import (
    HTTPJudge,
    Judge,
    JudgedPair,
    JudgeError,
    LanguageModelJudge,
    PairwiseJudge,
    RewardJudge,
    RewardModelJudge,
    reward_judge,
)
from spo.evaluation.judges.http import Pace
from spo.evaluation.judges.pairwise import VerdictStore, question
from spo.evaluation.winrate import verdict_of_rewards
from spo.notes import collect_notes
from spo.runs.identity import identity
from tests.commands import enter, environment, job, rows, shared_cache, spo
from tests.endpoint import Endpoint, Reply, serving
from tests.helpers import BOS, EOS, PAD, VOCAB, tiny_llama, tiny_tokenizer

TEMPLATE = "{prompt} | {first} | {second}"


def comparisons(n: int) -> list[JudgedPair]:
    return [JudgedPair(f"prompt {i}", f"one {i}", f"other {i}") for i in range(n)]


def swapped(these: Sequence[JudgedPair]) -> list[JudgedPair]:
    return [comparison.swapped for comparison in these]


class Fake(PairwiseJudge):
    """Answers by a function, and remembers what it was asked."""

    def __init__(
        self,
        cache: Path,
        answer: Callable[[JudgedPair], float | str],
        max_unanswered: float = 0.0,
        name: str = "fake",
    ) -> None:
        super().__init__(cache / "verdicts.sqlite", max_unanswered)
        self.answer, self.name = answer, name
        self.asked: list[JudgedPair] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": self.name}

    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        for comparison in comparisons:
            self.asked.append(comparison)
            self.spend(calls=1)
            yield {comparison: self.answer(comparison)}


# ------------------------------------------------------------------------------------------------- reward functions


def long_is_good(prompts: Sequence[str], completions: Sequence[str], *, scale: float = 1.0) -> dict[str, list[float]]:
    return {"reward": [scale * len(text) for text in completions], "spaces": [text.count(" ") for text in completions]}


class LongIsGood:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        return long_is_good(prompts, completions, scale=self.scale)


def test_a_reward_function_judges() -> None:
    judge = RewardJudge(long_is_good)
    assert isinstance(judge, Judge)
    these = [JudgedPair("p", "long", "no"), JudgedPair("p", "no", "long"), JudgedPair("p", "ab", "cd")]
    assert judge.verdicts(these) == [1.0, 0.0, 0.5]
    assert judge.scores(["p", "p"], ["a b", ""]) == {"reward": [3.0, 0.0], "spaces": [1.0, 0.0]}
    assert judge.usage() == {} and judge.identity["reward"] == f"{__name__}.long_is_good"


def test_functions_partials_objects_and_classes_are_rewards() -> None:
    names = set()
    for reward in (long_is_good, partial(long_is_good, scale=2.0), LongIsGood(), partial(LongIsGood, scale=2.0)):
        judge = reward_judge(reward)
        assert judge is not None
        names.add(json.dumps(judge.identity))
        assert judge.scores(["p"], ["abc"])["reward"][0] in (3.0, 6.0)
    assert len(names) == 3  # an object is named after its class, whatever it was given
    assert reward_judge(None) is None


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], r'a reward function returns \{"reward": \[...\]\}, this returned \[1.0\]'),
        ({"score": [1.0]}, "a reward function returns"),
        ({"reward": [1.0, 2.0]}, "2 values of reward for 1 completions"),
        ({"reward": [1.0], "part": []}, "0 values of part"),
        ({"reward": [math.nan]}, "reward is not a finite number"),
    ],
)
def test_an_invalid_result_of_a_reward_function_is_an_error(returned: Any, words: str) -> None:
    with pytest.raises(JudgeError, match=words):
        RewardJudge(lambda prompts, completions: returned).scores(["p"], ["c"])


def test_the_judge_group_instantiates_a_judge_or_none() -> None:
    def made(*overrides: str) -> Any:
        return instantiate(compose(overrides).judge, _convert_="all")

    assert made().identity["reward"] == "spo.data.stories.reward.GoldReward"
    assert made("data=jsonl", "data.path=x") is None and made("judge=none") is None
    function = made("judge=function", f"judge.reward._target_={__name__}.long_is_good", "+judge.reward.scale=3")
    assert function.scores(["p"], ["ab"])["reward"] == [6.0]
    assert made("judge=function", f"judge.reward._target_={__name__}.LongIsGood").scores(["p"], ["ab"])["reward"] == [2]


# ------------------------------------------------------------------------------------------------------ both orders


@pytest.mark.parametrize("always", [1.0, 0.0, 0.5])
def test_a_judge_that_prefers_a_position_returns_half(tmp_path: Path, always: float) -> None:
    judge = Fake(tmp_path, lambda _: always)
    assert judge.verdicts(comparisons(20)) == [0.5] * 20 and len(judge.asked) == 40
    assert judge.scores([], []) is None and isinstance(judge, Judge)


def test_swapping_completions_mirrors_the_verdict(tmp_path: Path) -> None:
    rng = random.Random(0)
    answers: dict[JudgedPair, float] = {}

    def anything(shown: JudgedPair) -> float:
        return answers.setdefault(shown, rng.choice([0.0, 0.5, 1.0]))

    there = Fake(tmp_path / "a", anything).verdicts(comparisons(50))
    back = Fake(tmp_path / "b", anything).verdicts(swapped(comparisons(50)))
    assert back == [1 - verdict for verdict in there if verdict is not None]
    assert set(there) == {0.0, 0.25, 0.5, 0.75, 1.0}
    cached = Fake(tmp_path / "a", anything)
    assert cached.verdicts(swapped(comparisons(50))) == back and cached.asked == []


def test_equal_completions_tie_and_equal_questions_are_asked_once(tmp_path: Path) -> None:
    judge = Fake(tmp_path, lambda shown: float(shown.first > shown.second))
    same = JudgedPair("p", "x", "x")
    assert judge.verdicts([same, same]) == [0.5, 0.5] and judge.asked == [] and judge.verdicts([]) == []
    one = JudgedPair("p", "x", "y")
    assert judge.verdicts([one, one, one.swapped, same]) == [0.0, 0.0, 1.0, 0.5]
    assert Counter(judge.asked) == {one: 1, one.swapped: 1}


def test_completions_are_literal_in_the_question() -> None:
    shown = JudgedPair("{second}", "{first} {x} \\1", "}{")
    assert question("{prompt}|{first}|{second}|{{x}}", shown) == "{second}|{first} {x} \\1|}{|{{x}}"


# -------------------------------------------------------------------------------------------------------- the cache


def test_cached_verdicts_belong_to_one_judge(tmp_path: Path) -> None:
    first = Fake(tmp_path, lambda _: 1.0)
    first.verdicts(comparisons(3))
    assert first.usage() == {"calls": 6, "cached": 0, "unanswered": 0}
    again = Fake(tmp_path, lambda _: pytest.fail("asked again"))
    assert again.verdicts(comparisons(3)) == [0.5] * 3
    assert again.usage() == {"calls": 0, "cached": 6, "unanswered": 0}
    more = Fake(tmp_path, lambda _: 0.0)
    assert more.verdicts(comparisons(4)) == [0.5] * 4 and len(more.asked) == 2
    other = Fake(tmp_path, lambda shown: float(shown.first < shown.second), name="another")
    assert other.verdicts(comparisons(3)) == [1.0] * 3 and len(other.asked) == 6


def test_every_part_of_a_question_is_in_its_key(tmp_path: Path) -> None:
    Fake(tmp_path, lambda _: 1.0).verdicts([JudgedPair("a", "b", "c")])
    judge = Fake(tmp_path, lambda _: 1.0)
    judge.verdicts([JudgedPair("ab", "", "c"), JudgedPair("a", "bc", ""), JudgedPair("a", "b", "c ")])
    assert len(judge.asked) == 6


def in_another_process(work: Callable[..., object], *given: Any) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, args=given)
    process.start()
    return process


def judge_with_a_log(folder: Path, log: Path, most: int) -> None:
    """Judges eight comparisons and writes down every question; dies when asked one more than ``most``."""

    def answer(shown: JudgedPair) -> float:
        with log.open("a+") as file:
            file.seek(0)
            if len(file.readlines()) == most:
                os.kill(os.getpid(), signal.SIGKILL)
            print(shown, file=file)
        return float("one" in shown.first)

    assert Fake(folder, answer).verdicts(comparisons(8)) == [1.0] * 8


def test_a_killed_judge_resumes_where_it_stopped(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    for most, status, lines in ((5, -signal.SIGKILL, 5), (99, 0, 16)):
        process = in_another_process(judge_with_a_log, tmp_path, log, most)
        process.join()
        asked = log.read_text().splitlines()
        assert process.exitcode == status and len(set(asked)) == len(asked) == lines
    here = Fake(tmp_path, lambda _: pytest.fail("asked again"))
    assert here.verdicts(comparisons(8)) == [1.0] * 8


def write_many(file: Path, name: str) -> None:
    store = VerdictStore(file)
    for i in range(40):
        store.put({f"{name} {i}": 0.5})
        store.get([f"{name} {i}"])


def test_several_processes_share_one_store(tmp_path: Path) -> None:
    file = tmp_path / "new/verdicts.sqlite"
    for process in [in_another_process(write_many, file, name) for name in "abc"]:
        process.join()
        assert process.exitcode == 0
    keys = [f"{name} {i}" for name in "abc" for i in range(40)]
    assert VerdictStore(file).get([*keys, "none"]) == dict.fromkeys(keys, 0.5)


def test_a_damaged_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "verdicts.sqlite").write_text("something else, and long enough to be read as a database header" * 30)
    with pytest.raises(JudgeError, match=r"verdicts\.sqlite cannot be read or written .* set judge\.cache"):
        Fake(tmp_path, lambda _: 1.0).verdicts(comparisons(1))


# ------------------------------------------------------------------------------------------------------- unanswered


def test_a_few_questions_may_stay_unanswered(tmp_path: Path) -> None:
    silent = comparisons(20)[3].swapped
    judge = Fake(tmp_path, lambda shown: "no idea" if shown == silent else 1.0, max_unanswered=0.05)
    assert judge.verdicts(comparisons(20)) == [None if i == 3 else 0.5 for i in range(20)]
    assert judge.usage()["unanswered"] == 1
    later = Fake(tmp_path, lambda _: 0.0)
    assert later.verdicts(comparisons(20))[3] == 1.0 and later.asked == [silent]  # only answers are kept


def test_too_many_unanswered_questions_stop_but_keep_answers(tmp_path: Path) -> None:
    judge = Fake(tmp_path, lambda shown: 1.0 if int(shown.prompt[7:]) < 4 else "it is down", max_unanswered=0.1)
    with pytest.raises(JudgeError, match=r"more than 10% of 20 questions .*it is down\. Solve this and run the same"):
        judge.verdicts(comparisons(10))
    assert len(judge.asked) == 8 + 3  # three of twenty are more than a tenth: no use in asking on
    later = Fake(tmp_path, lambda _: 1.0)
    later.verdicts(comparisons(10))
    assert len(later.asked) == 12


# ---------------------------------------------------------------------------------------------------- over the wire

KEY = "sk-0123456789abcdef"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as endpoint:
        yield endpoint


def http_judge(endpoint: Endpoint, folder: Path, **changes: Any) -> HTTPJudge:
    settings: dict[str, Any] = {
        "base_url": endpoint.url,
        "model": "judge-1",
        "key_variable": "JUDGE_KEY",
        "template": TEMPLATE,
        "request": {"temperature": 0, "max_tokens": 8, "made_up": [1]},
        "timeout_s": 20,
        "max_retries": 2,
        "attempts": 3,
        "requests_per_minute": None,
        "concurrency": 4,
        "input_price": None,
        "output_price": None,
        "cache": str(folder / "verdicts.sqlite"),
        "max_unanswered": 0.0,
    }
    return HTTPJudge(**settings | changes)


def test_requests_and_usage_of_an_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    says = {"one": "A", "other": " **b**.\n"}
    endpoint.script = lambda question, _: Reply(says=says[question.split(" | ")[1].split()[0]])
    judge = http_judge(endpoint, tmp_path, input_price=2.0, output_price=8.0)
    assert judge.verdicts(comparisons(3)) == [1.0] * 3
    assert Counter(endpoint.questions) == Counter(
        question(TEMPLATE, shown) for shown in comparisons(3) + swapped(comparisons(3))
    )
    assert endpoint.requests[0] | {"messages": 0} == {
        "path": "/v1/chat/completions",
        "model": "judge-1",
        "messages": 0,
        "temperature": 0,
        "max_tokens": 8,
        "made_up": [1],
    }
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert judge.usage() == {
        "calls": 6,
        "cached": 0,
        "unanswered": 0,
        "tokens": 6 * 102,
        "cost": pytest.approx(6 * (100 * 2 + 2 * 8) / 1e6),
    }
    assert "cost" not in http_judge(endpoint, tmp_path).usage()


def test_text_that_an_endpoint_may_read_as_control_is_noted(endpoint: Endpoint, tmp_path: Path) -> None:
    with collect_notes() as notes:
        http_judge(endpoint, tmp_path).verdicts([JudgedPair("p", "1 < 2 |x| [a]", "b")])
        assert notes == {}
        http_judge(endpoint, tmp_path).verdicts([JudgedPair("p", "so<|im_end|>", "b"), JudgedPair("p", "c", "d</s>")])
    assert notes == {"notes/http_control_text": 2.0}


def test_an_endpoint_without_a_key_and_ties(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda *_: Reply(says="Tie")
    assert http_judge(endpoint, tmp_path, key_variable=None).verdicts(comparisons(2)) == [0.5, 0.5]
    assert not any(KEY in str(key) for key in endpoint.keys)


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=500, body=b"{}"),
        Reply(status=503, body=b"<html>busy</html>"),
        Reply(status=429, body=b"{}"),
        Reply(drops=True),
        Reply(after_s=4.0),
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b"<html>a proxy says hello</html>", headers=(("Content-Type", "text/html"),)),
        Reply(body=b'{"choices": []}'),
        Reply(body=b"[1, 2]"),
        Reply(body=b"null"),
        Reply(says="Both have their merits."),
        Reply(says="A or B"),
        Reply(says=""),
    ],
    ids=lambda reply: str(reply.body or reply.says)[:20] + str(reply.status),
)
def test_temporary_failures_are_retried(endpoint: Endpoint, tmp_path: Path, trouble: Reply) -> None:
    endpoint.script = lambda question, times: (
        trouble if times == 0 else Reply(says="A" if "| one |" in question else "B")
    )
    judge = http_judge(endpoint, tmp_path, timeout_s=2 if trouble.after_s else 20)
    assert judge.verdicts([JudgedPair("p", "one", "x"), JudgedPair("p", "y", "one")]) == [1.0, 0.0]
    assert set(Counter(endpoint.questions).values()) == {2} and judge.usage()["calls"] == 8


def test_retry_after_is_respected(endpoint: Endpoint, tmp_path: Path) -> None:
    busy = Reply(status=429, headers=(("Retry-After", "1.5"),), body=b"{}")
    endpoint.script = lambda _, times: busy if times == 0 else Reply()
    http_judge(endpoint, tmp_path, concurrency=1).verdicts(comparisons(1))
    assert endpoint.at[1] - endpoint.at[0] >= 1.4  # without the header it would be half a second at most


def test_an_unreadable_answer_counts_as_unanswered(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda question, _: Reply(says="C" if "prompt 1" in question else "A")
    judge = http_judge(endpoint, tmp_path, max_unanswered=0.5)
    assert judge.verdicts(comparisons(2)) == [0.5, None]
    assert judge.usage() | {"tokens": 0} == {"calls": 2 + 2 * 3, "cached": 0, "unanswered": 2, "tokens": 0}
    with pytest.raises(JudgeError, match="it answered 'C' instead of A, B or TIE"):
        http_judge(endpoint, tmp_path).verdicts(comparisons(2))


@pytest.mark.parametrize("trouble", [Reply(status=500, body=b"{}"), Reply(status=400, body=b'{"error": "too long"}')])
def test_after_an_outage_only_open_questions_are_asked(endpoint: Endpoint, tmp_path: Path, trouble: Reply) -> None:
    endpoint.script = lambda question, _: trouble if "prompt 2" in question else Reply()
    with pytest.raises(JudgeError, match=f"answers Error code: {trouble.status}.*sqlite has the answers so far"):
        http_judge(endpoint, tmp_path, max_retries=0, concurrency=1).verdicts(comparisons(3))
    answered = [question for question in endpoint.questions if "prompt 2" not in question]
    endpoint.script = lambda *_: Reply()
    http_judge(endpoint, tmp_path).verdicts(comparisons(3))
    assert len(answered) == 4 and all(Counter(endpoint.questions)[question] == 1 for question in answered)


def test_an_unreachable_endpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving() as gone:
        pass
    with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:\d+/v1: Connection error"):
        http_judge(gone, tmp_path, max_retries=0).verdicts(comparisons(3))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_rejected_key_stops_at_once_and_is_not_shown(
    endpoint: Endpoint, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.script = lambda *_: Reply(status=status, body=json.dumps({"error": {"message": f"bad {KEY}"}}).encode())
    judge = http_judge(endpoint, tmp_path, concurrency=1, max_unanswered=1.0)
    with pytest.raises(JudgeError, match=rf"Error code: {status}.*bad <key>.*set judge\.base_url") as caught:
        judge.verdicts(comparisons(50))
    assert len(endpoint.questions) < 50
    assert KEY not in "".join(map(str, (caught.value, caplog.text, judge.identity, judge.usage())))
    endpoint.script = lambda *_: Reply()
    judge.verdicts(comparisons(2))
    assert KEY.encode() not in (tmp_path / "verdicts.sqlite").read_bytes()


def test_concurrency_limits_requests_at_a_time(endpoint: Endpoint, tmp_path: Path) -> None:
    together = threading.Barrier(3)  # passes only where three requests are there at once

    def wait(*_: Any) -> Reply:
        together.wait(timeout=20)
        return Reply()

    endpoint.script = wait
    http_judge(endpoint, tmp_path, concurrency=3).verdicts(comparisons(6))
    assert endpoint.most_at_once == 3


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_the_pace_spaces_requests_evenly() -> None:
    clock = Clock()
    pace = Pace(120, clock, clock.sleep)
    turns = []
    for _ in range(5):
        pace.wait()
        turns.append(clock.now)
    assert turns == [100.0, 100.5, 101.0, 101.5, 102.0]
    clock.now += 60
    pace.wait()
    pace.wait()
    assert clock.now == 162.5 and len(clock.slept) == 5  # a pause earns no burst
    free = Pace(None, clock, clock.sleep)
    free.wait()
    free.wait()
    assert len(clock.slept) == 5


def test_retries_wait_for_their_turn_too(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda _, times: Reply(status=500, body=b"{}") if times == 0 else Reply()
    clock, judge = Clock(), http_judge(endpoint, tmp_path, concurrency=1)
    judge._pace = Pace(6, clock, clock.sleep)
    judge.verdicts(comparisons(2))
    assert len(endpoint.at) == 8 and clock.slept == [10.0] * 7


def test_invalid_settings_of_an_endpoint_are_errors(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=words):
            http_judge(endpoint, tmp_path, **changes)

    refused(r"judge\.template: \{second\} must occur", template="{prompt} {first}")
    refused(r"judge\.base_url: must be an address", base_url="localhost:8000")
    refused(r"judge\.base_url: contains more than an address", base_url=f"http://user:{KEY}@localhost/v1")
    refused("give both, or neither", input_price=1.0)
    refused("is not the name of an environment variable", key_variable="sk-123")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(JudgeError, match="JUDGE_KEY: this environment variable is not set"):
        http_judge(endpoint, tmp_path)


def test_only_the_question_changes_the_identity(endpoint: Endpoint, tmp_path: Path) -> None:
    def of(**changes: Any) -> dict[str, Any]:
        return http_judge(endpoint, tmp_path, **changes).identity

    assert of() == of(concurrency=1, timeout_s=1, max_retries=9, requests_per_minute=5, attempts=1, max_unanswered=1.0)
    others = ({"model": "x"}, {"template": f"{TEMPLATE}!"}, {"request": {}}, {"base_url": "http://localhost/v1"})
    assert all(of(**other) != of() for other in others)


# -------------------------------------------------------------------------------------------------- a reward model


def save_reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, labels: int = 1, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_model(folder: Path, **changes: Any) -> RewardModelJudge:
    settings: dict[str, Any] = {
        "path": str(folder),
        "dtype": "float32",
        "trust_remote_code": False,
        "device": "cpu",
        "batch_size": 3,
        "max_length": None,
    }
    return RewardModelJudge(**settings | changes)


PROMPTS = ["w3 w4", "w5", "w6 w7 w8 w9", "w3", "w10"]
COMPLETIONS = [" w9 w8", " w7 w7 w7 w7", " w4", "", " w11 w12 w13"]


def directly(folder: Path, ids: Sequence[int]) -> float:
    model = LlamaForSequenceClassification.from_pretrained(folder, pad_token_id=None).eval()
    model.config.pad_token_id = None  # one row: its last token is its end
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits.item()


@pytest.mark.parametrize("padding", ["own", "eos", "none"])
def test_a_reward_model_judge_matches_its_forward_pass(tmp_path: Path, padding: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = {"own": "<pad>", "eos": "</s>", "none": None}[padding]
    folder = save_reward_model(tmp_path / "model", tokenizer)
    expected = [
        directly(folder, [*(int(word[1:]) for word in f"{prompt}{completion}".split()), EOS])
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    for size in (1, 2, 5):
        found = reward_model(folder, batch_size=size).scores(PROMPTS, COMPLETIONS)["reward"]
        assert found == pytest.approx(expected, abs=1e-5)
    judge, better = reward_model(folder), directly(folder, [3, 4, 9, 8, EOS]) > directly(folder, [3, 4, 7, 7, EOS])
    assert judge.verdicts([JudgedPair("w3 w4", " w9 w8", " w7 w7")]) == [float(better)]
    assert judge.usage() == {"truncated": 0.0}


def test_a_reward_model_with_a_chat_template_sees_two_turns_and_one_bos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ 'w5' if m.role == 'user' else 'w6' }} {{ m.content }} "
        "{{ eos_token }}{% endfor %}"
    )
    folder = save_reward_model(tmp_path / "model", tokenizer)
    expected = directly(folder, [BOS, 5, 3, 4, EOS, 6, 9, EOS])
    assert reward_model(folder).scores(["w3 w4"], ["w9"])["reward"] == pytest.approx([expected], abs=1e-5)


def test_a_long_text_loses_its_beginning(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "model", tiny_tokenizer())
    judge = reward_model(folder, max_length=4)
    expected = directly(folder, [4, 9, 8, EOS])
    assert judge.scores(["w3 w3 w3 w4", "w3"], [" w9 w8", " w4"])["reward"][0] == pytest.approx(expected, abs=1e-5)
    assert judge.usage() == {"truncated": 1.0}
    long = reward_model(folder).scores([" ".join(["w3"] * 90)], [" w4"])["reward"]  # the model takes 64
    assert long == pytest.approx([directly(folder, [*[3] * 62, 4, EOS])], abs=1e-5)


def test_an_encoder_reads_a_pair_of_texts(tmp_path: Path) -> None:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        num_labels=1,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = reward_model(tmp_path).scores(["w5 w6", "w7"], ["w8", "w9 w10 w11"])["reward"]
    for reward, prompt, completion in zip(found, ([5, 6], [7]), ([8], [9, 10, 11]), strict=True):
        ids = [1, *prompt, 2, *completion, 2]
        types = [0] * (len(prompt) + 2) + [1] * (len(completion) + 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        assert reward == pytest.approx(logits.item(), abs=1e-5)


def test_a_classifier_is_rejected_as_reward_model(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "model", tiny_tokenizer(), labels=3)
    with pytest.raises(JudgeError, match="3 outputs, and a reward model has one"):
        reward_model(folder).scores(["w3"], ["w4"])
    found = problems(compose(["judge=reward_model", f"judge.path={folder}"]))
    assert len(found) == 1 and "3 outputs" in found[0]
    tiny_llama(dtype=torch.float32, num_labels=1).save_pretrained(folder)  # no head for rewards: it would be random
    with pytest.raises(JudgeError, match=r"not those of the LlamaForSequenceClassification.*score\.weight"):
        reward_model(folder).scores(["w3"], ["w4"])
    with pytest.raises(JudgeError, match=r"judge\.path=.*nothing cannot be loaded: this is not a folder"):
        reward_model(tmp_path / "nothing").scores(["w3"], ["w4"])


# ------------------------------------------------------------------------------------------------ a language model


def save_language_model(folder: Path, *, seed: int = 0, chat: bool = False, **config: Any) -> Path:
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "A": 3, "B": 4, "?": 5, "|": 6, "<unk>": 7}
    raw = Tokenizer(models.WordLevel(words | {f"w{i}": i for i in range(8, VOCAB)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = (
            "{{ bos_token }} w8 {% for m in messages %}{{ m.content }}{% endfor %} w9"
            "{% if enable_thinking is defined and not enable_thinking %} w10\n{% endif %}"
        )
    tiny_llama(seed, dtype=torch.float32, scale=1.0, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def language_model(folder: Path, cache: Path, **changes: Any) -> LanguageModelJudge:
    settings: dict[str, Any] = {
        "path": str(folder),
        "dtype": "float32",
        "trust_remote_code": False,
        "device": "cpu",
        "batch_size": 4,
        "template": TEMPLATE + " ?\n",
        "margin": 0.0,
        "cache": str(cache / "verdicts.sqlite"),
        "max_unanswered": 0.0,
    }
    return LanguageModelJudge(**settings | changes)


QUESTIONS = [
    JudgedPair("w8 w9", " w10", "w11 w12"),
    JudgedPair("w13", "w14 w15 w16 w17", "w18"),
    JudgedPair("w19 w20", "w21", "w22 w8"),
    JudgedPair("w11", "w12 w13", "w14"),
]


def difference(seed: int, ids: Sequence[int]) -> float:
    """Return the log-odds of A over B after a question, in nats, from a plain forward pass."""
    with torch.no_grad():
        logps = tiny_llama(seed, dtype=torch.float32, scale=1.0)(torch.tensor([list(ids)])).logits[0, -1].log_softmax(0)
    return float(logps[3] - logps[4])


def asked_of(shown: JudgedPair) -> list[int]:
    words = {"|": 6, "?": 5}
    return [words.get(word) or int(word[1:]) for word in f"{question(TEMPLATE, shown)} ?".split()]


@pytest.mark.parametrize(("chat", "seed"), [(False, 0), (True, 6)])
def test_a_language_model_judge_matches_its_forward_pass(tmp_path: Path, chat: bool, seed: int) -> None:
    folder = save_language_model(tmp_path / "model", seed=seed, chat=chat)

    def prefers_first(shown: JudgedPair) -> float:
        ids = asked_of(shown)
        return float(difference(seed, [BOS, 8, *ids, 9, 10] if chat else [BOS, *ids]) > 0)

    expected = [(prefers_first(shown) + 1 - prefers_first(shown.swapped)) / 2 for shown in QUESTIONS]
    assert len(set(expected)) > 1
    for size in (1, 8):
        judge = language_model(folder, tmp_path / str(size), batch_size=size)
        assert judge.verdicts(QUESTIONS) == expected
        assert judge.usage()["calls"] == 8
    assert judge.usage()["tokens"] == sum(2 * (len(asked_of(shown)) + (4 if chat else 1)) for shown in QUESTIONS)


def test_differences_within_the_margin_are_ties(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "model")
    both = [shown for question in QUESTIONS for shown in (question, question.swapped)]
    differences = sorted(abs(difference(0, [BOS, *asked_of(shown)])) for shown in both)
    margin = (differences[3] + differences[4]) / 2
    judge = language_model(folder, tmp_path, margin=margin)
    [answers] = [dict(pair for some in judge.ask(both) for pair in some.items())]
    assert sum(answer == 0.5 for answer in answers.values()) == 4
    assert language_model(folder, tmp_path, margin=1e6).verdicts(QUESTIONS) == [0.5] * 4


def test_a_changed_model_template_margin_or_encoding_is_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_language_model(tmp_path / "model")
    language_model(folder, tmp_path).verdicts(QUESTIONS)

    def calls(**changes: Any) -> tuple[float, float]:
        judge = language_model(folder, tmp_path, **changes)
        judge.verdicts(QUESTIONS)
        return judge.usage()["calls"], judge.usage()["cached"]

    assert calls(batch_size=1, max_unanswered=1.0) == (0, 8)
    assert calls(template=TEMPLATE) == calls(margin=0.5) == (8, 0)
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert calls() == (8, 0)
    monkeypatch.setattr("spo.evaluation.judges.local.code_version", lambda *_: "other code")
    assert calls() == (8, 0)


def test_cached_answers_do_not_load_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_language_model(tmp_path / "model")
    verdicts = language_model(folder, tmp_path).verdicts(QUESTIONS)
    monkeypatch.setattr(
        "spo.evaluation.judges.local.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert language_model(folder, tmp_path).verdicts(QUESTIONS) == verdicts


def test_a_question_beyond_the_context_is_unanswered(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "model", max_position_embeddings=16)
    long = JudgedPair("w8", " ".join(["w9"] * 12), "w10")
    judge = language_model(folder, tmp_path, max_unanswered=0.5)
    assert judge.verdicts([long, QUESTIONS[0]])[0] is None and judge.usage()["unanswered"] == 2
    with pytest.raises(JudgeError, match="a question of 18 tokens exceeds the judge's context of 16"):
        language_model(folder, tmp_path).verdicts([long])


def test_a_tokenizer_must_distinguish_a_and_b(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match="the same tokens for A and B"):
        language_model(tmp_path, tmp_path).verdicts(QUESTIONS)


# ------------------------------------------------------------------------------------------------ the configuration


def problem_text(*overrides: str) -> str:
    return "\n".join(problems(compose(overrides)))


def test_problems_are_reported_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "judge.model is not set: the model's name at the endpoint" in problem_text("judge=openai")
    openai = ["judge=openai", "judge.model=m"]
    assert problem_text(*openai).startswith("judge.key_variable=OPENAI_API_KEY: this environment variable is not set")
    assert "{first} must occur" in problem_text(
        *openai, "judge.key_variable=null", "judge.template='{prompt} {second}'"
    )
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert problem_text(*openai) == "" and KEY not in problem_text(*openai, "judge.base_url=nowhere")
    wrong = {"concurrency": "0", "attempts": "0", "max_retries": "-1", "timeout_s": "0", "requests_per_minute": "0"}
    wrong |= {"input_price": "-1", "output_price": "x", "max_unanswered": "5"}
    text = problem_text(*openai, *(f"judge.{key}={value}" for key, value in wrong.items()))
    assert all(f"judge.{key}={value}: must be" in text for key, value in wrong.items())
    assert "judge.path is not set" in problem_text("judge=language_model")
    local = ["judge=language_model", f"judge.path={tmp_path}", "judge.margin=-1", "judge.dtype=float23"]
    assert "there is no config.json" in problem_text(*local)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # a header without tensors
    text = problem_text(*local, "judge.trust_remote_code=maybe", "judge.batch_size=0")
    for words in (
        "batch_size=0: must be at least 1",
        "margin=-1: must be at least 0",
        "dtype=float23: choose auto",
        "maybe:",
    ):
        assert words in text
    assert "your function, reward(prompts, completions)" in problem_text("judge=function")
    assert "there is no module nowhere" in problem_text("judge=function", "judge.reward._target_=nowhere.fn")


def test_the_key_is_not_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cfg = compose(["judge=openai", "judge.model=m"])
    assert KEY not in json.dumps(identity(cfg))


def test_other_weights_of_the_judge_are_another_run(tmp_path: Path) -> None:
    overrides = ["judge=reward_model", f"judge.path={tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    before = identity(compose(overrides))
    assert before == identity(compose(overrides)) and before["judge"] is not None
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert identity(compose(overrides))["digest"] != before["digest"]


# ------------------------------------------------------------------------------------------------- by real commands


def test_a_run_can_use_a_custom_reward_function(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def shortness(prompts, completions, factor=1):\n"
        "    return {'reward': [-factor * len(text) for text in completions]}\n"
    )
    words = ["judge=function", "judge.reward._target_=mine.shortness", "+judge.reward.factor=2", "hydra.run.dir=run"]
    enter(tmp_path, shared_cache(tmp_path_factory), monkeypatch)
    assert cli.main(["train", "+debug=tiny", "logger=record", *words]) == 0
    samples = rows(tmp_path / "run/samples.jsonl")
    for row in samples:
        assert row["reward"] == -2 * len(row["completion"])
        verdicts = [verdict_of_rewards(row["reward"], one["reward"]) for one in row["references"]]
        assert row["verdict"] == sum(verdicts) / 2 and row["reference_reward"] == row["references"][0]["reward"]


def test_a_run_can_use_a_reward_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_reward_model(tmp_path / "model", tiny_tokenizer())
    metrics = job(
        tmp_path / "run", shared_cache(tmp_path_factory), "+debug=tiny", "judge=reward_model", f"judge.path={folder}"
    )
    assert "eval/reward" in metrics and "eval/win_rate" in metrics
    samples = rows(tmp_path / "run/samples.jsonl")
    judge = reward_model(folder)
    direct = judge.scores([row["prompt"] for row in samples], [row["completion"] for row in samples])["reward"]
    assert [row["reward"] for row in samples] == pytest.approx(direct, abs=1e-5)


@pytest.mark.slow
def test_a_killed_evaluation_asks_only_open_questions(
    endpoint: Endpoint, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache, tiny = shared_cache(tmp_path_factory), ("+debug=tiny", "logger=record", "judge=none", "hydra.run.dir=run")
    spo("train", *tiny, folder=tmp_path, cache=cache)
    others = ("judge.model=m", "judge.key_variable=JUDGE_KEY", "judge.concurrency=2", "judge.requests_per_minute=null")
    words = ["evaluate", "run", "judge=openai", f"judge.base_url={endpoint.url}", *others]
    killed, held = threading.Event(), threading.Event()

    def five_answers(*_: Any) -> Reply:
        if len(endpoint.questions) > 5:
            held.set()
            killed.wait(timeout=60)
        return Reply(says="A")

    endpoint.script = five_answers
    command = [Path(sys.executable).with_name("spo"), *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(cache), stderr=subprocess.DEVNULL)
    assert held.wait(timeout=120)
    verdicts = sqlite3.connect(cache / "verdicts.sqlite")
    count = "SELECT count(*) FROM verdicts"
    while verdicts.execute(count).fetchone()[0] < 4:  # the fifth may be on its way
        time.sleep(0.05)
    process.kill()
    process.wait()
    killed.set()
    kept = verdicts.execute(count).fetchone()[0]
    spo(*words, folder=tmp_path, cache=cache)
    asked = Counter(endpoint.questions)
    assert sum(times == 1 for times in asked.values()) >= len(asked) - 3 and max(asked.values()) == 2
    [folder] = (tmp_path / "run/evaluations").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["eval/judge/cached"], metrics["eval/judge/calls"]) == (kept, len(asked) - kept)
    assert metrics["eval/win_rate"] == metrics["val/win_rate"] == 0.5  # always A: only the position counted
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
