"""The activation cache: rows from disk where they are there, else from the LLM and on to disk.

LLM batches    0 . . . . . 6 . . . . . 12 . . . . . 18 . . . . . 24 . .
shards         | 00000000  | 00000006  |            | 00000018  |
a run          read        read        LLM, write   read        LLM, write

What is kept is what the LLM gives, before the pool: batch, pool and length of a run change nothing
in it, and the batches that training sees are the same bit for bit with and without a cache.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.files import free_space
from sae_lightning.stream.base import Rows
from sae_lightning.stream.devices import send
from sae_lightning.stream.draft import Draft
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shards import IDS, STATE, Shard, Shards
from sae_lightning.terminal import console

SHARD_BYTES = 1 << 28  # of one site; no more of it is lost when a run is killed
RESERVE = 4 << 30  # bytes of the disk that are left for checkpoints


class CachedRows:
    """A `RowSource` that gives the rows of `live` without running the LLM where it need not.

    It goes from stretch to stretch. A shard that holds all sites is read. For one that lacks some
    the LLM is run, for all sites, and those missing are added. Where there is no shard, one is
    written. Checksums are looked at when a run comes to a shard: only what the run needs is read,
    and the disk reads it only once.
    """

    def __init__(
        self, live: LLMRows, folder: Path, settings: dict[str, Any], width: int, resumed: bool
    ) -> None:
        """`folder` of the shards of one key; `settings` that the key was made from; `width` of an
        activation, for the estimate of the disk space; `resumed`: never refuse to go on."""
        self.live, self.sites, self.device, self.most = live, live.sites, live.device, live.most
        self.store, self.settings, self.resumed = Shards(folder), settings, resumed
        self.row_bytes = width * next(live.llm.model.parameters()).dtype.itemsize
        self._place = 0  # LLM batches served
        self._stop: int | None = 0  # where this stretch ends, None: wherever
        self._shard: Shard | None = None  # that the place is in
        self._reads = False  # all rows from it
        self._draft: Draft | None = None  # being written
        self._known = live.state_dict()  # a state of `live` at or before the place
        self.epoch = live.epoch
        self._looked = self._asked = False  # at what is there; to be the one that writes

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
        rows = self._read(self._shard) if self._reads else self._run()
        if len(rows.ids) >= wanted:
            self._cut()
            self.close()
        return rows

    def _read(self, shard: Shard) -> Rows:
        rows, epoch = shard.batch(self._place, self.sites), shard.epochs[self._place - shard.first]
        if epoch > self.epoch:  # the text itself, which is not read, cannot say so
            console.print(f"the text ran out; going round again in a new order (epoch {epoch})")
        self.epoch = epoch
        self._place += 1
        there = {site: send(x, self.device) for site, x in rows.activations.items()}
        return Rows(there, rows.ids)

    def _run(self) -> Rows:
        rows = self.live.next(0)
        self._compare()
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
            raise self._changed("LLM")  # norms, by which rows are dropped, are others
        with self._unless_full():
            draft.add(rows, self.epoch, self.live.text)

    def _seek(self) -> None:
        """Have `live` read over the text that comes before this place."""
        self.live.load_state_dict(self._known | {"llm_batches": self._known["read"]})
        while self.live.llm_batches < self._place:
            self.live.skip()
            self._compare()

    def _compare(self) -> None:
        """UserError if the text that `live` read last is not the one that its shard is of."""
        place = self.live.llm_batches - 1
        shard = self.store.at(place)
        if shard is not None and shard.texts[place - shard.first] != self.live.text:
            raise self._changed("text")

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"data.cache: the {what} is no longer the one that {self.store.folder} was made from; "
            "delete that folder, or choose another data.cache_folder"
        )

    def _enter(self) -> None:
        """Begin the stretch at this place."""
        self._leave()
        self._shard = shard = self._find()
        self._stop = self.store.following(self._place) if shard is None else shard.stop
        if shard is not None:
            self._known = shard.state()
        lacks = self.sites if shard is None else shard.lacks(self.sites)
        self._reads = not lacks
        if self._reads:
            return
        if self.live.llm_batches != self._place:
            self._seek()
        if (shard is None or shard.first == self._place) and self._may_write():
            with self._unless_full():
                if free_space(self.store.folder) < RESERVE:
                    raise OSError(errno.ENOSPC, f"less than {_size(RESERVE)} are free")
                self._draft = Draft(self.store, self.live.state_dict(), lacks, shard)

    def _leave(self) -> None:
        """End the stretch that ends at this place."""
        if self._draft is not None:
            with self._unless_full():
                self._draft.commit(self.live.state_dict()["medians"])
            self._draft = None
        if self._shard is not None:
            self._shard.close()
            self._shard = None

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

    def close(self) -> None:
        """No more is wanted: let another process write. What is half written is dropped."""
        if self._draft is not None:
            self._draft.discard()
        if self._shard is not None:
            self._shard.close()
        self._draft = self._shard = None
        self._stop = self._place
        self.store.release()

    def _look(self, wanted: int) -> None:
        """Say what the cache has and what it will take; UserError if it has not that much room."""
        self._looked = True
        self.store.read()
        needed, found = self.store.estimate(self._place, wanted, self.live, self.row_bytes)
        if needed and self._may_write():
            needed, found = self.store.estimate(self._place, wanted, self.live, self.row_bytes)
            free = free_space(self.store.folder)
            console.print(
                f"the activation cache takes about {_size(needed)} in {self.store.folder}, "
                f"{_size(free)} are free"
            )
            if free < needed + RESERVE:
                self._refuse(
                    f"no space for {_size(needed)} in {self.store.folder} and {_size(RESERVE)} to "
                    "spare for checkpoints"
                )
            else:
                with self._unless_full():
                    self.store.describe(self.settings)
        if found:
            console.print(
                f"{found:,} of {wanted:,} tokens are read from the activation cache in "
                f"{self.store.folder}"
            )

    def _may_write(self) -> bool:
        """Whether this process writes, which is asked for once."""
        if self._asked:
            return self.store.writable
        self._asked = True
        try:
            self.store.claim()
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
        if fatal and not self.resumed:
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
            self._draft = None
            self.store.release()

    def state_dict(self) -> dict[str, Any]:
        """As that of `LLMRows`, with which it is interchangeable.

        The rows of a shard that was begun are put in place, so that a resumed run leaves no hole.
        Of a site that is being added to a whole shard they are not: it is added as a whole later.
        """
        self._cut()
        if self.live.llm_batches == self._place:
            return self.live.state_dict()
        return self._known | {"llm_batches": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after LLM batch `llm_batches`; the text is opened there once it is needed."""
        self._known, self.epoch = state, state["tokens"]["epoch"]
        self._place = state["llm_batches"]
        self.close()
        self._looked = self._asked = False


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
