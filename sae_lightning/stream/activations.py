"""Your own activations (data=activations): matrices in files, from any model, without an LLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM, pick_device
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig, Site, SitePair
from sae_lightning.ranks import world
from sae_lightning.stream.activation_files import UNNAMED, SavedMatrix, find_matrices, parse_site
from sae_lightning.stream.local_files import make_existing_absolute
from sae_lightning.stream.no_llm import NoLLMSource
from sae_lightning.stream.saved_rows import (
    SERVED_ROWS,
    HeldOutRows,
    RowBlocks,
    SavedRows,
    split_rows,
)
from sae_lightning.stream.source import DataConfig, DataMemory, Needs, OpenedData
from sae_lightning.stream.states import ANY_COUNT, expect, expect_stream
from sae_lightning.stream.tokens import SplitTokens


@dataclass(slots=True, kw_only=True)
class ActivationsConfig(DataConfig):
    """Your own activations: matrices of floats [rows, d] in files, from any model."""

    kind: str = "activations"

    path: str
    """File, folder or glob of .safetensors, .npy or .parquet."""

    sites: dict[str, str] = field(default_factory=dict)
    """Site -> name of its tensor, column, file or folder, such as {resid.11: cls}; empty if the
    names are sites (`resid.9`), or if there is one matrix with any name."""

    held_out: float = 0.05
    """Share of the rows kept for evaluation, in blocks from all over the files."""

    model: str | None = None
    """Name of the model that the activations come from, only for the metadata of the SAE; null is
    "unknown" there."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if not self.path:
            raise UserError("data.path is empty: give a file, a folder or a glob of activations")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out={self.held_out}: the share of the rows that evaluation reads "
                "and training never sees; give more than 0 and less than 1"
            )
        for name in self.sites:
            if parse_site(name) is None:
                raise UserError(
                    f"data.sites: {name} is not a site; name one as resid.9 (or attn, mlp_in, mlp)"
                )

    def with_absolute_paths(self) -> "ActivationsConfig":
        return replace(self, path=make_existing_absolute(self.path))


