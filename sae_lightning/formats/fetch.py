"""Downloads SAEs from the Hugging Face hub into the hub's cache: only the files that are needed."""

import math
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sae_lightning.errors import UserError
from sae_lightning.formats.hub_errors import LONGEST_WAIT, convert_hub_errors, read_wait
from sae_lightning.formats.suites import choose_path, expand_suite
from sae_lightning.formats.table import FORMATS, find_saes
from sae_lightning.terminal import console, phase

HUB = "hub:"
MAIN = "main"  # the default revision
COMMIT = re.compile("[0-9a-f]{40}")
RUN_CONFIG = "config.yaml"  # settings of a run, published with its SAE
ANSWER_TIMEOUT = 10.0  # seconds for a first answer, before a cached copy is used
ATTEMPTS = 3  # tries of each request or download
MB = 1e6


class HubAddress(NamedTuple):
    """A parsed address of files on the hub."""

    repo: str
    """owner/name"""
    paths: tuple[str, ...]
    """Folders or files in the repository, of which the first that exists is used (see
    `suites.choose_path`); an empty path is the whole repository."""
    revision: str
    """A branch, tag or commit."""

    @property
    def is_choice(self) -> bool:
        """Whether the files on the hub decide which path is used."""
        return len(self.paths) > 1 or "*" in self.paths[0]


def is_hub_address(address: str | os.PathLike) -> bool:
    """Whether `address` is on the hub (`hub:...`), not a local path."""
    return str(address).startswith(HUB)


def parse_address(address: str) -> HubAddress:
    """Parse `hub:<owner>/<name>[/<path>][@<revision>]` or `hub:<suite>/<parts>[@<revision>]`;
    UserError if it is neither."""
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)((?:/[^/@*]+)*)/?(?:@([^@]+))?", address)
    name = match[1] + match[2] if match else address.removeprefix(HUB)
    suite = expand_suite(name.partition("@")[0])  # first: its errors are more specific
    if not match or {".", ".."} & set(re.split("[/@]", address)):
        raise UserError(f"{address}: write hub:<owner>/<name>[/<path>][@<revision>]")
    repo, paths = suite or (match[1], (match[2].removeprefix("/"),))
    return HubAddress(repo, paths, match[3] or MAIN)


def name_hub_folder(address: str) -> Path:
    """The folder, below the working folder, where results on the SAE at a hub address are written:
    hub/<owner>--<name>[@<revision>]/<path>."""
    name, at, revision = address.removeprefix(HUB).partition("@")
    owner, repo, *path = name.strip("/").split("/")
    return Path("hub", f"{owner}--{repo}{at}{revision.replace('/', '--')}", *path)


def fetch_saved(address: str | os.PathLike) -> Path:
    """Return the local folder or file for `address`. A path is returned as it is; for `hub:...`,
    the files that are needed to open the SAE are downloaded, and their path in the cache returned.

    Files in the cache are not downloaded again; without a connection they are used as they are.
    UserError if files can be neither downloaded nor found in the cache.
    """
    if not is_hub_address(address):
        return Path(address)
    address = str(address)
    parsed = parse_address(address)
    with convert_hub_errors(address, parsed.repo, parsed.revision):
        commit = _find_commit(parsed)
        if commit is None:
            return _find_cached(parsed, _read_cached_commit(parsed))
        # what a branch or tag stands for may have changed, but a commit never changes
        if commit == parsed.revision and (cached := _find_cached(parsed, commit)):
            return cached
        path = _choose_on_hub(address, parsed, commit)
        sizes = _choose_files(address, parsed, path, _list_sizes(parsed, path, commit))
        _download(address, parsed.repo, commit, sizes)
        if commit != parsed.revision:
            _record_commit(parsed, commit)
        return _locate_cache(parsed) / "snapshots" / commit / path


def _find_commit(parsed: HubAddress) -> str | None:
    """The commit that the revision stands for; None if the hub cannot answer now and a cached
    copy of the files can be used instead."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if COMMIT.fullmatch(parsed.revision):
        return parsed.revision
    settings = {"revision": parsed.revision, "expand": ["sha"], "timeout": ANSWER_TIMEOUT}
    try:
        return _retry(HfApi().model_info, parsed.repo, **settings).sha
    except (HTTPError, OfflineModeIsEnabled) as error:
        # below 429 (too many requests), the answer is final: no such repository, or no access to it
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 429
        if refused or _find_cached(parsed, _read_cached_commit(parsed)) is None:
            raise
        return None


def _retry(call: Callable, *arguments: Any, **settings: Any) -> Any:
    """Call a method of huggingface_hub that does not retry by itself; after status 429 (too many
    requests), wait for as long as the hub asks and call it again."""
    from huggingface_hub.errors import HfHubHTTPError

    for _ in range(ATTEMPTS - 1):  # the last attempt, below, raises any error
        try:
            return call(*arguments, **settings)
        except HfHubHTTPError as error:
            wait = read_wait(error.response)
            if error.response.status_code != 429 or wait is None or wait > LONGEST_WAIT:
                raise
            time.sleep(wait)
    return call(*arguments, **settings)


def _choose_on_hub(address: str, parsed: HubAddress, commit: str) -> str:
    """The path of the address; of several, the first that exists. UserError if none does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    def list_folder(folder: str) -> list[str]:
        with suppress(EntryNotFoundError):
            entries = HfApi().list_repo_tree(parsed.repo, folder, revision=commit)
            return [entry.path for entry in entries]
        return []

    if not parsed.is_choice:
        return parsed.paths[0]
    if (path := choose_path(parsed.paths, list_folder)) is None:
        raise UserError(f"{address}: {parsed.repo} has no {' and no '.join(parsed.paths)}")
    console.print(f"{address} is {HUB}{parsed.repo}/{path}")
    return path


