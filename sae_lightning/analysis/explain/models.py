"""Models that answer questions: on this machine, or behind a server that speaks OpenAI's API."""

import hashlib
import logging
from typing import NamedTuple

from sae_lightning.analysis.explain.key import DEFAULT_KEY_ENV, censor, check_url, read_key
from sae_lightning.errors import UserError
from sae_lightning.llm.generate import Reply, reply
from sae_lightning.llm.load import LLM, LLMConfig, load_llm

TIMEOUT = 120  # seconds that an endpoint may take for an answer


class Question(NamedTuple):
    """A prompt, and how long the answer may be."""

    text: str
    tokens: int
    """Most tokens of the answer."""


class ChatModel:
    """A model that answers questions."""

    name: str
    """Identifies the model in the cache of answers."""
    key: str
    """Secret that no answer or message may quote; empty if there is none."""
    concurrency: int
    """Questions that may be in flight at a time."""

    def complete(self, question: Question, patient: bool = True) -> Reply:
        """The answer, at temperature 0 if the model accepts that; UserError if there is none. If
        not `patient`, an endpoint gives up after 2 tries."""
        raise NotImplementedError


class LocalModel(ChatModel):
    """An LLM on this machine, identified by its name and a hash of its last parameter tensor."""

    concurrency, key = 1, ""

    def __init__(self, llm: LLM):
        self.llm = llm
        last = [*llm.model.parameters()][-1]  # hashing all parameters would take long
        weights_hash = hashlib.sha256(last.float().cpu().numpy().tobytes()).hexdigest()[:16]
        self.name = f"local {llm.name} {weights_hash}"  # the weights in a folder may change

    def complete(self, question: Question, patient: bool = True) -> Reply:
        return reply(self.llm, *question)


class Endpoint(ChatModel):
    """The model `model` of a server (OpenAI, vLLM, llama.cpp, ...) at an address such as
    http://localhost:8000/v1.

    The key is read from the environment variable `key_env`, if that is set; it is sent to this
    address only, and only encrypted or within this machine. After a rate limit, server error,
    timeout or lost connection, a request is retried up to `retries` times.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str | None = DEFAULT_KEY_ENV,
        *,
        concurrency: int = 8,
        retries: int = 10,
    ):
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"endpoint={url}: needs the client of OpenAI's protocol; install it with: "
                'pip install -c constraints.txt -e ".[explain]"'
            ) from error
        self.url, self.model, self.key_env, self.concurrency = url, model, key_env, concurrency
        self.name, self.key = f"{url} {model}", read_key(key_env)
        is_local = check_url(url, self.key)
        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # old and new versions
            # otherwise hydra.verbose=true would log headers, which hold the key
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = openai.OpenAI(
            api_key=self.key or "none",
            base_url=url,
            max_retries=retries,
            timeout=TIMEOUT,
            # no redirects, and no proxy to a local server, which may get the key unencrypted
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not is_local),
        )
        # `complete` changes both for a reasoning model, which calls the limit on tokens
        # max_completion_tokens and accepts no temperature
        self._limit_name, self._settings = "max_tokens", {"temperature": 0}

    def complete(self, question: Question, patient: bool = True) -> Reply:
        import openai

        client = self._client if patient else self._client.with_options(max_retries=1)
        while True:
            # read once, because another thread may change the attributes
            limit_name, settings = self._limit_name, self._settings
            try:
                completion = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question.text}],
                    **{limit_name: question.tokens},
                    **settings,
                )
            except (openai.OpenAIError, ValueError) as error:  # ValueError: not JSON
                refusal = str(error) if isinstance(error, openai.BadRequestError) else ""
                if "max_completion_tokens" in refusal and limit_name == "max_tokens":
                    self._limit_name = "max_completion_tokens"
                elif "temperature" in refusal and settings:
                    self._settings = {}
                else:
                    raise self._make_error(error) from None  # the client's error may hold the key
            else:
                break
        try:
            usage, text = completion.usage, completion.choices[0].message.content
            counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
            tokens_in, tokens_out = (int(count or 0) for count in counts)
            # the text is None if reasoning took all tokens
            return Reply(str(text or ""), tokens_in, tokens_out)
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            raise self._make_error(ValueError("does not answer as OpenAI's API does")) from None

    def _make_error(self, error: Exception) -> UserError:
        """A UserError with the client's message, the key removed from it, and a remedy."""
        import openai

        message = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        message = censor(message, self.key)[:200].rstrip(".")
        setting = f"endpoint={self.url}"
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError() if self.key:
                remedy = f"check the key in {self.key_env}"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                setting += f", key_env={self.key_env or 'null'}"
                name = self.key_env or DEFAULT_KEY_ENV
                remedy = f"put a key into the environment variable {name}, or name another one"
            case openai.NotFoundError():
                setting += f", explainer={self.model}"
                remedy = f"check both; its models are {self._list_models()}"
            case openai.RateLimitError():
                remedy = "lower concurrency, or try later"
            case openai.APIConnectionError():  # timeouts too
                remedy = "check the address, and that the server runs"
            case openai.InternalServerError():
                remedy = "try later"
            case openai.APIStatusError() if 300 <= error.status_code < 400:
                remedy = "it redirects requests; if you trust the new address, give that one"
            case openai.APIStatusError():
                remedy = "if the question is too long, lower together=... or examples=..."
            case _:
                remedy = "check the address, which usually ends in /v1"
        return UserError(censor(f"{setting}: {message}; {remedy}", self.key))

    def _list_models(self) -> str:
        try:
            names = [str(model.id) for model in self._client.models.list()]
        except Exception:  # not every server lists its models
            return "not listed"
        names = [*names[:8], "..."] if len(names) > 8 else names
        return ", ".join(names) or "none"


def open_model(
    endpoint: str | None,
    model: str | None,
    key_env: str | None = DEFAULT_KEY_ENV,
    concurrency: int = 8,
) -> ChatModel | None:
    """The model at an endpoint, or a local one; None if `model` is None. UserError if the address
    is invalid or the local model cannot be loaded."""
    if model is None:
        return None
    if endpoint is not None:
        return Endpoint(endpoint, model, key_env, concurrency=concurrency)
    try:
        return LocalModel(load_llm(LLMConfig(name=model)))
    except UserError as error:
        raise UserError(str(error).replace("llm.name=", "explainer=")) from error
