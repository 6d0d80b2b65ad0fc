"""A model behind any server that speaks OpenAI's chat completions: hosted, vLLM, llama.cpp, ..."""

import ipaddress
import os
from urllib.parse import urlsplit

from sae_lightning.analysis.explain.answers import Question
from sae_lightning.errors import UserError
from sae_lightning.llm.generate import Reply

CUSTOMARY_KEY = "OPENAI_API_KEY"


class Endpoint:
    """Model `model` of the server at `url`, such as http://localhost:8000/v1.

    The key is what the environment variable `key_env` holds, if it is set. What may pass (rate
    limits, failures of the server, timeouts, lost connections) is tried `retries` times more, with
    growing pauses.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str | None = CUSTOMARY_KEY,
        *,
        concurrency: int = 8,
        retries: int = 10,
        timeout: float = 120.0,
    ):
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"endpoint={url}: needs the client of OpenAI's protocol; install it with: "
                'pip install -c constraints.txt -e ".[explain]"'
            ) from error
        host = _host(url)
        self.url, self.model, self.key_env = url, model, key_env
        self.concurrency, self.timeout = concurrency, timeout
        self.name = f"{url} {model}"
        self._key = os.environ.get(key_env, "").strip() if key_env else ""
        if self._key and key_env == CUSTOMARY_KEY and url.startswith("http:") and not _here(host):
            raise UserError(
                f"endpoint={url}: would get the key in {CUSTOMARY_KEY} unencrypted; use https, "
                "key_env=null to send none, or key_env=NAME for this server's own"
            )
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=url, max_retries=retries, timeout=timeout
        )
        # reasoning models take another name for the limit, and no temperature
        self._limit, self._settings = "max_tokens", {"temperature": 0}

    def answer(self, question: Question, patient: bool = True) -> Reply:
        """What the model says, at temperature 0; UserError if it does not answer."""
        import openai

        client = self._client if patient else self._client.with_options(max_retries=1)
        while True:
            try:
                completion = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question.text}],
                    **{self._limit: question.tokens},
                    **self._settings,
                )
            except openai.BadRequestError as error:
                if not self._adapted(str(error)):
                    raise self._explained(error, client.max_retries + 1) from None
            except (openai.OpenAIError, ValueError) as error:  # ValueError: what came is no JSON
                raise self._explained(error, client.max_retries + 1) from None
            else:
                return self._reply(completion)

    def _adapted(self, refusal: str) -> bool:
        """Whether the server refused a parameter that can be put otherwise."""
        if "max_completion_tokens" in refusal and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"
            return True
        if "temperature" in refusal and self._settings:
            self._settings = {}
            return True
        return False

    def _reply(self, completion) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            raise UserError(
                f"endpoint={self.url}: does not answer as OpenAI's API does; check the address, "
                "which usually ends in /v1"
            )
        usage = completion.usage
        return Reply(
            choices[0].message.content or "",  # None where reasoning took up all tokens
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )

    def _explained(self, error: Exception, tries: int) -> UserError:
        """One line for what the client raised, without the key that some servers quote."""
        import openai

        endpoint, said = f"endpoint={self.url}", self._said(error)
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError() if self._key:
                return UserError(f"{endpoint}: refused the key in {self.key_env} ({said})")
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                name = self.key_env or CUSTOMARY_KEY
                return UserError(
                    f"key_env={self.key_env or 'null'}: {self.url} asks for a key; put it into the "
                    f"environment variable {name}, or name the one that holds it"
                )
            case openai.NotFoundError():
                return UserError(f"explainer={self.model}: {self._missing()} ({said})")
            case openai.RateLimitError():
                return UserError(
                    f"{endpoint}: over its rate limit or quota, in {tries} tries ({said}); "
                    "lower concurrency, or try later"
                )
            case openai.APITimeoutError():
                return UserError(
                    f"{endpoint}: no answer within {self.timeout:g} s in {tries} tries; lower "
                    "concurrency, or see whether the server is alive"
                )
            case openai.APIConnectionError():
                return UserError(
                    f"{endpoint}: cannot be reached in {tries} tries ({said}); check the "
                    "address, and that the server runs"
                )
            case openai.InternalServerError():
                return UserError(f"{endpoint}: failed in {tries} tries ({said}); try later")
            case _:
                return UserError(f"{endpoint}: does not take the question ({said})")

    def _missing(self) -> str:
        """What a 404 means."""
        try:
            names = [model.id for model in self._client.models.list()]
        except Exception:  # not every server lists its models
            return f"{self.url} has no such model, or no /chat/completions; check both"
        some = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
        return f"{self.url} has no such model; it has {some or 'none'}"

    def _said(self, error: Exception) -> str:
        text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        return (text.replace(self._key, "***") if self._key else text)[:200].rstrip(".")


def _host(url: str) -> str:
    """The host of a web address; UserError if it is none."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        # not quoted: it may be a secret
        raise UserError(
            "endpoint: the address holds a user name, a password or a query; put the key into an "
            "environment variable and give its name as key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"endpoint={url}: give a web address such as http://localhost:8000/v1 or "
            "https://api.openai.com/v1"
        )
    return parts.hostname


def _here(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
