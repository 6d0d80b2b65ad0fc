"""The base class of all kinds of text (plays, hub, local), which an LLM reads."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import measure_branch_scale
from sae_lightning.llm.load import (
    LLM,
    NO_LLM,
    Attention,
    Dtype,
    LLMConfig,
    check_load,
    check_sites,
    count_llm_parameters,
    find_hub_name,
    load_llm,
    load_tokenizer,
    pick_device,
    read_llm_shape,
)
from sae_lightning.llm.packaged import PACKAGED, LLMShape
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import LayerConfig, Site, SitePair, find_module_paths
from sae_lightning.llm.splice import LOGIT_ROWS, SpliceBaseline, SpliceScores
from sae_lightning.llm.vocabulary import find_bos_id
from sae_lightning.ranks import world
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.open_rows import open_rows, pick_cache_folder
from sae_lightning.stream.source import DataMemory, DataSource, Needs, OpenedData, TextConfig
from sae_lightning.stream.states import expect, expect_rows, expect_stream
from sae_lightning.stream.tokens import SplitTokens, open_tokens
from sae_lightning.stream.tuning_text import TuningText

EAGER_CONTEXT = 256  # tokens; longer contexts take too much memory with eager attention


class TextSource(DataSource):
    """Text that an LLM reads; a subclass defines how documents are opened."""

    data: TextConfig
    noun, where, has_llm, origin = "text", "text", True, "text"
    # the baselines are the same for every SAE; only analysis measures ce_error
    metrics = frozenset(SpliceScores._fields) - {*SpliceBaseline._fields, "ce_error"}
    headline = "ce_recovered"

    @abstractmethod
    def open_documents(self) -> SplitDocuments:
        """Open training and held-out documents, reading as little of them as possible.

        UserError: nothing there, no such column, hub out of reach, package not installed.
        """

    def open_quietly(self) -> SplitDocuments:
        """Call `open_documents` with the messages of libraries muted."""
        with mute_libraries():
            return self.open_documents()

    def check_settings(self, layer: LayerConfig) -> None:
        if self.llm.name == NO_LLM:
            raise UserError("llm=none: text needs an LLM to read it; choose one")

    def list_metrics(self, loss_tokens: int) -> tuple[frozenset[str], str]:
        if not loss_tokens:
            return frozenset(), "with eval.loss_tokens=0"
        return super().list_metrics(loss_tokens)

    def resolve_llm(self) -> LLMConfig:
        """Also resolve `auto` attention: eager in bf16 on a CPU, where it is a tenth faster
        (SmolLM2), but only for short contexts, as its memory grows with the square of the context.
        """
        llm = super().resolve_llm()
        use_eager = (
            llm.attn is Attention.auto
            and pick_device(llm).type == "cpu"
            and llm.dtype is Dtype.bfloat16
            and self.data.context <= EAGER_CONTEXT
        )
        return replace(llm, attn=Attention.eager) if use_eager else llm

    def read_shape(self) -> LLMShape:
        return read_llm_shape(self.llm)

    def check_data(self, sites: Sequence[Site], batch: int) -> None:
        check_sites(self.llm, list(sites))

    def check_before_loading(self, shape: LLMShape, resumed: bool) -> None:
        super().check_before_loading(shape, resumed)
        check_load(self.llm)
        if self.data.cache and not resumed:
            self._check_cache()
        if shape.context is not None and self.data.context > shape.context:
            raise UserError(
                f"data.context={self.data.context}: {self.llm.name} takes at most {shape.context} "
                "tokens; lower it"
            )
        if self.llm.name not in PACKAGED:
            find_bos_id(load_tokenizer(self.llm))  # fail before the text is read

    def _check_cache(self) -> None:
        """UserError if the cache can be neither written nor read (a colleague's is read-only)."""
        folder = ancestor = pick_cache_folder(self.data.cache_folder)
        while not os.path.exists(ancestor):
            ancestor = ancestor.parent
        writable = os.path.isdir(ancestor) and os.access(ancestor, os.W_OK)
        readable = os.path.isdir(folder) and os.access(folder, os.R_OK) and os.listdir(folder)
        if not writable and not readable:
            raise UserError(
                f"data.cache_folder={folder} cannot be written to: choose another, or set "
                "data.cache=false"
            )

    def estimate_data_memory(
        self, sites: Sequence[Site], shape: LLMShape, tokens: int, loss_tokens: int
    ) -> DataMemory:
        """With `llm.load` the LLM's weights, which may be quantised or offloaded, do not count."""
        blocks = self._count_blocks(sites, loss_tokens)
        weights = 0 if self.llm.load else count_llm_parameters(self.llm, blocks)
        rows = self.llm.batch * self.data.context
        if not loss_tokens:
            return DataMemory(rows, weights, 0)
        # about 8 arrays of logits (of the clean LLM and with an SAE); for each SAE, hidden states
        return DataMemory(rows, weights + 8 * LOGIT_ROWS * shape.vocabulary, rows * shape.width)

    def _count_blocks(self, sites: Sequence[Site], loss_tokens: int) -> int | None:
        """Count the LLM's blocks that a run at `sites` needs; None for the whole LLM.

        The LLM's loss needs all blocks, and so does a cache, whose key hashes all weights.
        """
        if loss_tokens or self.data.cache:
            return None
        return 1 + max(site.layer for site in sites)

    def check_stream_state(
        self, state: Any, sites: Sequence[Site], shape: LLMShape, served: int
    ) -> None:
        batch, context = self.llm.batch, self.data.context
        expect(state, {"rows": dict}, "stream")
        sequences = expect_rows(
            state["rows"], sites, batch=batch, context=context, vocabulary=shape.vocabulary
        )
        # the pool may hold one LLM batch more, with a row for each token but BOS
        capacity = self.data.pool + batch * (context - 1)
        widths = dict.fromkeys(sites, shape.width)
        expect_stream(state, widths, capacity=capacity, served=served, sequences=sequences)

    def open_data(self, needs: Needs) -> OpenedData:
        sites, tokens, loss_tokens, ahead, resumed, own_sites = needs
        opened = self.open_llm(self._count_blocks(sites, loss_tokens))
        llm, text = opened
        rows = open_rows(
            self.llm, self.data, self.seed, llm, text.train, sites, resumed, ahead, own_sites
        )
        about = {"LLM": f"{self.llm.name}, {self.llm.dtype.name} on {rows.device}"}
        if llm.tokenizer.lacks_bos_and_eos:
            _, bos_id, separator_id = text.train.packing
            bos, separator = llm.tokenizer.convert_ids_to_tokens([bos_id, separator_id])
            about["special tokens"] = (
                f"the tokenizer names none: {bos} opens sequences and {separator} ends documents "
                "(others: llm.bos, llm.separator)"
            )
        held_out = self.open_held_out(sites, tokens, loss_tokens, opened, own_sites)
        # at the other sites, the block scales what the module returns
        unscaled = [site for site in sites if measure_branch_scale(llm.model, site) == 1]
        tuning_text = TuningText(
            llm,
            text.train,
            sites,
            batch=self.llm.batch,
            max_norm=self.data.max_norm,
            keep_special=self.data.keep_special,
        )
        modules = find_module_paths(llm.model, unscaled)
        return OpenedData(rows, held_out, about, modules, tuning_text)

    def open_held_out(
        self,
        sites: Sequence[Site],
        tokens: int,
        loss_tokens: int,
        opened: tuple[LLM, SplitTokens] | None = None,
        own_sites: Sequence[Site] | None = None,
    ) -> HeldOut:
        llm, text = opened or self.open_llm(self._count_blocks(sites, loss_tokens))
        return HeldOut(
            llm,
            text.held_out,
            list(sites),
            tokens=tokens,
            loss_tokens=loss_tokens,
            max_norm=self.data.max_norm,
            batch=self.llm.batch,
            keep_special=self.data.keep_special,
            own_sites=own_sites,
        )

    def open_llm(self, blocks: int | None = None) -> tuple[LLM, SplitTokens]:
        """Load the LLM (`blocks` None) or its first `blocks` blocks, and tokenise the text."""
        with world().go_first():  # downloads, de-quantises and tokenises once per machine
            documents = self.open_quietly()  # first: wrong data fail before the LLM is loaded
            tokenizer = load_tokenizer(self.llm)
            text = open_tokens(documents, tokenizer, context=self.data.context, seed=self.seed)
            return load_llm(self.llm, blocks, tokenizer), text

    def describe_sites(self, sites: Sequence[SitePair], shape: LLMShape) -> dict[str, str]:
        descriptions = (
            f"{pair} ({' -> '.join(pair.hook_names.values())}), d = {shape.width}" for pair in sites
        )
        return {"site": "; ".join(dict.fromkeys(descriptions))}

    def make_saelens_metadata(self, sites: SitePair) -> dict[str, Any]:
        about = {"model_name": find_hub_name(self.llm), "context_size": self.data.context}
        return super().make_saelens_metadata(sites) | about | {"prepend_bos": True}
