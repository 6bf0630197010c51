"""A teacher behind vLLM's OpenAI-compatible server: its top k at every position of a text, and the mass of the others.

The texts of a batch are asked for where batches are made, so that with workers in the loader (`dataloader_num_workers`)
the answers to the next batches are on their way while the student trains.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_distill.divergences import Divergence
from llm_distill.models import HEAD, Needs, different_ids, public_name, refuse_past_context, vocabulary_size
from llm_distill.rows import IGNORED, SIGNAL, Example, View, examples_of
from llm_distill.servers import (
    KEY_VARIABLE,
    NoAnswerError,
    RefusedError,
    ServerPool,
    UnbelievableError,
    parse_url,
)
from llm_distill.signals import SparseSignal, TokenSignal
from llm_distill.teachers.base import Teacher

logger = logging.getLogger(__name__)

START_SECONDS = 5.0
"""How long a server may take to list its models."""
CHECK_SECONDS = 120.0
"""How long a server may take for each of the other questions at the start, when it may be at work for others."""
START_ATTEMPTS = 3
ATTEMPTS_IN_TIMEOUT = 4
"""A server that does not answer for this part of the time allowed gets the request again, or another one does."""
IDS_A_REQUEST = 8192
SMALLEST_TAIL = 2.0**-24
"""Log-probabilities come as float32: less mass than this is not told apart from none."""
ROUNDING = 0.01
"""By how much the probabilities of a row may exceed 1 together, or fall short of it."""
LARGEST_DISTANCE = 0.2
"""Nats a token, between servers of the same weights: what bfloat16 makes of them is a tenth of this."""
PROBE = "The quick brown fox jumps over the lazy dog, and def main(argv): return len(argv) > 1 follows at 10:45."
PROBE_TOKENS = 32


class AnsweredRows(NamedTuple):
    """What a server says of some tokens of a text."""

    ids: np.ndarray
    """Of the likeliest tokens in each one's place, [rows, k]."""
    log_p: np.ndarray
    """Theirs, [rows, k]."""
    text_log_p: np.ndarray
    """Of the text's own tokens, [rows]."""