def _list_sizes(parsed: HubAddress, path: str, commit: str) -> dict[str, int]:
    """Path -> bytes of the files in the folder `path`, or beside the file `path`, and of settings
    in the folders above; UserError if there is no such path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, folder, settings_above = HfApi(), path, []
    if path:
        paths = [path, *_list_settings_above(path)]
        entries = _retry(api.get_paths_info, parsed.repo, paths, revision=commit)
        at_path = [entry for entry in entries if entry.path == path]
        settings_above = [entry for entry in entries if entry.path != path]
        if not at_path:
            raise UserError(
                f"{HUB}{parsed.repo}/{path}: {parsed.repo} has no such file or folder at revision "
                f"{parsed.revision}; leave out the last part of the path for a list"
            )
        if isinstance(at_path[0], RepoFile):
            folder = str(PurePosixPath(path).parent).removeprefix(".")  # "" at the top
    tree = api.list_repo_tree(parsed.repo, folder or None, recursive=True, revision=commit)
    entries = (*tree, *settings_above)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _list_settings_above(path: str) -> list[str]:
    """List the optional settings that a format may read from the folder above the SAE's; `path` is
    the SAE's folder or a file in it."""
    patterns = [p for entry in FORMATS.values() for p in entry.optional if p.startswith("../")]
    folders = (path, str(PurePosixPath(path).parent))
    names = {posixpath.normpath(f"{folder}/{p}") for folder in folders for p in patterns}
    return sorted(name for name in names if not name.startswith(".."))


def _choose_files(
    address: str, parsed: HubAddress, path: str, sizes: dict[str, int]
) -> dict[str, int]:
    """Path -> bytes of the files that are needed; UserError unless there is exactly one SAE."""
    if needed := _find_needed(path, sizes):
        return {name: sizes[name] for name in needed}
    parents = {str(folder) for name in sizes for folder in PurePosixPath(name).parents}
    paths = []  # of each SAE, the folder or the weights file
    for folder in sorted(parents):
        saes = find_saes(folder, sizes)
        paths += [folder] if len(saes) == 1 else [sae.weights for sae in saes]
    if not paths:
        raise UserError(f"{address} holds no saved SAE that can be read; see docs/hub.md")
    more = f" ({len(paths):,} in all)" if len(paths) > 3 else ""
    revision = "" if parsed.revision == MAIN else f"@{parsed.revision}"
    choices = ", ".join(f"{HUB}{parsed.repo}/{path}{revision}" for path in paths[:3])
    raise UserError(f"{address} holds several SAEs: give one of {choices}{more}")


def _find_needed(path: str, names: Iterable[str]) -> list[str]:
    """List the files that are needed to open the SAE at `path`, a folder or a file; an
    empty list unless there is exactly one SAE."""
    names = {*names}
    saes = find_saes(path, names)
    if len(saes) != 1:
        return []
    folder = PurePosixPath(path).parent if path in names else PurePosixPath(path)
    config = [str(folder / RUN_CONFIG)] if str(folder / RUN_CONFIG) in names else []
    # weights last: an interrupted download lacks them, and is then not taken for an SAE
    return [*saes[0].others, *config, saes[0].weights]


def _download(address: str, repo: str, commit: str, sizes: dict[str, int]) -> None:
    """Download the files that the cache lacks, with a progress bar."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    missing = [
        name
        for name in sizes
        if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    ]
    if not missing:
        return
    total = sum(sizes[name] for name in missing)
    with phase(f"downloading {address} (MB)", math.ceil(total / MB)) as advance:
        for name in missing:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    hf_hub_download(repo, name, revision=commit, tqdm_class=_make_bar(advance))
                    break
                except HTTPError as error:
                    # an HfHubHTTPError is an answer of the hub; after a lost connection, try again
                    if isinstance(error, HfHubHTTPError) or attempt == ATTEMPTS:
                        raise


def _make_bar(advance: Callable[[float], None]) -> type:
    """A class with the methods of tqdm that huggingface_hub calls, which advances our own bar."""

    class Bar:
        def __init__(self, **settings):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n: int = 1) -> None:
            advance(n / MB)

        def ignore(self, *arguments, **settings) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = close = refresh = ignore

    return Bar


def _locate_cache(parsed: HubAddress) -> Path:
    """The folder of a repository in the cache: refs/<revision> holds a commit, snapshots/<commit>
    the files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, "models--" + parsed.repo.replace("/", "--"))


def _read_cached_commit(parsed: HubAddress) -> str | None:
    """The commit that a branch or tag stood for at the last download; None if there was none."""
    file = _locate_cache(parsed) / "refs" / parsed.revision
    return file.read_text() if file.is_file() else None


def _record_commit(parsed: HubAddress, commit: str) -> None:
    """Record the commit of a branch or tag, once its files are in the cache."""
    file = _locate_cache(parsed) / "refs" / parsed.revision
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(commit)


def _find_cached(parsed: HubAddress, commit: str | None) -> Path | None:
    """Find the folder or file of the address in the cache; None unless it holds an SAE."""
    if commit is None:
        return None
    root = _locate_cache(parsed) / "snapshots" / commit
    names = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    paths = names + [str(p) for name in names for p in PurePosixPath(name).parents]

    def list_folder(folder: str) -> list[str]:
        return [path for path in paths if str(PurePosixPath(path).parent) == folder]

    path = choose_path(parsed.paths, list_folder) if parsed.is_choice else parsed.paths[0]
    return root / path if path is not None and _find_needed(path, names) else None
