"""Judge behind an HTTP endpoint with the protocol of OpenAI, such as OpenAI, vLLM, llama.cpp or a proxy."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from spo.bounds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from spo.errors import JudgeError
from spo.evaluation.judges.base import JudgedPair
from spo.evaluation.judges.pairwise import PairwiseJudge, check_template, question
from spo.notes import note
from spo.secrets import remember, remember_secrets, scrub

if TYPE_CHECKING:
    from openai import OpenAI

_ANSWERS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_ANSWER = re.compile(rf"\W*({'|'.join(_ANSWERS)})\W*", re.IGNORECASE)
# The usual forms of control tokens. An endpoint decides by itself whether it reads them as text.
_CONTROL = re.compile(r"<[|\uff5c][^\s|\uff5c<>]+[|\uff5c]>|</?s>|<[be]os>|<(start|end)_of_turn>|\[/?INST\]")
# Every further question would fail too: wrong key, missing permission, unknown model or address.
_FATAL_STATUS_CODES = (401, 403, 404)


class HTTPJudge(PairwiseJudge):
    """Judge that asks a chat model over HTTP, which answers ``A``, ``B`` or ``TIE``.

    The ``openai`` client repeats failed requests (no connection, timeout, status 408, 409, 429, 5xx), after
    exponentially growing pauses or the time in Retry-After. If an answer is not one of the three, the question is
    asked again; after the last attempt it counts as unanswered.

    Args:
        base_url: URL of the endpoint, such as ``http://localhost:8000/v1``.
        model: Name of the model at the endpoint.
        key_variable: Name of the environment variable with the key; ``None`` if the endpoint does not need a key.
        template: Template of the question with ``{prompt}``, ``{first}`` and ``{second}``.
        request: Further parameters of the request, such as ``temperature``, under the names of the endpoint.
        timeout_s: Limit of seconds for an answer.
        max_retries: Number of times that a failed request is repeated.
        attempts: Number of times that a question is asked until the answer is valid.
        requests_per_minute: Limit over all threads, retries included, evenly spaced; ``None`` for no limit.
        concurrency: Number of requests at a time.
        input_price: Price of a million tokens of the questions; ``None`` to count no cost.
        output_price: Price of a million tokens of the answers, in the same currency.
        cache: File of the verdicts.
        max_unanswered: Share of the questions that may remain unanswered.

    Raises:
        JudgeError: The key is not in the environment.
        ValueError: An argument is invalid.
    """

    needs_package: ClassVar[str] = "openai"

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        key_variable: str | None,
        template: str,
        request: Mapping[str, Any],
        timeout_s: PositiveFloat,
        max_retries: NonNegativeInt,
        attempts: PositiveInt,
        requests_per_minute: PositiveFloat | None,
        concurrency: PositiveInt,
        input_price: NonNegativeFloat | None,
        output_price: NonNegativeFloat | None,
        cache: str,
        max_unanswered: Fraction,
    ) -> None:
        super().__init__(cache, max_unanswered)
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("judge.base_url: must be an address such as http://localhost:8000/v1")
        if address.username or address.password or address.query:
            raise ValueError(
                "judge.base_url: contains more than an address; a key goes into judge.key_variable's variable"
            )
        if (input_price is None) != (output_price is None):
            raise ValueError("judge.input_price and judge.output_price: give both, or neither")
        self.base_url, self.model = base_url, model
        self.template, self.request = check_template(template), dict(request)
        self.timeout_s, self.max_retries, self.attempts = timeout_s, max_retries, attempts
        self.concurrency = concurrency
        self.prices = None if input_price is None or output_price is None else (input_price, output_price)
        self._key = _key(key_variable)
        remember(self._key)
        remember_secrets({"request": self.request})
        self._pace = Pace(requests_per_minute)

    @property
    def identity(self) -> dict[str, Any]:
        """Return endpoint, model, question and parameters, but no setting of retries or pace."""
        return {
            "judge": "http",
            "base_url": self.base_url,
            "model": self.model,
            "template": self.template,
            "request": self.request,
        }

    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        """Ask in ``concurrency`` threads.

        Raises:
            JudgeError: The endpoint does not accept the key or the model.
        """
        texts = {text for shown in comparisons for text in (shown.prompt, shown.first, shown.second)}
        if count := sum(_CONTROL.search(text) is not None for text in texts):
            note(
                "http_control_text",
                f"judge.base_url={self.base_url}: {count} prompts and completions contain text such as <|im_end|>, and "
                "the endpoint may read it as a control token, which may change a verdict; a judge on this machine "
                "(judge=language_model) reads it as text",
                count,
            )
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            pending = {pool.submit(self._answer, comparison): comparison for comparison in comparisons}
            for done in as_completed(pending):
                yield {pending[done]: done.result()}
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, comparison: JudgedPair) -> float | str:
        import openai

        content, answer = question(self.template, comparison), ""
        for _ in range(self.attempts):
            try:
                response = self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": content}], extra_body=self.request
                )
                self._count(response.usage)
                answer = str(response.choices[0].message.content)
            except openai.APIStatusError as error:
                words = f"the endpoint {self.base_url} answers {self._without_key(error)}"
                if error.status_code in _FATAL_STATUS_CODES:
                    raise JudgeError(f"{words}: set judge.base_url, judge.model and the key to ones that fit") from None
                return words
            except openai.APIConnectionError as error:
                return f"{self.base_url}: {self._without_key(error)}"
            except (openai.APIError, AttributeError, LookupError, TypeError, ValueError) as error:
                answer = f"an invalid chat completion ({self._without_key(error)})"  # an invalid body with status 200
                continue
            if match := _ANSWER.fullmatch(answer):
                return _ANSWERS[match[1].upper()]
        return f"it answered {scrub(answer)!r:.80} instead of A, B or TIE"

    def _count(self, usage: Any) -> None:
        if usage is None:
            return
        self.spend(tokens=usage.prompt_tokens + usage.completion_tokens)
        if self.prices is not None:
            cost = usage.prompt_tokens * self.prices[0] + usage.completion_tokens * self.prices[1]
            self.spend(cost=cost / 1e6)

    def _without_key(self, error: Exception) -> str:
        text = f"{error}".replace(self._key, "<key>") if self._key else f"{error}"
        text = scrub(text)  # before the cut, which could leave a part of a secret
        return text if len(text) <= 300 else f"{text[:300]} ..."

    @cached_property
    def _client(self) -> OpenAI:
        from openai import DefaultHttpxClient, OpenAI

        def before_request(_: Any) -> None:
            self._pace.wait()
            self.spend(calls=1)

        return OpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            timeout=self.timeout_s,
            max_retries=self.max_retries,
            http_client=DefaultHttpxClient(timeout=self.timeout_s, event_hooks={"request": [before_request]}),
        )


class Pace:
    """Pace of several threads, with evenly spaced turns.

    Args:
        per_minute: Limit of turns per minute; ``None`` for no limit.
        clock: Function that returns the time in seconds.
        sleep: Function that waits for a number of seconds.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gap = 0.0 if per_minute is None else 60 / per_minute
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._lock = Lock()

    def wait(self) -> None:
        """Wait until it is the turn of the caller."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)


def _key(variable: str | None) -> str:
    """Return the key in an environment variable; an empty text if no variable is named."""
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Za-z_]\w*", variable):
        raise ValueError(
            "judge.key_variable: is not the name of an environment variable; put the key there, its name here"
        )
    if not os.environ.get(variable):
        raise JudgeError(
            f"judge.key_variable={variable}: this environment variable is not set; put the endpoint's key there, or "
            "set judge.key_variable=null if it asks for none"
        )
    return os.environ[variable]
