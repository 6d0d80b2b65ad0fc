"""Uploads files to a repository on the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path

from sae_lightning.formats.hub_errors import convert_hub_errors
from sae_lightning.terminal import console


def has_token() -> bool:
    """Whether this user is logged in at the hub; the token itself is not kept."""
    from huggingface_hub import get_token

    return bool(get_token())


def is_private(repo: str) -> bool | None:
    """Whether the repository `owner/name` is private; None if the user can see no such
    repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with convert_hub_errors(f"repo={repo}", repo):
        try:
            return HfApi().model_info(repo).private
        except RepositoryNotFoundError:
            return None


def upload_files(repo: str, files: Mapping[str, bytes | Path], *, private: bool) -> str:
    """Upload files (path in the repository -> content or local file) in one commit, to a new
    repository if there is none; returns its address on the web."""
    from huggingface_hub import CommitOperationAdd, HfApi

    console.print(f"uploading to {repo}")
    # only huggingface_hub's bar knows how many bytes are sent
    with convert_hub_errors(f"repo={repo}", repo, keep_bars=console.is_terminal):
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(repo, operations, commit_message="Upload an SAE with sae_lightning")
    return str(url)