class ServedTeacher(Teacher):
    """Asks one or more vLLM servers (`prompt_logprobs`). No weights are loaded here.

    Its signal is at temperature 1 and of k + 1 cells, a lower bound of the divergence; at k = 0, the log-probability of
    the text's own tokens alone, for the reverse KL on what the student wrote. A server with more logits than
    the student's tokenizer has tokens (a padded matrix) may name some of those: they are dropped, and the others
    divided by what is left.

    Args:
        urls: `http://host:port`, one or several that serve the same model, in a list or with commas between.
        model: as the server names it; None for the only one that it serves.
        k: how many tokens of each row. vLLM gives 20 at most, unless it was started with `--max-logprobs`.
        timeout: seconds without an answer to a request, from any server, after which the run ends.
    """

    k: int

    def __init__(
        self, urls: str | Sequence[str], model: str | None = None, k: int = 20, timeout: float = 600.0
    ) -> None:
        if k < 0 or not 0 < timeout < math.inf:
            raise ValueError(f"k={k} and timeout={timeout}: neither may be negative, and timeout must be finite.")
        self.k, self.model = k, model
        self.reader = self.read
        self._timeout = timeout
        self._servers = self._pool(parse_urls(urls))
        self._max_length: int | None = None
        self._up: list[str] = []
        self._vocab_size = 0

    def check(self, divergence: Divergence, temperature: float) -> None:
        no_rows = torch.zeros(0, 1)
        top = SparseSignal(no_rows.long(), no_rows, no_rows[:, 0], vocab_size=1)
        (top if self.k else TokenSignal(no_rows[:, 0], vocab_size=1)).check(divergence, temperature)

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ConnectionError where no server answers; ValueError where one serves another model, another
        tokenizer, fewer than k tokens a row, what are no log-probabilities, or others than the first server.
        """
        self._vocab_size = vocabulary_size(tokenizer)
        if self.k > self._vocab_size:
            raise ValueError(f"k = {self.k} is larger than the vocabulary of {self._vocab_size:,}.")
        self._connect()
        probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"][:PROBE_TOKENS][: self._max_length]
        answers = [self._ask_probe(url, probe) for url in self._up]
        for url, answer in zip(self._up, answers, strict=True):
            self._require_same_ids(url, tokenizer)
            distance = np.abs(answer.text_log_p - answers[0].text_log_p).mean()
            if not distance <= LARGEST_DISTANCE:
                raise ValueError(
                    f"{self._up[0]} and {url} both serve {self.model!r}, and give the same text other probabilities "
                    f"({distance:.2f} nats a token apart): one of them has other weights, or is at fault. Leave it out."
                )

    @property
    def max_length(self) -> int | None:
        self._connect()
        return self._max_length

    def summary(self) -> str:
        return f"{self.describe()['model']} answers, {self.k} tokens a row"

    def describe(self) -> dict[str, Any]:
        self._connect()
        return {"model": public_name(self.model or ""), "served": "vllm", "k": self.k}

    def read(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Puts the answer into the batch, floats as the bits that they are made of: see `CacheReader`."""
        batch[SIGNAL] = self._request_signal(View.of_teacher(batch))
        return batch

    def score(self, view: View, needs: Needs = HEAD) -> SparseSignal | TokenSignal:
        device = view.positions.sample.device
        bits = view.fetched if view.fetched is not None else self._request_signal(view)
        floats = {name: bits[name].to(device).view(torch.float32) for name in bits if name != "ids"}
        if not self.k:
            return TokenSignal(floats["text_log_probs"], self._vocab_size)
        return SparseSignal(bits["ids"].to(device), floats["log_probs"], floats["log_tail"], self._vocab_size)

    def _request_signal(self, view: View) -> dict[str, Tensor]:
        ids, texts, reads = view.inputs["input_ids"].cpu(), [], []
        for example in examples_of(view):
            refuse_past_context(len(example.positions), self._max_length, "the batch")
            text = ids[example.sample, torch.from_numpy(example.positions)].tolist()
            texts.append(text)
            reads.append(partial(self._read_answer, text=text, places=counted_tokens(example)))
        answers = self._servers.request_all("/v1/completions", [self._body(text) for text in texts], reads)
        if not self.k:
            text_log_p = np.concatenate([np.zeros(0), *(answer.text_log_p for answer in answers)])
            return {"text_log_probs": torch.from_numpy(text_log_p).float().view(torch.int32)}
        top_ids = np.concatenate([np.zeros((0, self.k), np.int64), *(answer.ids for answer in answers)])
        log_p = np.concatenate([np.zeros((0, self.k)), *(answer.log_p for answer in answers)])
        log_p, log_tail = fit_to_vocabulary(top_ids, log_p, self._vocab_size)
        return {
            "ids": torch.from_numpy(top_ids),
            "log_probs": torch.from_numpy(log_p).float().view(torch.int32),
            "log_tail": torch.from_numpy(log_tail).float().view(torch.int32),
        }

    def _body(self, ids: list[int]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": ids,
            "prompt_logprobs": self.k,
            "max_tokens": 1,
            "temperature": 0,
            "add_special_tokens": False,
        }

    def _read_answer(self, answer: Mapping[str, Any], text: list[int], places: np.ndarray) -> AnsweredRows:
        """Raises UnbelievableError for what no model says of these tokens."""
        if answer.get("model") != self.model:
            raise UnbelievableError(f"{self.model!r} was asked, and {answer.get('model')!r} has answered.")
        tokens = None
        with suppress(KeyError, IndexError, TypeError):
            tokens = answer["choices"][0]["prompt_logprobs"]
        if not isinstance(tokens, list) or len(tokens) != len(text):
            raise UnbelievableError(
                f"the server of {self.model!r} gives no prompt_logprobs for the {len(text):,} tokens that it was sent: "
                "is it vLLM? Other servers give text alone, for sequence-level distillation."
            )
        try:
            text_log_p = [tokens[place][str(text[place])]["logprob"] for place in places]
            rows = AnsweredRows(*read_top_tokens(tokens, places, self.k), np.array(text_log_p, float))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UnbelievableError(
                "its prompt_logprobs have a row that cannot be read, or is not of the token that it was sent."
            ) from error
        refuse_impossible(rows.ids, rows.log_p, self._vocab_size)
        if not (rows.text_log_p <= ROUNDING).all():
            raise UnbelievableError("it gave the text's own tokens what is no logarithm of a probability.")
        return rows

    def _connect(self) -> None:
        """Finds out what is served, once. A server that is down then is never asked: nobody has seen what it serves.

        Raises:
            ConnectionError: no server answers.
            ValueError: a server has not the model.
        """
        if self._up:
            return
        down = []
        for url in self._servers.urls:
            try:
                card = self._card(url, self._ask(url, "/v1/models", seconds=START_SECONDS, read=_read_cards))
            except ConnectionError as error:
                down.append(str(error).rstrip("."))
                continue
            if isinstance(limit := card.get("max_model_len"), int) and limit > 1:
                # one token is always written after the text
                self._max_length = min(limit - 1, self._max_length or limit)
            self._up.append(url)
        if not self._up:
            raise ConnectionError(
                f"the teacher's server cannot be reached: {'; '.join(down)}. Start it, or mend teacher_server_url."
            )
        for reason in down:
            logger.warning("the teacher's server %s cannot be reached; the others go on without it.", reason)
        self._servers = self._pool(self._up)

    def _pool(self, urls: Sequence[str]) -> ServerPool:
        return ServerPool(urls, timeout=self._timeout / ATTEMPTS_IN_TIMEOUT, patience=self._timeout)

    def _ask(
        self,
        url: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[dict[str, Any]], Any],
        seconds: float = CHECK_SECONDS,
    ) -> Any:
        """The answer of one server at the start. Raises RefusedError; ConnectionError if it gives none."""
        seconds = min(seconds, self._timeout)
        try:
            server = ServerPool([url], timeout=seconds, patience=self._timeout, attempts=START_ATTEMPTS)
            return server.request(path, body, read)
        except NoAnswerError as error:
            raise ConnectionError(f"{url} ({error}) does not answer {path}.") from error

    def _card(self, url: str, cards: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        if self.model is None and len(cards) == 1:
            self.model = next(iter(cards))
        if self.model is None or self.model not in cards:
            wanted = "and no model was named" if self.model is None else f"not {self.model!r}"
            raise ValueError(
                f"{url} serves {', '.join(map(repr, cards)) or 'nothing'}, {wanted}. Name one of those as "
                "teacher_model_name_or_path, or start the server with `vllm serve MODEL`."
            )
        return cards[self.model]

    def _ask_probe(self, url: str, text: list[int]) -> AnsweredRows:
        """What one server says of all tokens but the first of a short text."""
        read = partial(self._read_answer, text=text, places=np.arange(1, len(text)))
        try:
            return self._ask(url, "/v1/completions", self._body(text), read=read)
        except RefusedError as error:
            if "logprobs" not in str(error):
                raise
            raise ValueError(
                f"teacher_server_k={self.k}: {error} vLLM gives 20 at most unless it is started with more: "
                f"`vllm serve {self.model} --max-logprobs {self.k}`; or ask for fewer."
            ) from error

    def _require_same_ids(self, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """The text of every id must be the same there: whole runs of ids are compared, and halved where they differ."""
        ids = sorted(tokenizer.get_vocab().values())
        different: list[str] = []
        runs = [ids[start : start + IDS_A_REQUEST] for start in range(0, len(ids), IDS_A_REQUEST)][::-1]
        while runs and len(different) < 3:
            run = runs.pop()
            body = {"model": self.model, "tokens": run}
            teachers_text = self._ask(url, "/detokenize", body, read=_read_text)
            text = tokenizer.decode(run)
            if teachers_text == text:
                continue
            if len(run) == 1:
                different.append(f"{run[0]}: {text!r} against {teachers_text!r}")
            else:
                runs += [run[len(run) // 2 :], run[: len(run) // 2]]
        if different:
            raise different_ids(f"of {self.model!r} at {url}", tokenizer, f"ids ({', '.join(different)}, …)")


def parse_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Addresses without `/v1`, each once, from one, several, or several with commas between.

    Raises:
        ValueError: none, one that is not http(s)://host, or one with a user, a key or a query in it.
    """
    given = urls.split(",") if isinstance(urls, str) else urls
    parsed = [parse_url(url) for url in given if url.strip()]
    for url in parsed:
        if url.auth or url.query:
            raise ValueError(
                f"the server's address for {url.host} has a user or a query in it, which would be seen in messages. "
                f"Give the key in the environment: {KEY_VARIABLE}."
            )
    if not parsed:
        raise ValueError(f"there is no server's address in {urls!r}.")
    return tuple(dict.fromkeys(url.url.removesuffix("/v1") for url in parsed))


def _read_cards(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the models that a server lists, by name."""
    try:
        return {card["id"]: card for card in answer["data"]}
    except (KeyError, TypeError) as error:
        raise UnbelievableError("it lists no models: is it vLLM?") from error


def _read_text(answer: Mapping[str, Any]) -> str:
    if not isinstance(text := answer.get("prompt"), str):
        raise UnbelievableError("it gives no text for token ids (/detokenize): is it vLLM?")
    return text


def counted_tokens(example: Example) -> np.ndarray:
    """Which tokens of an example are learned (`[rows]`): those after the positions that count.

    Raises:
        ValueError: the first token of a packed document is learned, from the document before.
    """
    if example.counted[-1]:
        raise ValueError(
            "the first token of a packed document counts, and a server that reads one document at a time cannot say "
            f"how likely it is after another: set its label to {IGNORED}."
        )
    return np.flatnonzero(example.counted) + 1


def read_top_tokens(tokens: Sequence[Any], places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities ([rows, k] each, −inf where a row has fewer) of the k likeliest tokens at some places.

    A token of the text that is not among them is listed too, with its own rank: it belongs to the tail.
    """
    ids, log_p = np.zeros((len(places), k), np.int64), np.full((len(places), k), -math.inf)
    for row, place in enumerate(places):
        top = [(int(token), cell["logprob"]) for token, cell in tokens[place].items() if cell["rank"] <= k]
        if len(top) > k:  # where two are as likely, both may have the last rank
            top = sorted(top, key=lambda cell: -cell[1])[:k]
        ids[row, : len(top)], log_p[row, : len(top)] = [cell[0] for cell in top], [cell[1] for cell in top]
    return ids, log_p


def refuse_impossible(ids: np.ndarray, log_p: np.ndarray, vocab_size: int) -> None:
    """Raises UnbelievableError if rows ([rows, k]) cannot be log-probabilities of a model's likeliest tokens.

    None of the others is likelier than the last of the k, so that with them all probabilities must come to 1. Of
    matrices that are padded past the vocabulary, the widest is meant.
    """
    most_tokens = vocab_size + vocab_size // 64 + 1024
    if np.isnan(log_p).any():
        raise UnbelievableError("it gave NaN. A teacher in float16 often overflows: serve it in bfloat16.")
    if not np.isfinite(log_p).all():
        raise UnbelievableError(
            f"its prompt_logprobs have a row with fewer than the {log_p.shape[1]} likeliest tokens."
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < most_tokens:
        raise UnbelievableError(
            f"it names the token {ids.max() if ids.min() >= 0 else ids.min()}, and the student's tokenizer has "
            f"{vocab_size:,}."
        )
    p = np.exp(log_p.clip(max=1.0))
    sums, at_most = p.sum(-1), p.sum(-1) + (most_tokens - p.shape[1]) * p.min(-1, initial=1.0)
    if (sums > 1 + ROUNDING).any() or (at_most < 1 - ROUNDING).any():
        wrong = sums[(sums > 1 + ROUNDING) | (at_most < 1 - ROUNDING)]
        raise UnbelievableError(
            f"its prompt_logprobs are not the natural logarithms of a row's likeliest probabilities, which would come "
            f"to {wrong[0]:.3g} together. Are they logits (`--logprobs-mode`), or logarithms of another base?"
        )


def fit_to_vocabulary(ids: np.ndarray, log_p: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities over the student's vocabulary ([rows, k]; `ids` is changed in place), and of all else ([rows]).

    Raises:
        ValueError: a row of which the student's vocabulary has nothing.
    """
    padding = ids >= vocab_size
    if padding.any():
        lost = np.where(padding, np.exp(log_p), 0).sum(-1)
        order = np.argsort(padding, axis=-1, kind="stable")  # the first of a row must be there
        padding = np.take_along_axis(padding, order, -1)
        if padding[:, 0].any():
            raise ValueError(
                f"the teacher's likeliest tokens are all past the {vocab_size:,} of the student's tokenizer."
            )
        ids[:] = np.where(padding, 0, np.take_along_axis(ids, order, -1))
        log_p = np.where(padding, -np.inf, np.take_along_axis(log_p, order, -1) - np.log1p(-lost)[:, None])
    rest = 1 - np.exp(log_p).sum(-1)
    nothing = np.isfinite(log_p).sum(-1) == vocab_size
    with np.errstate(divide="ignore"):
        return log_p, np.log(np.where(nothing, 0, rest.clip(min=SMALLEST_TAIL)))
