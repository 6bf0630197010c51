"""A teacher behind an OpenAI-compatible endpoint: text in, text out. Its answers cost money, so each is asked for once.

The `openai` client repeats what failed for a passing reason (429, 5xx, timeouts, broken connections), with exponential
back-off, jitter and the server's Retry-After; we add what it takes for an answer and is none. Nothing here prints, logs
or stores the key.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

from llm_distill.generation.engines import Answer, Completion, Engine, Sampling
from llm_distill.generation.prompts import Prompt

KEY_VARIABLE = "OPENAI_API_KEY"
SECONDS_TO_CONNECT, LONGEST_WAIT = 5.0, 60.0


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
        timeout: seconds for one request.
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
        try:
            import openai
        except ImportError as error:
            raise ValueError("an endpoint needs the openai client: pip install 'llm-distill[generation]'.") from error
        self._openai: Any = openai
        self.url, self.model, self.sampling = url.rstrip("/"), model, sampling
        self.concurrency, self.prices, self.spent = concurrency, prices or Prices(), spent
        self.max_retries, self.log_probs = max_retries, log_probs
        self._limit_name = "max_tokens"
        self._client: Any = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",  # local servers ask for none
            max_retries=max_retries,
            timeout=timeout,
        )

    @property
    def shown_url(self) -> str:
        """Without a password that somebody may have put into it."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))

    def describe(self) -> dict[str, Any]:
        name = os.path.basename(self.model.rstrip("/")) if os.path.isabs(self.model) else self.model
        return {"model": name, "served": "openai"}

    def check(self) -> None:
        openai = self._openai
        try:
            client = self._client.with_options(max_retries=0, timeout=SECONDS_TO_CONNECT)
            served = [model.id for model in client.models.list().data]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._key_refused() from error
        except openai.APIConnectionError as error:
            raise ValueError(
                f"nothing answers at {self.shown_url}: is the server up, and is that its address? It usually ends in "
                f"/v1. ({type(error.__cause__ or error).__name__})"
            ) from error
        except (openai.APIError, ValueError, AttributeError, TypeError):
            return  # it does not list its models: the first request will tell
        if served and self.model not in served:
            raise ValueError(f"{self.shown_url} does not serve {self.model!r}, only {', '.join(served[:20])}.")

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Raises BudgetReachedError when the budget is used up; answers under way are handed over before."""
        waiting, todo, over = set[Future[Answer]](), deque(prompts), False
        dearest = 0.0
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            while True:
                while todo and len(waiting) < self.concurrency:
                    budget = self.prices.budget
                    if budget is not None and self.spent + (len(waiting) + 1) * dearest >= budget:
                        over = not waiting
                        break
                    if budget is not None and not dearest and waiting:
                        break  # until the first has told what one costs
                    waiting.add(pool.submit(self._answer, todo.popleft()))
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    answer = future.result()
                    self.spent += answer.cost
                    dearest = max(dearest, answer.cost)
                    yield answer
            if over:
                raise BudgetReachedError(
                    f"{self.spent:.4f} of the budget of {self.prices.budget} is spent, and the next answer could cost "
                    f"{dearest:.4f}. What was paid for is kept: with a larger budget the same command goes on."
                )
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: Prompt) -> Answer:
        completions: list[Completion] = []
        cost = 0.0
        while len(completions) < self.sampling.num_completions:  # some servers give one, whatever n says
            missing = self.sampling.num_completions - len(completions)
            try:
                response = self._asked(prompt, missing, len(completions))
            except self._openai.BadRequestError as error:
                return Answer(prompt, completions, f"the endpoint refused it: {_message(error)}", cost=cost)
            usage = getattr(response, "usage", None)
            written = getattr(usage, "completion_tokens", None) or 0
            cost += self.prices.of(getattr(usage, "prompt_tokens", None) or 0, written)
            share = written // max(len(response.choices), 1)
            completions += [self._completion(choice, share) for choice in response.choices[:missing]]
        return Answer(prompt, completions, cost=cost)

    def _asked(self, prompt: Prompt, n: int, number: int) -> Any:
        sampling, openai = self.sampling, self._openai
        options: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "temperature": sampling.temperature,
            "seed": (sampling.seed + int(prompt.id[:7], 16) + number) % 2**31,
        }
        if sampling.top_p < 1:
            options["top_p"] = sampling.top_p
        if sampling.top_k:
            options["extra_body"] = {"top_k": sampling.top_k}
        reason = ""
        for attempt in range(self.max_retries + 1):
            try:
                if isinstance(prompt.content, str):
                    options |= {"max_tokens": sampling.max_new_tokens} | ({"logprobs": 0} if self.log_probs else {})
                    response = self._client.completions.create(prompt=prompt.content, **options)
                else:
                    own = {self._limit_name: sampling.max_new_tokens} | ({"logprobs": True} if self.log_probs else {})
                    response = self._client.chat.completions.create(messages=prompt.content, **options, **own)
                if getattr(response, "choices", None):
                    return response
                reason = "gave an answer without choices"
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise self._key_refused() from error
            except openai.BadRequestError as error:
                if "max_completion_tokens" not in str(error) or self._limit_name == "max_completion_tokens":
                    raise
                self._limit_name = "max_completion_tokens"  # as newer models of OpenAI call it
                continue
            except openai.NotFoundError as error:
                raise ValueError(f"{self.shown_url} knows no model {self.model!r}. ({_message(error)})") from error
            except openai.APIStatusError as error:
                raise self._gave_up(f"answered {error.status_code}") from error
            except openai.APIConnectionError as error:
                raise self._gave_up("could not be reached") from error
            except (openai.APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
                reason = f"gave an answer that is no JSON ({type(error).__name__})"
            time.sleep(random.random() * min(LONGEST_WAIT, 0.5 * 2**attempt))
        raise self._gave_up(reason)

    def _completion(self, choice: Any, tokens: int) -> Completion:
        text = choice.message.content if hasattr(choice, "message") else choice.text
        said = getattr(choice, "logprobs", None)
        of_chat = [token.logprob for token in getattr(said, "content", None) or ()]
        values = getattr(said, "token_logprobs", None) or of_chat
        values = [value for value in values if value is not None]
        return Completion(
            text=text or "",
            finished=choice.finish_reason == "stop",
            tokens=len(values) or tokens,
            mean_log_prob=sum(values) / len(values) if values else None,
        )

    def _gave_up(self, reason: str) -> ConnectionError:
        return ConnectionError(
            f"{self.shown_url} {reason} {self.max_retries + 1} times. What has arrived is kept, and the same command "
            "goes on."
        )

    def _key_refused(self) -> ValueError:
        given = "was refused" if os.environ.get(KEY_VARIABLE) else "is missing"
        return ValueError(f"the key for {self.shown_url} {given}: set {KEY_VARIABLE} in the environment.")


def _message(error: Any) -> str:
    """What the server says, without what may be a key."""
    return re.sub(r"\b(sk|key|hf|Bearer)[-_ ][\w*.-]+", "[key]", str(error))[:300]
