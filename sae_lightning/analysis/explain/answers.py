"""Answers of a language model to questions. It is asked each question only once.

    question -> cache on disk -> answer
                  └ not there: model -> answer, cached immediately

So after a command that fails or is killed, the same command asks only the questions that are left.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Lock
from typing import NamedTuple

import platformdirs

from sae_lightning.analysis.explain.key import censor
from sae_lightning.analysis.explain.models import ChatModel, Question
from sae_lightning.errors import UserError, WriteError
from sae_lightning.files import find_system_error, remove_leftovers, write_atomically
from sae_lightning.llm.generate import Reply

TEST_QUESTION = Question("Answer with the word yes.", 16)  # asked to see whether a model answers


class Cost(NamedTuple):
    """Requests and tokens, spent or estimated, for the questions that the cache does not answer."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def check_budget(self, budget: int | None) -> None:
        """UserError if the tokens, in and out together, exceed `budget`."""
        tokens = self.tokens_in + self.tokens_out
        if budget is not None and tokens > budget:
            raise UserError(
                f"budget={budget}: this may take {tokens:,} tokens ({self}); explain fewer "
                "features, lower scored, or raise the budget"
            )

    def __str__(self) -> str:
        if not self.requests:
            return "every answer is in the cache: nothing to pay"
        return (
            f"{self.requests:,} requests, up to {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out"
        )


class Answers:
    """Answers of one model, cached in `folder` (by default in the user's cache folder). UserError
    if the folder cannot be written to."""

    def __init__(self, model: ChatModel, folder: Path | None = None):
        self.model = model
        self.folder = folder or platformdirs.user_cache_path("sae_lightning") / "answers"
        self.spent = Cost()  # of the questions that this object has sent to the model
        self._lock = Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()
            remove_leftovers(self.folder)
        except OSError as error:
            raise self._make_error(error) from error

    def check_model(self) -> None:
        """UserError if the model does not answer; costs a few tokens, the first time."""
        if self.read_cached(TEST_QUESTION) is None:
            self._cache(TEST_QUESTION, self.model.complete(TEST_QUESTION, patient=False))

    def read_cached(self, question: Question) -> Reply | None:
        """Read the cached answer to a question; None if there is none."""
        try:
            reply = Reply(**json.loads(self._find_file(question).read_text("utf8")))
            cleaned = self._remove_key(reply)
        except (OSError, ValueError, TypeError):
            return None
        if cleaned != reply:  # cached before this key was set
            self._write(question, cleaned)
        return cleaned

    def ask(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None
    ) -> list[str]:
        """The answer to each question. `advance` is called with a number of questions as soon as
        they are answered. UserError if the model stops answering."""
        replies = {question: self.read_cached(question) for question in questions}
        missing = [question for question, reply in replies.items() if reply is None]
        advance(len(questions) - len(missing))
        requests_before, stopped = self.spent.requests, Event()

        def answer(question: Question) -> Reply | None:
            if stopped.is_set():
                return None
            try:
                return self._cache(question, self.model.complete(question))
            except BaseException:
                stopped.set()  # before this thread takes the next question
                raise

        try:
            # waits for all threads: a request in flight may be paid for already
            with ThreadPoolExecutor(self.model.concurrency) as pool:
                futures = {pool.submit(answer, question): question for question in missing}
                try:
                    for future in as_completed(futures):
                        replies[futures[future]] = future.result()
                        advance(1)
                finally:  # KeyboardInterrupt, for example
                    stopped.set()
        except UserError as error:
            if kept := self.spent.requests - requests_before:
                raise UserError(
                    f"{error}; {kept} of {len(missing)} answers are kept, and the same command "
                    "goes on from there"
                ) from None
            raise
        return [replies[question].text for question in questions]

    def _cache(self, question: Question, reply: Reply) -> Reply:
        """Cache a new reply, add its cost to `spent`, and return the reply without the key."""
        reply = self._remove_key(reply)
        self._write(question, reply)
        with self._lock:
            added = (1, reply.tokens_in, reply.tokens_out)
            self.spent = Cost(*(a + b for a, b in zip(self.spent, added, strict=True)))
        return reply

    def _remove_key(self, reply: Reply) -> Reply:
        """Remove the key, which some servers quote, from a reply."""
        return reply._replace(text=censor(reply.text, self.model.key))

    def _write(self, question: Question, reply: Reply) -> None:
        try:
            with write_atomically(self._find_file(question)) as temporary:
                temporary.write_text(json.dumps(reply._asdict()), encoding="utf8")
        except WriteError as error:
            raise self._make_error(error) from error

    def _find_file(self, question: Question) -> Path:
        content = json.dumps([self.model.name, *question])
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"

    def _make_error(self, error: Exception) -> UserError:
        return UserError(
            f"answers cannot be kept in {self.folder} ({find_system_error(error)}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        )
