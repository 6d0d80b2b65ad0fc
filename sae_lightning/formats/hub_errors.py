"""Turns errors of the hub into one line with reason and remedy."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from sae_lightning.errors import UserError, list_causes
from sae_lightning.llm.quiet import mute_libraries

LOGIN = "hf auth login"
LONGEST_WAIT = 60.0  # seconds; the client itself would wait for hours if the hub asks it to


@contextmanager
def convert_hub_errors(
    address: str, repo: str, revision: str = "main", keep_bars: bool = False
) -> Iterator[None]:
    """Mute huggingface_hub (its bars, too, unless `keep_bars`), and raise its errors as a UserError
    that begins with `address`."""
    from huggingface_hub.errors import HTTPError

    try:
        with mute_libraries(keep_bars), _limit_waiting(address):
            yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if (reason := explain_hub_error(error, repo, revision)) is None:
            raise
        raise UserError(f"{address}: {reason}") from error


def explain_hub_error(error: Exception, repo: str, revision: str) -> str | None:
    """The reason and the remedy; None for an error that is not the hub's, such as a full disk."""
    from huggingface_hub import constants, errors

    causes = list_causes(error)
    classes = {base for cause in causes for base in type(cause).__mro__}
    if errors.OfflineModeIsEnabled in classes:
        return "HF_HUB_OFFLINE=1 forbids requests, and there is no copy in the cache; unset it"
    if errors.GatedRepoError in classes:
        page = f"{constants.ENDPOINT}/{repo}"
        return f"gated; accept its terms at {page}, then log in: {LOGIN}"
    if errors.RevisionNotFoundError in classes:
        return f"{repo} has no revision {revision}; give a branch, a tag or a commit after @"
    if errors.RepositoryNotFoundError in classes:
        return (
            f"there is no repository {repo}, or it is private; check the name, or log in: {LOGIN}"
        )
    # LocalEntryNotFoundError, a subclass, means that there is no connection and no copy
    if errors.EntryNotFoundError in classes and errors.LocalEntryNotFoundError not in classes:
        return f"no such file; see {constants.ENDPOINT}/{repo}/tree/{revision}"
    if errors.HFValidationError in classes:
        return f"{repo} is not the name of a repository; write owner/name"
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return _explain_status(cause.response)
    if any("Consistency check failed" in str(cause) for cause in causes):
        return "the download ended early, and nothing was kept; run the same command again"
    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return None
    if match := re.search(r"Invalid metadata in README.md\W*([^\n]*)", str(error)):
        return f"the hub refuses the head of the model card ({match[1]:.200}); check licence=..."
    if {JSONDecodeError, errors.FileMetadataError} & classes:
        return f"{constants.ENDPOINT} does not answer as a hub does; is a login page in between?"
    if {errors.HTTPError, RuntimeError} & classes:  # hf_xet raises the latter
        name = type(causes[0]).__name__
        return f"no connection to {constants.ENDPOINT}, or it broke off ({name}); try again"
    return None


def _explain_status(response) -> str:
    """The meaning of the hub's HTTP status, and the remedy."""
    status = response.status_code
    if status == 401:
        return f"the hub refuses your token (401); log in again: {LOGIN}"
    if status == 403:
        return f"your token may not do this (403); log in with one that may: {LOGIN}"
    if status == 429:
        wait = read_wait(response)
        when = f"in {wait:.0f} s" if wait else "later"
        return f"too many requests (429); try again {when}, or log in for more: {LOGIN}"
    return f"the hub answers {status}; try again later"


def read_wait(response) -> float | None:
    """Seconds that a response asks to wait before the next request; None if it does not say."""
    # ratelimit: "..."; r=0;t=55  (no request left for 55 s)
    if match := re.search(r"\br=0;t=(\d+)", response.headers.get("ratelimit", "").replace(" ", "")):
        return float(match[1])
    text = response.headers.get("retry-after", "").strip()
    return float(text) if text.isdigit() else None


@contextmanager
def _limit_waiting(address: str) -> Iterator[None]:
    """Raise a UserError where the hub asks to wait longer than LONGEST_WAIT."""
    from huggingface_hub.utils import get_session

    def refuse_long_wait(response) -> None:
        if response.status_code == 429 and (read_wait(response) or 0) > LONGEST_WAIT:
            raise UserError(f"{address}: {_explain_status(response)}")

    hooks = get_session().event_hooks["response"]
    hooks.append(refuse_long_wait)
    try:
        yield
    finally:
        hooks.remove(refuse_long_wait)
