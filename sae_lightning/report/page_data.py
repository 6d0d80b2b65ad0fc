"""Packs catalogues compactly for the page's script (templates/blocks.js).

block "text"              the tokens of all sequences
block "feature"           what the list sorts and filters all units by: frequency, strength, scores
block "feature-tokens-0"  tokens that the list shows and searches, of units   0 ... 127
block "feature-tokens-1"  the same of units 128 ... 255
block "feature-0"         details of units   0 ... 127: examples, histogram, relations
block "feature-1"         the same of units 128 ... 255

The page loads "feature" when it opens; a block of tokens when one of the block's units is listed
(all blocks of tokens for a search); and a block of details when one of the block's units is opened.
A block holds its fields one after another, deflated, as base64. The bytes of a field are grouped by
significance (the lowest byte of every number, then the next ...), which compresses best.
Tokens are renumbered from 1 by frequency, so that the high bytes of common tokens are 0,
which compresses well; 0 is no token. Blocks of neurons are named "neuron", "neuron-tokens-0", ...
"""

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.report.catalogue import (
    BEFORE,
    EDGES,
    INTERVALS,
    WINDOW,
    Catalogue,
    Examples,
    find_interval,
    slice_units,
)
from sae_lightning.report.section import show_token

UNITS_PER_BLOCK = 128  # in a block of tokens or details; about 150 kB of details unpacked
COUNTED_AT_ONCE = 8192  # units or sequences whose tokens are counted at a time: bounds memory
MAX_LEVEL = 255  # a strength is stored in 255ths of its unit's maximum
SIMILARITY_SCALE = 100  # a similarity is stored in hundredths
PREVIEW = slice(BEFORE - 3, BEFORE + 8)  # tokens of the strongest example that the list shows

Fields = dict[str, np.ndarray]
"""Name -> numbers: [units, ...], or [sequences, context] in the block of the text."""


class PageData(NamedTuple):
    """Catalogues as the page holds them."""

    index: dict[str, Any]
    """What the script needs to read the blocks: the vocabulary, and the layout of each block."""
    blocks: "Blocks | dict[str, str]"
    """Name -> base64 text; empty if the blocks are files beside the page."""


class Blocks(Mapping[str, str]):
    """Blocks by name. Each is packed on access: all together would take as much memory as the
    page."""

    def __init__(self, catalogues: Sequence[Catalogue], page_ids: np.ndarray):
        self.page_ids = page_ids
        self.parts = {catalogue.kind: (catalogue, _make_list_fields) for catalogue in catalogues}
        """Name of a block -> the catalogue of its units, and the function that makes its fields."""
        self.parts["text"] = catalogues[0], _make_text_fields
        self.size = catalogues[0].token_ids.size * page_ids.itemsize  # bytes, unpacked
        for catalogue in catalogues:
            first_unit = slice_units(catalogue, slice(1))  # all units take the same space
            for make_fields in (_make_list_fields, _make_token_fields, _make_detail_fields):
                fields = make_fields(first_unit, page_ids).values()
                self.size += catalogue.num_units * sum(values[0].nbytes for values in fields)
            for start in range(0, catalogue.num_units, UNITS_PER_BLOCK):
                part = slice_units(catalogue, slice(start, start + UNITS_PER_BLOCK))  # a view
                i = start // UNITS_PER_BLOCK
                self.parts[f"{catalogue.kind}-tokens-{i}"] = part, _make_token_fields
                self.parts[f"{catalogue.kind}-{i}"] = part, _make_detail_fields

    def __getitem__(self, name: str) -> str:
        catalogue, make_fields = self.parts[name]
        return _pack(make_fields(catalogue, self.page_ids))

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def pack_catalogues(catalogues: Sequence[Catalogue]) -> PageData:
    """Pack `catalogues`, which share an LLM and a text, for the page's script."""
    vocabulary, page_ids = _number_tokens(catalogues)
    kinds = []
    for catalogue in catalogues:
        first_unit = slice_units(catalogue, slice(1))  # all units have the same layout
        kinds.append(
            {
                "kind": catalogue.kind,
                "units": catalogue.num_units,
                "tokens": catalogue.statistics.tokens,
                "top_examples": catalogue.top.peak_strength.shape[1],
                "list_layout": _describe_layout(_make_list_fields(first_unit, page_ids)),
                "token_layout": _describe_layout(_make_token_fields(first_unit, page_ids)),
                "detail_layout": _describe_layout(_make_detail_fields(first_unit, page_ids)),
            }
        )
    index = {"vocabulary": vocabulary, "kinds": kinds, "units_per_block": UNITS_PER_BLOCK}
    index |= {"edges": EDGES.tolist(), "max_level": MAX_LEVEL}
    index |= {"window": WINDOW, "before": BEFORE, "preview_start": PREVIEW.start}
    index |= {"intervals": INTERVALS, "sequences": len(catalogues[0].token_ids)}
    index |= {"text_layout": _describe_layout(_make_text_fields(catalogues[0], page_ids))}
    return PageData(index, Blocks(catalogues, page_ids))