class ActivationsSource(NoLLMSource):
    """Activations in files, without an LLM and without text."""

    data: ActivationsConfig
    settings = ActivationsConfig
    noun, where = "rows", "data=activations"
    origin = "activations from files"
    metrics = frozenset()
    headline = "explained_variance"

    def read_headers(self) -> dict[Site, SavedMatrix]:
        """Find the matrices in the files, reading only headers. UserError: there is no matrix of
        floats, or names, shapes or widths do not fit."""
        data = self.data
        return find_matrices(Path(data.path).expanduser(), data.sites, f"data.path={data.path}")

    def read_shape(self) -> LLMShape:
        """Describe the matrices as sites of an LLM: its blocks and the width of each site."""
        widths = {site: matrix.width for site, matrix in self.read_headers().items()}
        layers = 1 + max(site.layer for site in widths)
        return LLMShape(layers, max(widths.values()), context=None, vocabulary=0, widths=widths)

    def find_sites(self, layer: LayerConfig, shape: LLMShape) -> SitePair:
        # as for an LLM with just enough blocks; below, the files decide which sites there are
        pair = layer.resolve_sites(layer.index + 1)
        missing = [site for site in pair if site not in shape.widths]
        if missing and list(shape.widths) == [UNNAMED]:
            raise UserError(
                f"layer.index={layer.index}: the matrix in data.path={self.data.path} is at "
                f"{UNNAMED}; leave layer.index, layer.source and layer.target out"
            )
        if missing:
            raise UserError(
                f"layer.index={layer.index}: data.path={self.data.path} has no {missing[0]}; "
                f"there are {', '.join(map(str, shape.widths))} (layer.index, layer.source, "
                "layer.target)"
            )
        return pair

    def check_data(self, sites: Sequence[Site], batch: int) -> None:
        by_site = self.read_headers()
        self._hold_out([by_site[site] for site in sites], batch)

    def _hold_out(self, matrices: Sequence[SavedMatrix], batch: int = 1) -> RowBlocks:
        """Hold out blocks of rows. UserError: sites differ in their number of rows, or fewer than
        `batch` rows are left to train on."""
        first, where = matrices[0], f"data.path={self.data.path}"
        for other in matrices:
            if other.row_count != first.row_count:
                raise UserError(
                    f"{where}: {first.site} has {first.row_count:,} rows and {other.site} "
                    f"{other.row_count:,}; row i has to be the same token at every site"
                )
        blocks = split_rows(first.row_count, self.data.held_out)
        remaining = int(blocks.count_rows(blocks.train).sum())
        if remaining < batch:
            raise UserError(
                f"{where}: {first.row_count:,} rows, of which data.held_out={self.data.held_out} "
                f"leaves {remaining:,} to train on; a batch (trainer.batch={batch}) needs more"
            )
        return blocks

    def estimate_data_memory(
        self, sites: Sequence[Site], shape: LLMShape, tokens: int, loss_tokens: int
    ) -> DataMemory:
        return DataMemory(rows=SERVED_ROWS, shared=0, per_sae=0)  # files are memory-mapped

    def check_stream_state(
        self, state: Any, sites: Sequence[Site], shape: LLMShape, served: int
    ) -> None:
        files = {str(site): str for site in sites}
        expect(state, {"rows": {"served": ANY_COUNT, "rows": ANY_COUNT, "files": files}}, "stream")
        capacity = self.data.pool + SERVED_ROWS  # of the pool
        row_count = state["rows"]["served"]  # each row counts as a sequence
        widths = {site: shape.width_at(site) for site in sites}
        expect_stream(state, widths, capacity=capacity, served=served, sequences=row_count)

    def _open(
        self, sites: Sequence[Site], own_sites: Sequence[Site]
    ) -> tuple[dict[Site, SavedMatrix], RowBlocks]:
        """Open this rank's matrices (`own_sites`), and hold out the same rows at all `sites`."""
        with world().go_first():  # `try_files` copies parquet files, once per machine
            by_site = self.read_headers()
            matrices = {site: by_site[site] for site in own_sites}
            for matrix in matrices.values():
                matrix.try_files()
        return matrices, self._hold_out([by_site[site] for site in sites])

    def open_data(self, needs: Needs) -> OpenedData:
        own_sites = needs.sites if needs.own_sites is None else needs.own_sites
        matrices, blocks = self._open(needs.sites, own_sites)
        device = pick_device(self.llm)
        rows = SavedRows(matrices, blocks, seed=self.seed, device=device)
        held_out = HeldOutRows(matrices, blocks, tokens=needs.tokens, device=device)
        dtypes = {str(matrix.dtype).removeprefix("torch.") for matrix in matrices.values()}
        about = {
            "activations": f"{self.data.path}, {rows.rows_per_epoch:,} rows to train on, "
            f"{blocks.row_count - rows.rows_per_epoch:,} held out, {' and '.join(sorted(dtypes))}"
        }
        return OpenedData(rows, held_out, about)

    def open_held_out(
        self,
        sites: Sequence[Site],
        tokens: int,
        loss_tokens: int,
        opened: tuple[LLM, SplitTokens] | None = None,
    ) -> HeldOutRows:
        matrices, blocks = self._open(sites, sites)
        return HeldOutRows(matrices, blocks, tokens=tokens, device=pick_device(self.llm))

    def describe_sites(self, sites: Sequence[SitePair], shape: LLMShape) -> dict[str, str]:
        descriptions = []
        for pair in sites:
            distinct = dict.fromkeys(pair)  # one if source and target are the same site
            widths = " -> ".join(str(shape.width_at(site)) for site in distinct)
            descriptions.append(f"{pair}, d = {widths}")
        return {"site": "; ".join(dict.fromkeys(descriptions))}

    def make_saelens_metadata(self, sites: SitePair) -> dict[str, Any]:
        """Describe an SAE's inputs: the files, and the names of its sites in them."""
        data = self.data
        about = {"model_name": data.model or "unknown", "dataset_path": data.path}
        # if source and target are the same site, there is one hook
        for (key, hook_name), site in zip(sites.hook_names.items(), sites, strict=False):
            name = hook_name if data.model else str(site)  # without a model there are no hooks
            about[key] = data.sites.get(str(site)) or name
        return about
