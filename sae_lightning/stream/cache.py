"""The activation cache: rows from disk where they are there, else from the LLM and on to disk.

LLM batches    0 . . . . . 6 . . . . . 12 . . . . . 18 . . . . . 24 . .
shards         | 00000000  | 00000006  |            | 00000018  |
a run          read        read        LLM, write   read        LLM, write

What is kept is what the LLM gives, before the pool: batch, pool and length of a run change nothing
in it, and the batches that training sees are the same bit for bit with and without a cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.files import free_space
from sae_lightning.stream.base import Rows
from sae_lightning.stream.draft import Draft
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shards import IDS, STATE, Shard, Shards
from sae_lightning.terminal import console

SHARD_BYTES = 1 << 28  # of one site; no more of it is lost when a run is killed


class CachedRows:
    """A `RowSource` that gives the rows of `live` without running the LLM where it need not.

    It goes from stretch to stretch. A shard that holds all sites is read. For one that lacks some
    the LLM is run, for all sites, and those missing are added. Where there is no shard, one is
    written. Checksums are looked at when a run comes to a shard: only what the run needs is read,
    and the disk reads it only once.
    """

    def __init__(self, live: LLMRows, folder: Path, settings: dict[str, Any], width: int) -> None:
        """`folder` of the shards of one key; `settings` that the key was made from; `width` of an
        activation, for the estimate of the disk space."""
        self.live, self.sites, self.device, self.most = live, live.sites, live.device, live.most
        self.store, self.settings = Shards(folder), settings
        self.row_bytes = width * next(live.llm.model.parameters()).dtype.itemsize
        self._place = 0  # LLM batches served
        self._stop: int | None = 0  # where this stretch ends, None: wherever
        self._shard: Shard | None = None  # being read
        self._draft: Draft | None = None  # being written
        self._known = live.state_dict()  # a state of `live` at or before the place
        self.epoch = live.epoch
        self._looked = self._resumed = self._only_reads = False

    @property
    def llm_seconds(self) -> float:
        return self.live.llm_seconds

    def next(self, wanted: int) -> Rows:
        """The rows of the next LLM batch; with the last one that is wanted the cache is closed.

        UserError, at the first call of a new run: no space for what the run will write.
        """
        if not self._looked:
            self._look(wanted)
        if self._place == self._stop:
            self._enter()
        rows = self._run() if self._shard is None else self._read(self._shard)
        if len(rows.ids) >= wanted:
            self._close()
        return rows

    def _read(self, shard: Shard) -> Rows:
        rows = shard.batch(self._place, self.sites)
        self.epoch = shard.epochs[self._place - shard.first]
        self._place += 1
        return rows

    def _run(self) -> Rows:
        rows = self.live.next(0)
        self.epoch = self.live.epoch
        if self._draft is not None:
            self._write(rows, self._draft)
        self._place += 1
        if self._draft is not None and self._draft.old is None:
            full = self._draft.largest >= SHARD_BYTES
            self._stop = self._place if full else self._stop
        return rows

    def _write(self, rows: Rows, draft: Draft) -> None:
        if draft.old and not torch.equal(draft.old.ids(self._place), rows.ids):
            draft.discard()
            raise UserError(
                f"data.cache: the text or the LLM is no longer what {self.store.folder} was made "
                "from; delete that folder, or choose another data.cache_folder"
            )
        with self._unless_full():
            draft.add(rows, self.epoch)

    def _enter(self) -> None:
        """Begin the stretch at this place."""
        self._leave()
        shard = self._find()
        self._stop = self.store.following(self._place) if shard is None else shard.stop
        if shard is not None:
            self._known = shard.state()
            if not shard.lacks(self.sites):
                self._shard = shard
                return
        if self.live.llm_batches != self._place:
            self.live.load_state_dict(self._known | {"llm_batches": self._place})
        if (shard is None or shard.first == self._place) and self._may_write():
            sites = self.sites if shard is None else shard.lacks(self.sites)
            with self._unless_full():
                self._draft = Draft(self.store, self.live.state_dict(), sites, shard)

    def _leave(self) -> None:
        """End the stretch that ends at this place."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        if self._draft is not None:
            with self._unless_full():
                self._draft.commit(self.live.state_dict()["medians"])
            self._draft = None

    def _find(self) -> Shard | None:
        """The shard at this place, with what is damaged taken out of it."""
        shard = self.store.at(self._place)
        if shard is None:
            return None
        damaged = shard.check([IDS, STATE, *(str(s) for s in self.sites if not shard.lacks([s]))])
        if damaged and not self.store.writable and self._may_write():
            return self._find()  # the claim looked at the disk anew
        for name in damaged:
            console.print(f"{shard.folder / name} is damaged: the LLM makes it again")
            shard.files.pop(name)
        if {IDS, STATE} & {*damaged}:
            self.store.remove(shard)
            return None
        return shard

    def _cut(self) -> None:
        """End a shard that is being written early, so that what is in it is not lost."""
        if self._draft is not None and (self._draft.old is None or self._place == self._stop):
            self._leave()
            self._stop = self._place

    def _close(self) -> None:
        """No more is wanted: let another process write."""
        self._cut()
        if self._draft is not None:
            self._draft.discard()  # half of a site that a whole shard lacks
            self._draft = None
        self.store.release()

    def _look(self, wanted: int) -> None:
        """Say what the cache has and what it will take; UserError if it has not that much room."""
        self._looked = True
        self.store.read()
        needed, found = self._estimate(wanted)
        if needed and self._may_write():
            needed, found = self._estimate(wanted)
            free = free_space(self.store.folder)
            console.print(
                f"the activation cache takes about {_size(needed)} in {self.store.folder}, "
                f"{_size(free)} are free"
            )
            if free < needed:
                self._refuse(f"no space for {_size(needed)} in {self.store.folder}")
            else:
                with self._unless_full():
                    self.store.describe(self.settings)
        if found:
            console.print(
                f"{found:,} of {wanted:,} tokens are read from the activation cache in "
                f"{self.store.folder}"
            )

    def _estimate(self, wanted: int) -> tuple[int, int]:
        """Bytes that the next `wanted` rows add to the disk, and how many of them are there."""
        place, needed, found = self._place, 0, 0
        everything = len(self.sites) * self.row_bytes + 8
        for shard in self.store.shards:
            if shard.stop > place and wanted > 0:
                hole = min(wanted, max(0, shard.first - place) * self.most)
                here = min(wanted - hole, sum(shard.rows[max(0, place - shard.first) :]))
                lacks = len(shard.lacks(self.sites))
                needed += hole * everything + here * lacks * self.row_bytes
                found += 0 if lacks else here
                wanted -= hole + here
                place = shard.stop
        return needed + wanted * everything, found

    def _may_write(self) -> bool:
        """Whether this process writes, which is asked for once."""
        if self.store.writable or self._only_reads:
            return self.store.writable
        self._only_reads = True
        try:
            self.store.claim()
            self._only_reads = False
        except BlockingIOError:
            console.print(
                f"another process writes the activation cache in {self.store.folder}: this run "
                "reads what is complete there and runs the LLM for the rest"
            )
        except OSError as error:
            # a colleague's cache may be there to be read only
            reason = f"{self.store.folder} cannot be written to ({error.strerror})"
            self._refuse(reason, fatal=not self.store.shards)
        return self.store.writable

    def _refuse(self, reason: str, fatal: bool = True) -> None:
        """UserError in a new run; a resumed one, whose settings are fixed, only reads."""
        self.store.release()
        self._only_reads = True
        if fatal and not self._resumed:
            raise UserError(
                f"data.cache: {reason}; choose another data.cache_folder, or set data.cache=false"
            )
        console.print(f"data.cache: {reason}; this run adds nothing to it")

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        """Give up writing, not the run, when the disk refuses."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = (error if isinstance(error, OSError) else error.__cause__).strerror
            console.print(
                f"the activation cache in {self.store.folder} is not written any further "
                f"({reason}); training goes on"
            )
            if self._draft is not None:
                self._draft.discard()
            self._draft, self._only_reads = None, True
            self.store.release()

    def state_dict(self) -> dict[str, Any]:
        """As that of `LLMRows`, with which it is interchangeable.

        All rows up to here are put in place: a resumed run leaves no hole in the cache.
        """
        self._cut()
        if self.live.llm_batches == self._place:
            return self.live.state_dict()
        return self._known | {"llm_batches": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after LLM batch `llm_batches`; the text is opened there once it is needed."""
        if self._draft is not None:
            self._draft.discard()
        self._shard = self._draft = None
        self._known, self.epoch = state, state["tokens"]["epoch"]
        self._place = self._stop = state["llm_batches"]
        self._resumed, self._looked = True, False


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