def _number_tokens(catalogues: Sequence[Catalogue]) -> tuple[list[str], np.ndarray]:
    """The texts of the tokens that the page shows, and page_ids [vocabulary + 1]: token id -> index
    in these texts. The last entry is 0, for token id -1 (no token)."""
    vocabulary = catalogues[0].vocabulary
    counts = torch.zeros(len(vocabulary) + 1, dtype=torch.int64)
    ids = [torch.from_numpy(catalogues[0].token_ids)]
    for catalogue in catalogues:
        if catalogue.token_sets is not None:
            ids += [catalogue.token_sets.tokens]
        if catalogue.effect is not None:
            ids += [catalogue.effect.promoted, catalogue.effect.suppressed]
    for tensor in ids:
        for part in tensor.split(COUNTED_AT_ONCE):
            counts += torch.bincount(part.flatten() + 1, minlength=len(counts))
    counts = counts[1:]  # the first count is of token id -1, no token
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    # page ids go from 0, no token, to len(used)
    page_ids = np.zeros(len(vocabulary) + 1, "u2" if len(used) < 2**16 else "u4")
    page_ids[used] = range(1, len(used) + 1)
    return ["", *(show_token(vocabulary[token]) for token in used)], page_ids


def _make_text_fields(catalogue: Catalogue, page_ids: np.ndarray) -> Fields:
    """Fields of the text that the examples are taken from."""
    return {"tokens": page_ids.take(catalogue.token_ids)}


def _make_list_fields(catalogue: Catalogue, page_ids: np.ndarray) -> Fields:
    """Fields that the list of units is sorted and filtered by."""
    statistics = catalogue.statistics
    fields = {
        "firing_counts": _to_array(statistics.firing_counts, "u4"),
        "mean": _to_array(statistics.mean, "f4"),
        "maximum": _to_array(statistics.maximum, "f4"),
    }
    if catalogue.token_sets is not None:
        fields["score"] = _to_array(catalogue.token_sets.score, "f4")
    if catalogue.informativeness is not None:  # copy_of is set with it
        fields["informativeness"] = _to_array(catalogue.informativeness, "f4")
        fields["copy_of"] = _to_array(catalogue.copy_of, "u4")
    if catalogue.effect is not None:
        fields["sharpness"] = _to_array(catalogue.effect.sharpness, "f4")
    return fields


def _make_token_fields(catalogue: Catalogue, page_ids: np.ndarray) -> Fields:
    """Fields of tokens that the list shows and searches."""
    top = catalogue.top
    fields = {
        "peaks": page_ids.take(top.tokens[:, :, BEFORE]),
        "preview": page_ids.take(top.tokens[:, 0, PREVIEW]),
    }
    if catalogue.token_sets is not None:
        fields["token_set"] = page_ids.take(catalogue.token_sets.tokens)
        fields["previous"] = _to_array(catalogue.token_sets.previous, "u1")
    if catalogue.effect is not None:
        fields["promoted"] = page_ids.take(catalogue.effect.promoted)
        fields["suppressed"] = page_ids.take(catalogue.effect.suppressed)
    return fields


def _make_detail_fields(catalogue: Catalogue, page_ids: np.ndarray) -> Fields:
    """Fields that only the view of a single unit shows."""
    example_sets, maximum = (catalogue.top, catalogue.random), catalogue.statistics.maximum
    sequence_dtype, position_dtype = map(np.min_scalar_type, catalogue.token_ids.shape)
    fields = {
        "sequence": _to_array(torch.cat([x.sequence for x in example_sets], 1), sequence_dtype),
        "position": _to_array(torch.cat([x.position for x in example_sets], 1), position_dtype),
        "interval": _to_array(
            find_interval(catalogue.random.peak_strength, maximum[:, None]), "u1"
        ),
        "levels": _to_array(
            torch.cat([_quantise(examples, maximum) for examples in example_sets], 1), "u1"
        ),
        "histogram": _to_array(catalogue.statistics.histogram, "u4"),
    }
    relations = {"neighbours": catalogue.neighbours, "partners": catalogue.partners}
    for name, related in relations.items():
        if related is not None:
            similarity = (related.similarity.nan_to_num() * SIMILARITY_SCALE).round()
            fields[name] = _to_array(related.units, "i4")
            fields[name + "_similarity"] = _to_array(similarity, "i1")
    return fields


def _quantise(examples: Examples, maximum: Tensor) -> Tensor:
    """Levels [units, n, WINDOW]: strengths in 255ths of the unit's maximum; a strength above 0 has
    a level of at least 1."""
    strengths = examples.strengths.float()
    strengths[:, :, BEFORE] = examples.peak_strength  # exact: float16 turns tiny strengths into 0
    share = strengths / maximum.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    return torch.where(strengths > 0, (share * MAX_LEVEL).round().clamp(1, MAX_LEVEL), 0)


def _to_array(values: Tensor, dtype: str | np.dtype) -> np.ndarray:
    return values.detach().cpu().numpy().astype(dtype)


def _describe_layout(fields: Fields) -> list[tuple[str, str, int]]:
    """(name, dtype without byte order, numbers per unit or sequence) of each field, in the order of
    the block."""
    return [(name, values.dtype.str[1:], values[0].size) for name, values in fields.items()]


def _pack(fields: Fields) -> str:
    """Pack a block: its fields, with bytes grouped by significance, deflated, as base64."""
    packed = []
    for values in fields.values():
        byte_rows = values.reshape(-1, 1).view("u1")  # [numbers, bytes of a number]
        packed.append(byte_rows.T.tobytes())
    return base64.b64encode(zlib.compress(b"".join(packed), 6)).decode()
