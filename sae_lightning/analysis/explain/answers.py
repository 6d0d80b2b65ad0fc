"""Questions to a language model, at an endpoint or on this machine, each answered only once.

question -> cache on disk -> answer
              └ not there: model -> written down at once

A run that fails or is killed loses nothing that was answered; the same command goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from threading import Event
from typing import NamedTuple, Protocol

import platformdirs

from sae_lightning.errors import UserError
from sae_lightning.files import atomically
from sae_lightning.llm.generate import Reply, reply
from sae_lightning.llm.load import LLM


class Question(NamedTuple):
    """What a model is asked."""

    text: str
    tokens: int
    """Longest answer, in tokens."""


class Answerer(Protocol):
    """A model that answers questions."""

    name: str
    """What tells it from other models; a part of the cache's keys."""
    concurrency: int
    """Questions that it takes at a time."""

    def answer(self, question: Question, patient: bool = True) -> Reply:
        """UserError if there is none; `patient`: only after waiting for what may pass."""
        ...


class Local:
    """An LLM on this machine."""

    concurrency = 1

    def __init__(self, llm: LLM):
        self.llm = llm
        *_, last = llm.model.parameters()
        weights = hashlib.sha256(last.float().cpu().numpy().tobytes()).hexdigest()[:16]
        self.name = f"local {llm.name} {weights}"  # a folder may be trained on

    def answer(self, question: Question, patient: bool = True) -> Reply:
        return reply(self.llm, *question)


class Spent(NamedTuple):
    """What questions have cost so far."""

    requests: int = 0
    """Questions that went to the model."""
    tokens_in: int = 0
    tokens_out: int = 0


PROBE = Question("Answer with the word yes.", 16)


class Answers:
    """Answers of one model, kept in `folder` (in the user's cache, unless given)."""

    def __init__(self, model: Answerer, folder: Path | None = None):
        self.model = model
        self.folder = folder or platformdirs.user_cache_path("sae_lightning") / "answers"
        self.spent = Spent()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if not os.access(self.folder, os.W_OK):
            raise self._unwritable("no permission")

    def check(self) -> None:
        """UserError if the model does not answer; costs a few tokens, the first time."""
        if self.known(PROBE) is None:
            self._keep(PROBE, self.model.answer(PROBE, patient=False))

    def known(self, question: Question) -> Reply | None:
        """The answer that is in the cache."""
        try:
            return Reply(**json.loads(self._file(question).read_text("utf8")))
        except (OSError, ValueError, TypeError):
            return None

    def ask(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None
    ) -> list[str]:
        """An answer to each question; `advance` is called with the number just answered."""
        wanted = dict.fromkeys(questions)
        found = {question: self.known(question) for question in wanted}
        open_ones = [question for question, known in found.items() if known is None]
        advance(len(questions) - len(open_ones))
        found |= self._asked(open_ones, advance)
        return [found[question].text for question in questions]

    def _asked(
        self, questions: list[Question], advance: Callable[[int], None]
    ) -> dict[Question, Reply]:
        """Replies of the model, written down one by one; those in flight too if one fails."""
        found: dict[Question, Reply] = {}
        halted = Event()

        def answer(question: Question) -> Reply | None:
            if halted.is_set():
                return None
            try:
                return self.model.answer(question)
            except BaseException:
                halted.set()  # here, so that this thread does not take up the next one
                raise

        with ThreadPoolExecutor(self.model.concurrency) as pool:
            futures = {pool.submit(answer, question): question for question in questions}

            def take(future: Future) -> None:
                question, given = futures[future], future.result()
                if given is not None and question not in found:
                    found[question] = given
                    self._keep(question, given)
                    advance(1)

            try:
                for future in as_completed(futures):
                    take(future)
            except BaseException as error:
                halted.set()
                wait(futures)  # what is in flight may be paid for already
                for future in futures:
                    if future.exception() is None:
                        take(future)
                if isinstance(error, UserError) and found:
                    raise UserError(
                        f"{error}; {len(found)} of {len(questions)} answers are kept, and the same "
                        "command goes on from there"
                    ) from None
                raise
        return found

    def _keep(self, question: Question, answer: Reply) -> None:
        self.spent = Spent(
            self.spent.requests + 1,
            self.spent.tokens_in + answer.tokens_in,
            self.spent.tokens_out + answer.tokens_out,
        )
        try:
            with atomically(self._file(question)) as temporary:
                temporary.write_text(json.dumps(answer._asdict()), encoding="utf8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _file(self, question: Question) -> Path:
        content = json.dumps([self.model.name, *question])
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"

    def _unwritable(self, why: object) -> UserError:
        reason = getattr(why, "strerror", None) or why
        return UserError(
            f"answers cannot be kept in {self.folder} ({reason}); set XDG_CACHE_HOME to a folder "
            "that can be written"
        )
