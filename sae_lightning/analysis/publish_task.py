"""`task=publish`: uploads an SAE to the Hugging Face hub, with a model card."""

import html
import json
import os
import re
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae_lightning.analysis.model_card import write_card
from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.formats.fetch import HUB, fetch_saved, is_hub_address
from sae_lightning.formats.hub_errors import LOGIN
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saelens import CFG, OWN_KEY, WEIGHTS
from sae_lightning.formats.upload import has_token, is_private, upload_files
from sae_lightning.runs.folders import METRICS_FILE, read_json
from sae_lightning.runs.jobs import CONFIG_FILE, is_sweep
from sae_lightning.runs.untrusted_yaml import read_settings
from sae_lightning.terminal import console, format_command, make_grid

# Results of other tasks that are uploaded if they exist: numbers and the page.
RESULT_FILES = ("evaluate.json", "overview.json", "index.html")
# A path in a text: absolute or from the home folder (~), but not within a name, a web address or a
# special token. It has at least two parts: /data or [/INST] hides nothing.
PATH = re.compile(r"(?<![\w.:/~<|])~?(?:/[^\s,;'\"\])}/]+){2,}/?")


@dataclass(slots=True, kw_only=True)
class PublishTask(Task):
    """Upload the SAE, its settings and scores, and a model card to the Hugging Face hub."""

    repo: str | None = None
    """Repository on the hub to upload to, owner/name; it is created if it does not exist."""
    private: bool = True
    """Whether only you see the repository; if false, the task asks before files become public."""
    ask: bool = True
    """Ask on the terminal before files become public; false for scripts, which have no terminal."""
    licence: str | None = None
    """Licence of the SAE, by its name on the hub (mit, apache-2.0, cc-by-4.0, ...); a public
    repository needs one."""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo or ""):
            raise UserError(f"repo={self.repo}: give a repository on the hub, as repo=owner/name")
        if not self.private and not self.licence:
            raise UserError("private=false needs a licence: give licence=mit, or another one")

    def execute(self, given_settings: Collection[str]) -> None:
        self._check(given_settings)
        folder = fetch_saved(self.run)
        sae = load_sae(folder)
        files = collect_files(folder)
        if not is_hub_address(self.run):  # the hub's cache is made of links
            refuse_links(folder, files)
        settings = yaml.safe_load(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
        card = write_card(self.repo, sae, settings, read_results(folder), self.licence)
        files = {"README.md": card.encode()} | files
        sizes = {name: f"{measure_size(content):>13,} bytes" for name, content in files.items()}
        console.print(make_grid(sizes, f"\n  to {self.repo}:"), "")
        self._confirm()
        url = upload_files(self.repo, files, private=self.private)
        visibility = "private" if self.private else "public"
        opening = format_command("analyze.py", run=f"{HUB}{self.repo}")
        console.print(f"\n  published ({visibility}): {url}\n  open it: {opening}\n")

    def _check(self, given_settings: Collection[str]) -> None:
        """UserError if the command cannot succeed, before anything is read or uploaded."""
        allowed = {"run", "task", "repo", "private", "ask", "licence"}
        if others := sorted({*given_settings} - allowed):
            raise UserError(f"{others[0]} has no meaning for task=publish: leave it out")
        if is_sweep(Path(self.run)):
            raise UserError(
                f"run={self.run} holds a sweep: give one of the run folders in it, and each "
                "its own repository"
            )
        if not has_token():
            raise UserError(f"repo={self.repo}: you are not logged in at the hub; run: {LOGIN}")

    def _confirm(self) -> None:
        """UserError if the repository exists and is less or more visible than `private` says, or if
        the user does not agree to make files public."""
        repo_is_private = is_private(self.repo)
        if self.private and repo_is_private is False:  # None: it does not exist yet
            raise UserError(
                f"repo={self.repo} is public, so everybody would see these files: give another "
                "repository, or private=false"
            )
        if not self.private and repo_is_private:
            raise UserError(
                f"repo={self.repo} is private, and uploading does not change that: give "
                "private=true, and make it public in its settings on the hub"
            )
        if self.private or not self.ask:
            return
        if not sys.stdin.isatty():
            raise UserError(
                "private=false asks before anything becomes public, but there is no terminal: add "
                "ask=false"
            )
        answer = ""
        with suppress(EOFError):  # Ctrl-D
            answer = input(f"Everybody will see these files at {self.repo}. Go on? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("nothing was uploaded")


def collect_files(folder: Path) -> dict[str, bytes | Path]:
    """Collect the files to upload, {path in the repository: content or file}: the SAE and, of a run
    folder, its settings and results. Paths of this machine are replaced by their last part."""
    cfg_file = _find_file(folder, f"sae/{CFG}")
    cfg = json.loads(read_regular_file(cfg_file)) if cfg_file.is_file() else {}
    if OWN_KEY not in cfg:  # the SAE may need centring or scaling, which the card's code leaves out
        raise UserError(
            f"{folder} holds an SAE that another tool saved: write it with task=export "
            "format=saelens first, and publish that folder"
        )
    texts = {f"sae/{CFG}": json.dumps(hide_folders(cfg), indent=2)}
    folders = [str(folder.absolute()), str(Path.home())]
    paths = {*filter(is_path, folders)} | find_paths(cfg)
    if (folder / CONFIG_FILE).is_file():
        config = read_settings(folder / CONFIG_FILE)
        paths |= find_paths(config)
        texts[CONFIG_FILE] = yaml.safe_dump(hide_folders(config), sort_keys=False)
    results = [folder / METRICS_FILE, *(folder / "analysis" / name for name in RESULT_FILES)]
    for file in filter(Path.is_file, results):
        texts[file.relative_to(folder).as_posix()] = cut_paths(read_regular_file(file), paths)
    files = {f"sae/{WEIGHTS}": _find_file(folder, f"sae/{WEIGHTS}")}
    files |= {name: text.encode() for name, text in texts.items()}
    # data of a page that is too large for one file
    blocks = [file for file in folder.glob("analysis/index-*/*.js") if file.is_file()]
    return files | {file.relative_to(folder).as_posix(): file for file in sorted(blocks)}


def _find_file(folder: Path, name: str) -> Path:
    """The file that is called `name` in the repository; `folder` is a run's or its `sae/`."""
    return folder / (name if (folder / "sae").is_dir() else name.removeprefix("sae/"))


def refuse_links(folder: Path, names: Collection[str]) -> None:
    """UserError if one of the files in `folder` lies elsewhere: a link could lead to secrets."""
    for name in names:
        file = _find_file(folder, name)
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{file} is a symbolic link to a file elsewhere, which would be "
                "uploaded: put that file in its place"
            )


def read_results(folder: Path) -> dict[str, Any]:
    """Read the numbers for the model card, by task: `evaluate`, `theory` and `probe`, from the
    task's own results or else from the overview. If the SAE was not evaluated, `evaluate` holds the
    scores at the end of training. UserError if a file is damaged."""
    results = {}
    for name in ("overview", "theory", "probe", "evaluate"):
        if numbers := read_json(folder / "analysis" / f"{name}.json"):
            results |= numbers if name == "overview" else {name: numbers}
    if "evaluate" not in results and (metrics := read_json(folder / METRICS_FILE)):
        results["evaluate"] = metrics.get("held_out", {})
    return results


def hide_folders(value: Any) -> Any:
    """Replace every absolute path in `value`, settings of any depth, by its last part."""
    if isinstance(value, dict):
        return {key: hide_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.partition("=")  # an override such as data.path=/...
    if equals and is_path(path):
        return f"{name}={Path(path).name}"
    return Path(value).name if is_path(value) else PATH.sub(lambda m: Path(m[0]).name, value)


def is_path(text: str) -> bool:
    """Whether the whole text is an absolute path with folders to hide: a single part below the root
    (/data) has none."""
    return os.path.isabs(text) and len(Path(text).parts) > 2


def find_paths(value: Any) -> set[str]:
    """Find all absolute paths in `value`, settings of any depth."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return set().union(*map(find_paths, inner))
    if not isinstance(value, str):
        return set()
    path = value.partition("=")[2] or value  # an override such as data.path=/..., or a path
    return {path} if is_path(path) else {*PATH.findall(value)}


def cut_paths(text: str, paths: Collection[str]) -> str:
    """Replace `paths` in the text of a page or of JSON by their last parts."""
    # the longest first: a folder's path must not be cut out of the path of a file in it
    for path in sorted(paths, key=len, reverse=True):
        for spelling in {path, html.escape(path), json.dumps(path)[1:-1]}:  # without the quotes
            text = text.replace(spelling, Path(path).name)
    return text


def measure_size(content: bytes | Path) -> int:
    """Size in bytes of a file's content, or of the file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size
