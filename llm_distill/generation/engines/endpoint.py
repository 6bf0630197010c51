"""A teacher behind an OpenAI-compatible endpoint: text in, text out. Its answers cost money, so no prompt is sent again
that has an answer, and a budget is kept to.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, ClassVar

import urllib3

from llm_distill.generation.engines.base import Answer, Completion, Engine, Sampling
from llm_distill.generation.prompts import Prompt
from llm_distill.models import public_name
from llm_distill.servers import NoAnswerError, RefusedError, ServerPool, parse_url

SECONDS_TO_LIST_MODELS = 5.0


class BudgetReachedError(RuntimeError):
    """The next answers would cost more than is allowed. All that was paid for has been handed over."""


@dataclass(frozen=True)
class Prices:
    """For a million tokens, and how much may be spent in all; one currency for all three."""

    input: float = 0.0
    output: float = 0.0
    budget: float | None = None

    def __post_init__(self) -> None:
        if min(self.input, self.output) < 0:
            raise ValueError(f"prices must not be negative, got {self.input} and {self.output}.")
        if self.budget is not None and self.budget <= 0:
            raise ValueError(f"budget={self.budget} allows nothing: give a positive amount, or leave it out.")
        if self.budget is not None and not (self.input or self.output):
            raise ValueError(
                "a budget needs prices to count with: price_per_million_input_tokens and "
                "price_per_million_output_tokens, in the same currency."
            )

    def of(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class EndpointEngine(Engine):
    """Any OpenAI-compatible endpoint: chat completions for conversations, completions for texts.

    Args:
        url: such as https://host/v1.
        model: as the endpoint calls it.
        sampling: how; endpoints have no beams.
        concurrency: requests in flight at most.
        prices: what tokens cost, and how much may be spent.
        spent: of the budget, by earlier runs.
        timeout: seconds for one attempt at a request.
        max_retries: of one request.
        log_probs: asks for `mean_log_prob`, which not all endpoints tell.
    """

    runs_on_every_rank: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        *,
        concurrency: int = 16,
        prices: Prices | None = None,
        spent: float = 0.0,
        timeout: float = 600.0,
        max_retries: int = 8,
        log_probs: bool = False,
    ) -> None:
        if sampling.num_beams > 1:
            raise ValueError("an endpoint has no beam search: num_beams=1.")
        if concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(f"concurrency={concurrency}, max_retries={max_retries}, timeout={timeout}: out of range.")
        address = parse_url(url)
        self.url = address._replace(auth=None, query=None, fragment=None).url
        self.model, self.sampling, self.concurrency = model, sampling, concurrency
        self.prices, self.spent, self.log_probs = prices or Prices(), spent, log_probs
        self._limit_name = "max_tokens"
        self._headers = urllib3.util.make_headers(basic_auth=address.auth) if address.auth else {}
        self._server = ServerPool(
            [self.url], timeout=timeout, attempts=max_retries + 1, concurrency=concurrency, headers=self._headers
        )

    def describe(self) -> dict[str, Any]:
        return {"model": public_name(self.model), "served": "openai"}

    def check(self) -> None:
        server = ServerPool([self.url], timeout=SECONDS_TO_LIST_MODELS, attempts=1, headers=self._headers)
        try:
            served = [card["id"] for card in server.request("/models")["data"]]
        except (RefusedError, NoAnswerError, KeyError, TypeError) as error:
            status = getattr(error, "status", None)
            if status in (401, 403):
                raise
            if status == 0:
                raise ValueError(
                    f"nothing answers at {self.url}: is the server up, and is that its address? It usually ends in "
                    f"/v1. ({error})"
                ) from error
            return  # it does not list its models: the first request will tell
        if served and self.model not in served:
            raise ValueError(f"{self.url} does not serve {self.model!r}, only {', '.join(served[:20])}.")

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Raises BudgetReachedError when the budget is used up; answers under way are handed over before."""
        under_way, left, dearest = set[Future[Answer]](), deque(prompts), 0.0
        threads, stop = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint"), threading.Event()
        try:
            while left or under_way:
                while left and len(under_way) < self._affordable(dearest):
                    under_way.add(threads.submit(self._answer, left.popleft(), stop))
                if not under_way:
                    raise BudgetReachedError(
                        f"{self.spent:.4f} of the budget of {self.prices.budget} is spent, and the next answer could "
                        f"cost {dearest:.4f}. What was paid for is kept: with a larger budget the same command goes on."
                    )
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    answer = future.result()
                    self.spent += answer.cost
                    dearest = max(dearest, answer.cost)
                    yield answer
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _affordable(self, dearest: float) -> int:
        """How many answers may be under way, if none costs more than the dearest so far: the first shows what one
        costs.
        """
        budget = self.prices.budget
        if budget is None:
            return self.concurrency
        if self.spent >= budget or not dearest:
            return int(self.spent < budget)
        return min(self.concurrency, math.ceil((budget - self.spent) / dearest) - 1)

    def _answer(self, prompt: Prompt, stop: threading.Event) -> Answer:
        completions: list[Completion] = []
        cost = 0.0
        while len(completions) < self.sampling.num_completions:  # some servers give one, whatever n says
            missing = self.sampling.num_completions - len(completions)
            try:
                answer = self._request(prompt, missing, len(completions), stop)
            except RefusedError as refusal:
                if refusal.status != 400:
                    raise
                return Answer(prompt, completions, f"the endpoint refused it: {refusal.reason}", cost=cost)
            except NoAnswerError as error:
                what = f"answered {error.status}" if error.status else "gave no answer"
                raise ConnectionError(
                    f"{self.url} {what} {self._server.attempts} times. What has arrived is kept, and the same command "
                    f"goes on. (the last time: {error})"
                ) from error
            usage, choices = answer.get("usage") or {}, answer["choices"]
            written = usage.get("completion_tokens") or 0
            cost += self.prices.of(usage.get("prompt_tokens") or 0, written)
            completions += [_completion(choice, written // len(choices)) for choice in choices[:missing]]
        return Answer(prompt, completions, cost=cost)

    def _request(self, prompt: Prompt, n: int, number: int, stop: threading.Event) -> dict[str, Any]:
        sampling, limit = self.sampling, self._limit_name
        body: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "temperature": sampling.temperature,
            "seed": (sampling.seed + int(prompt.id[:7], 16) + number) % 2**31,
        }
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if isinstance(prompt.content, str):
            body |= {"prompt": prompt.content, "max_tokens": sampling.max_new_tokens}
            body |= {"logprobs": 0} if self.log_probs else {}
            return self._server.request("/completions", body, _with_choices, stop)
        body |= {"messages": prompt.content, limit: sampling.max_new_tokens}
        body |= {"logprobs": True} if self.log_probs else {}
        try:
            return self._server.request("/chat/completions", body, _with_choices, stop)
        except RefusedError as refusal:
            if limit == "max_completion_tokens" or "max_completion_tokens" not in refusal.reason:
                raise
            self._limit_name = "max_completion_tokens"  # as newer models of OpenAI call it
            return self._request(prompt, n, number, stop)


def _with_choices(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer.get("choices"):
        raise NoAnswerError("its answer has no choices", 200)
    return answer


def _completion(choice: dict[str, Any], tokens: int) -> Completion:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    log_probs = choice.get("logprobs") or {}
    in_chat = [token["logprob"] for token in log_probs.get("content") or ()]
    values = [value for value in log_probs.get("token_logprobs") or in_chat if value is not None]
    return Completion(
        text=text or "",
        finished=choice.get("finish_reason") == "stop",
        tokens=len(values) or tokens,
        mean_log_prob=sum(values) / len(values) if values else None,
    )
