"""A teacher behind an OpenAI-compatible endpoint: text in, text out. Its answers cost money, so no prompt is sent again
that has an answer, and a budget is kept to.
"""

from __future__ import annotations

import json
import logging
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
from llm_distill.leaks import find_leak
from llm_distill.models import public_name
from llm_distill.servers import NoAnswerError, RefusedError, ServerPool, parse_url

logger = logging.getLogger(__name__)

SECONDS_TO_LIST_MODELS = 5.0
OF_ONE_PROMPT = (400, 413, 422)
"""HTTP statuses that refuse a prompt, and say nothing of the next."""
LARGEST_LOG_PROB = 1e-3
"""What rounding may make of 0."""


class BudgetReachedError(RuntimeError):
    """The next answers would cost more than is allowed. All that was paid for has been handed over."""


class UnusableAnswerError(ValueError):
    """It has arrived, and is no text to learn from."""


class UnansweredError(ConnectionError):
    """No attempt at a prompt has got an answer; `answer` says so of it, if it is the prompt's fault."""

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(frozen=True)
class Prices:
    """For a million tokens, and how much may be spent in all; one currency for all three."""

    input: float = 0.0
    output: float = 0.0
    budget: float | None = None

    def __post_init__(self) -> None:
        if not all(0 <= price < math.inf for price in (self.input, self.output)):
            raise ValueError(f"prices must not be negative, and finite, got {self.input} and {self.output}.")
        if self.budget is not None and not self.budget > 0:
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
        if concurrency < 1 or max_retries < 0 or not 0 < timeout < math.inf:
            raise ValueError(
                f"concurrency={concurrency}, max_retries={max_retries} and timeout={timeout}: an endpoint gets one "
                "request at a time or more, again or not, and some seconds for it."
            )
        address = parse_url(url)
        if address.query:
            raise ValueError(
                f"the endpoint's address at {address.host} has a query (?…) in it, which no request can have."
            )
        self.url = address._replace(auth=None, fragment=None).url.removesuffix("/chat/completions")
        self.model, self.sampling, self.concurrency = model, sampling, concurrency
        self.prices, self.spent, self.log_probs = prices or Prices(), spent, log_probs
        self._limit_name, self._believes_usage, self._dearest = "max_tokens", True, 0.0
        self._headers = urllib3.util.make_headers(basic_auth=address.auth) if address.auth else {}
        parts = [self.url, address.netloc, address.path, *self._headers.values(), *(address.auth or "").split(":")]
        self._secrets = [part for part in parts if part and len(part) > len("/v1")]
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
            if status == 0:
                raise ValueError(
                    f"nothing answers at {self.url}: is the server up, and is that its address? It usually ends in "
                    f"/v1. ({error})"
                ) from error
            if isinstance(error, RefusedError) and status not in (404, 405):
                raise
            return  # it does not list its models: the first request will tell
        if served and self.model not in served:
            raise ValueError(f"{self.url} does not serve {self.model!r}, only {', '.join(map(str, served[:20]))}.")

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """What is under way is handed over before an error is raised.

        Raises:
            BudgetReachedError: the next answer could cost more than is left of the budget.
            RefusedError: the endpoint refuses what is no single prompt's fault.
            ConnectionError: it leaves one prompt after the other without an answer. A single one is passed over.
        """
        left, silent = deque(prompts), list[UnansweredError]()
        error: RefusedError | ConnectionError | None = None
        threads, stop = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint"), threading.Event()
        under_way: dict[Future[Answer], float] = {}  # what each may cost
        try:
            while left or under_way:
                while left and error is None and len(under_way) < self.concurrency:
                    most = self._most_it_costs(left[0])
                    if (
                        self.prices.budget is not None
                        and self.spent + sum(under_way.values()) + most > self.prices.budget
                    ):
                        break
                    under_way[threads.submit(self._answer, left.popleft(), stop)] = most
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    del under_way[future]
                    try:
                        answers = [future.result()]
                    except UnansweredError as failure:  # whose fault it is, the next answer shows
                        silent.append(failure)
                        error = failure if len(silent) > self.concurrency else error
                    except (RefusedError, ConnectionError) as failure:
                        error = error or failure
                    else:
                        answers = [*(failure.answer for failure in silent), *answers]
                        silent.clear()
                        self.spent += sum(answer.cost for answer in answers)
                        self._dearest = max(self._dearest, *(answer.cost for answer in answers))
                        yield from answers
                    if error is not None:
                        stop.set()
            if error is not None or silent:
                raise error or silent[-1]
            if left:
                raise BudgetReachedError(
                    f"{self.spent:.4f} of the budget of {self.prices.budget} is spent, and the next answer could cost "
                    f"{self._most_it_costs(left[0]):.4f} (max_new_tokens={self.sampling.max_new_tokens}). What was "
                    "paid for is kept: with a larger budget the same command goes on."
                )
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _most_it_costs(self, prompt: Prompt) -> float:
        """No answer so far has cost more, nor can this one by what is sent and asked for."""
        return max(self._dearest, self.sampling.num_completions * self.prices.of(*self._most_tokens(prompt)))

    def _most_tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Of a prompt and one completion: a token has a byte or more."""
        sent = json.dumps([prompt.content, prompt.options], ensure_ascii=False)
        return len(sent.encode()), self.sampling.max_new_tokens

    def _answer(self, prompt: Prompt, stop: threading.Event) -> Answer:
        completions, refused, cost = list[Completion](), None, 0.0
        while refused is None and len(completions) < self.sampling.num_completions:  # some give one, whatever n says
            missing = self.sampling.num_completions - len(completions)
            try:
                answer = self._request(prompt, missing, len(completions), stop)
                asked, written = self._used_tokens(answer, prompt)
                cost += self.prices.of(asked, written)
                for choice in answer["choices"][:missing]:
                    completions.append(_completion(choice, written // len(answer["choices"])))
            except RefusedError as refusal:
                if refusal.status not in OF_ONE_PROMPT:
                    raise
                refused = f"the endpoint refused it: {self._public_reason(refusal.reason)}"
            except UnusableAnswerError as error:
                refused = f"the endpoint's answer cannot be used: {error}"
            except NoAnswerError as error:
                what = f"answered {error.status}" if error.status else "gave no answer"
                raise UnansweredError(
                    f"{self.url} {what} {self._server.attempts} times. What has arrived is kept, and the same command "
                    f"goes on. (the last time: {error})",
                    Answer(prompt, completions, f"the endpoint {what} {self._server.attempts} times", cost=cost),
                ) from error
        return Answer(prompt, completions, refused, cost=cost)

    def _public_reason(self, reason: str) -> str:
        """What the endpoint says, as journal and card may have it: it may repeat the address that it was asked at."""
        for secret in self._secrets:
            reason = reason.replace(secret, "…")
        return reason if find_leak(reason, None) is None else "…"

    def _used_tokens(self, answer: dict[str, Any], prompt: Prompt) -> tuple[int, int]:
        """Of the prompt, and written, as the endpoint tells them; the most that it can be where it does not."""
        usage = answer["usage"] if isinstance(answer.get("usage"), dict) else {}
        asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(asked, int) and isinstance(written, int) and asked > 0 and written > 0:
            return asked, written
        asked, written = self._most_tokens(prompt)
        if self._believes_usage:
            self._believes_usage = False
            logger.warning(
                "%s does not tell how many tokens it has used (usage: %s): where it does not, an answer counts as %d "
                "tokens, and a prompt as one for each of its bytes.",
                *(self.url, str(answer.get("usage"))[:100], written),
            )
        return asked, written * len(answer["choices"])

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
        body |= {"messages": prompt.content, limit: sampling.max_new_tokens, **prompt.options}
        body |= {"logprobs": True} if self.log_probs else {}
        try:
            return self._server.request("/chat/completions", body, _with_choices, stop)
        except RefusedError as refusal:
            if limit == "max_completion_tokens" or "max_completion_tokens" not in refusal.reason:
                raise
            self._limit_name = "max_completion_tokens"  # as newer models of OpenAI call it
            return self._request(prompt, n, number, stop)


def _with_choices(answer: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(answer.get("choices"), list) or not answer["choices"]:
        raise NoAnswerError("its answer has no choices", 200)
    return answer


def _completion(choice: Any, tokens: int) -> Completion:
    """Raises UnusableAnswerError."""
    try:
        message = choice.get("message") or {"content": choice.get("text")}
        text, calls = message.get("content") or "", [_with_arguments(call) for call in message.get("tool_calls") or ()]
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        for part in (text, reasoning, json.dumps(calls, ensure_ascii=False)):
            part.encode()
        log_probs = choice.get("logprobs") or {}
        in_chat = [token["logprob"] for token in log_probs.get("content") or ()]
        values = [value for value in log_probs.get("token_logprobs") or in_chat if value is not None]
        mean_log_prob = sum(values) / len(values) if values else None
    except UnicodeEncodeError as error:
        raise UnusableAnswerError("its text has half of a character (a lone surrogate)") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError("it has another form than OpenAI's") from error
    if mean_log_prob is not None and not mean_log_prob < LARGEST_LOG_PROB:
        raise UnusableAnswerError("its log-probabilities are none")
    return Completion(
        text,
        finished=choice.get("finish_reason") in ("stop", "tool_calls", "function_call"),
        tokens=len(values) or tokens,
        mean_log_prob=mean_log_prob,
        extra=({"reasoning_content": reasoning} if reasoning else {}) | ({"tool_calls": calls} if calls else {})
        or None,
    )


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as chat templates expect it: OpenAI's arguments are JSON in a text."""
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": arguments}}
