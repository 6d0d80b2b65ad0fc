"""The activation cache: rows are read from disk or, if missing, computed and written there.

LLM batches    0 . . . . . 6 . . . . . 12 . . . . . 18 . . . . . 24 . .
shards         | 00000000  | 00000006  |            | 00000018  |
a run          read        read        LLM, write   read        LLM, write

Rows are cached before they are shuffled: one cache serves runs of any batch size, pool and length,
and training sees the same batches, bit for bit, with and without it.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from sae_lightning.errors import UserError
from sae_lightning.files import find_system_error, read_free_space, write_json
from sae_lightning.llm.placement import move_to_device
from sae_lightning.llm.sites import Site
from sae_lightning.ranks import world
from sae_lightning.stream.packing import report_epoch
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shards import (
    DAMAGE_ERRORS,
    SHARD_SUFFIX,
    Shard,
    count_cached,
    lock_folder,
    write_shard,
)
from sae_lightning.stream.source import Rows, RowStream
from sae_lightning.stream.states import TextChanged, check_text
from sae_lightning.terminal import console

MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 27  # rows buffered in memory; at most these are lost when a run is killed
RESERVED_BYTES = 4 << 30  # disk space left for checkpoints


class CachedRows(RowStream):
    """A `RowStream` that reads the rows of `live` from shards, or has `live` compute missing ones.

    The LLM batches are divided into stretches: each is either read from one shard, or computed by
    the LLM and, if possible, written as a new shard. Opening a shard verifies its checksum.
    """

    def __init__(
        self,
        live: LLMRows,
        folder: Path,
        identity: dict[str, Any],
        width: int,
        resumed: bool,
        own_sites: Sequence[Site] | None = None,
    ) -> None:
        """`folder` holds the shards for one `identity`: all that determines the rows; `width`: d of
        the activations; `resumed`: go on without writing where a new run would stop with an error;
        `own_sites`: the sites at which rows are read (None: all)."""
        self.live = live
        self.sites, self.device, self.max_rows = live.sites, live.device, live.max_rows
        self.folder, self.identity, self.resumed = folder, identity, resumed
        self.width, self.own_sites = width, own_sites or live.sites
        itemsize = next(live.llm.model.parameters()).dtype.itemsize
        self.row_bytes = len(self.sites) * width * itemsize + 8  # 8: the sequence id, int64
        self.shards: list[Shard] = []  # in the order of their first LLM batches
        self.epoch = live.epoch
        self._position = 0  # LLM batches served
        self._stop: int | None = 0  # this stretch's end, exclusive; None: not known yet
        self._shard: Shard | None = None  # the one being read
        self._buffer: list[tuple[Rows, int, int]] | None = None  # rows, epoch, crc32 to be written
        self._earlier_state = live.state_dict()  # state of `live` at `_position` or before
        self._is_checked = False  # whether `_check_space` has run
        self._lock = ExitStack()
        self._writes: bool | None = None  # None until `_may_write` has decided

    @property
    def llm_seconds(self) -> float:
        return self.live.llm_seconds

    def next(self, remaining: int) -> Rows:
        """Return the rows of the next LLM batch; closes the cache after the last one needed.

        UserError: the disk has no space for the rows of a new run (checked at the first call)."""
        if not self._is_checked:
            self._check_space(remaining)
        if self._position == self._stop:
            self._begin_stretch()
        rows = self._compute(remaining) if self._shard is None else self._read(self._shard)
        if len(rows.sequence_ids) >= remaining:
            self._end_stretch()
            self.close()
        return rows

    def _read(self, shard: Shard) -> Rows:
        """Read the next LLM batch from its shard."""
        rows = shard.read_batch(self._position, self.own_sites)
        epoch = shard.epochs[self._position - shard.first]
        if epoch > self.epoch:  # the token stream, which usually prints this, is not read
            report_epoch("the text ran out", epoch)
        self.epoch = epoch
        self._position += 1
        on_device = {site: move_to_device(x, self.device) for site, x in rows.activations.items()}
        return Rows(on_device, rows.sequence_ids)

    def _compute(self, remaining: int) -> Rows:
        """Run the LLM on the next LLM batch, and buffer its rows if they are to be written."""
        if self._stop is not None:  # `live` need not compute more than the rows before a shard
            remaining = min(remaining, (self._stop - self._position) * self.max_rows)
        rows = self.live.next(remaining)
        self.epoch = self.live.epoch
        self._position += 1
        if self._buffer is not None:
            batch = rows._replace(activations={s: x.cpu() for s, x in rows.activations.items()})
            self._buffer.append((batch, self.epoch, self.live.tokens_crc32))
            row_count = sum(len(batch.sequence_ids) for batch, _, _ in self._buffer)
            if row_count * self.row_bytes >= SHARD_BYTES:
                self._stop = self._position  # the new shard is large enough
        return rows

    def _begin_stretch(self) -> None:
        """Begin a stretch here: open its shard, or start to buffer a new one."""
        self._end_stretch()
        shard = self._find_shard(self._position)
        if shard is not None and all(world().gather_values(self._map_shard(shard))):
            self._shard, self._stop, self._earlier_state = shard, shard.stop, shard.read_state()
            return
        if shard is not None:
            console.print(f"{shard.path} is damaged: the LLM computes it again")
            self._may_write()  # before the next line: it may list all shards again
            self.shards = [other for other in self.shards if other.path != shard.path]
        self._stop = next((s.first for s in self.shards if s.first > self._position), None)
        if self.live.llm_batches != self._position:
            self._seek()
        self._earlier_state = self.live.state_dict()
        if self._may_write():
            with self._stop_writing_on_error():
                if read_free_space(self.folder) < RESERVED_BYTES:
                    raise OSError(errno.ENOSPC, f"less than {_format_size(RESERVED_BYTES)} free")
                self._buffer = []

    def _map_shard(self, shard: Shard) -> bool:
        """Mmap a shard; returns False if it is damaged."""
        vocabulary = self.live.llm.model.config.get_text_config().vocab_size
        packing = {"batch": self.live.batch, "context": self.live.token_stream.packing.context}
        return shard.map_tensors(self.sites, self.width, **packing, vocabulary=vocabulary)

    def _find_shard(self, llm_batch: int) -> Shard | None:
        return next((s for s in self.shards if s.first <= llm_batch < s.stop), None)

    def _seek(self) -> None:
        """Have `live` skip the text up to LLM batch `_position`; UserError if that text is not the
        one that the shards were made from."""
        state = self._earlier_state  # its text is read up to LLM batch state["read"]
        try:  # the loop below reads the text of the later LLM batches, and checks it
            self.live.load_state_dict(state | {"llm_batches": state["read"]})
        except TextChanged:
            if self.resumed:
                raise  # its message is for a resumed run
            self._refuse_text()
        while (llm_batch := self.live.llm_batches) < self._position:
            self.live.read_sequences()
            shard = self._find_shard(llm_batch)
            if shard and shard.tokens_crc32[llm_batch - shard.first] != self.live.tokens_crc32:
                self._refuse_text()

    def _refuse_text(self) -> NoReturn:
        raise UserError(
            f"data.cache: the text is no longer the one that {self.folder} was made from; delete "
            "that folder, or choose another data.cache_folder"
        )

    def _end_stretch(self) -> None:
        """End the stretch here, and write the buffered rows."""
        if self._buffer:
            with self._stop_writing_on_error():
                # a run resumed within the first shard needs the medians, unknown before it
                state = self._earlier_state | {"medians": self.live.state_dict()["medians"]}
                shard = write_shard(self.folder, state, self._buffer)
                self.shards = sorted([*self.shards, shard], key=lambda shard: shard.first)
        if self._shard is not None:
            self._shard.close()
        self._buffer = self._shard = None
        self._stop = self._position

    def close(self) -> None:
        """Drop the buffered rows and release the lock, so that another process may write."""
        self._buffer = None
        self._end_stretch()
        self._release()

    def _check_space(self, remaining: int) -> None:
        """Print how much is cached and what the rest takes; UserError if the disk is too full."""
        self._is_checked = True
        self._list_shards()
        cached = count_cached(self.shards, self._position, self.max_rows, remaining)
        if cached < remaining and self._may_write():  # may list the shards again
            cached = count_cached(self.shards, self._position, self.max_rows, remaining)
            needed = (remaining - cached) * self.row_bytes
            free = read_free_space(self.folder)
            console.print(
                f"the activation cache takes about {_format_size(needed)} in {self.folder}, "
                f"{_format_size(free)} are free"
            )
            if free < needed + RESERVED_BYTES:
                self._refuse(
                    f"no space for {_format_size(needed)} in {self.folder} and "
                    f"{_format_size(RESERVED_BYTES)} to spare for checkpoints"
                )
            elif not (self.folder / MANIFEST).is_file():
                with self._stop_writing_on_error():
                    write_json(self.folder / MANIFEST, self.identity)
        if cached:
            tokens = f"{cached:,} of {remaining:,} tokens"
            console.print(f"{tokens} are read from the activation cache in {self.folder}")

    def _list_shards(self) -> None:
        """List the shards on disk; checksums are verified when a shard is opened."""
        self.shards = []
        paths = sorted(self.folder.glob("[0-9]" * 8 + SHARD_SUFFIX))
        for path in world().broadcast_value(paths):  # all ranks use rank 0's list
            try:
                self.shards.append(Shard(path))
            except DAMAGE_ERRORS:
                if self._writes:  # a process that writes replaces the damaged shard
                    console.print(f"{path} is damaged: the LLM computes it again")

    def _may_write(self) -> bool:
        """Whether this process may write: of several ranks, only rank 0. All ranks make the first
        call, which locks the folder, removes leftovers and lists the shards again."""
        if self._writes is None:
            writes = world().broadcast_value(world().is_rank_zero and self._try_lock())
            self._writes = writes and world().is_rank_zero
            if writes:
                self._list_shards()
        return self._writes

    def _try_lock(self) -> bool:
        try:
            return lock_folder(self.folder, self._lock)
        except OSError as error:
            # a colleague's cache is read-only for this user: that is fatal only if it is empty
            reason = f"{self.folder} cannot be written to ({error.strerror})"
            self._refuse(reason, fatal=not self.shards)
            return False

    def _refuse(self, reason: str, fatal: bool = True) -> None:
        """Stop writing for this `reason`. UserError if it is `fatal`, except in a resumed run,
        whose settings are fixed."""
        self._release()
        if fatal and not self.resumed:
            raise UserError(
                f"data.cache: {reason}; choose another data.cache_folder, or set data.cache=false"
            )
        console.print(f"data.cache: {reason}; this run adds nothing to it")

    def _release(self) -> None:
        self._lock.close()
        self._writes = False

    @contextmanager
    def _stop_writing_on_error(self) -> Iterator[None]:
        """Stop writing, but go on training, when the disk is full or fails."""
        try:
            yield
        except (OSError, SafetensorError, UserError) as error:
            why = getattr(error, "strerror", None) or find_system_error(error) or error
            console.print(
                f"the activation cache in {self.folder} is not written any further ({why}); "
                "training goes on"
            )
            self._buffer = None
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """State that `LLMRows` also loads. Buffered rows are written first: a resumed run continues
        after them."""
        if self._buffer:
            self._end_stretch()
        state = self._earlier_state | {"llm_batches": self._position}
        if self.live.llm_batches == self._position:
            state = self.live.state_dict()
        return state | {"text": self.live.token_stream.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `llm_batches` LLM batches; `live` skips their text only if it must run.

        UserError: the text is not the one that the state was saved with."""
        check_text(state, self.live.token_stream.fingerprint())
        self._earlier_state, self.epoch = state, state["tokens"]["epoch"]
        self._position = state["llm_batches"]
        self.close()
        self._is_checked, self._writes = False, None


def _format_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
