"""A catalogue in the compact form that the page's script reads (templates/blocks.js).

sequences | their tokens                                                   block "texts"
       | fields of all units: how often, how strongly, what to search by   block "feature"
units |  fields of units   0 ... 127: examples, histogram, relations       block "feature-0"
       | fields of units 128 ... 255                                       block "feature-1"

The second is read when the page opens, the others when one of their units is opened.
Each is a block: its fields one after another, a field's bytes by significance (first the lowest of
all its numbers, then the next ...), because that deflates best; then deflate, then base64.
Tokens are numbered anew by how often they occur, from 1, so that the common ones take one byte;
0 is no token.
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

UNITS_PER_BLOCK = 128  # units of a block of details; about 200 kB when unpacked
COUNTED_AT_ONCE = 8192  # units whose tokens are counted at a time
LEVELS = 255  # of a strength; the unit's maximum is the highest
HUNDREDTHS = 100  # of a likeness
PREVIEW = slice(BEFORE - 3, BEFORE + 8)  # of the strongest example, in the list

Fields = dict[str, np.ndarray]  # [units, ...] each


class PageData(NamedTuple):
    """What the page carries of its catalogues."""

    index: dict[str, Any]
    """For the script: the words, and how the blocks of each kind are to be read."""
    blocks: "Blocks"
    """Name -> base64."""


class Blocks(Mapping[str, str]):
    """Blocks by name, each packed when it is asked for: all at once are as large as the page."""

    def __init__(self, catalogues: Sequence[Catalogue], numbers: np.ndarray):
        self.numbers = numbers
        self.parts = {catalogue.kind: (catalogue, _make_list_fields) for catalogue in catalogues}
        self.parts["texts"] = catalogues[0], _make_text_fields
        self.size = catalogues[0].texts.size * numbers.itemsize  # bytes when unpacked
        for catalogue in catalogues:
            first = slice_units(catalogue, slice(1))
            fields = [
                *_make_list_fields(first, numbers).values(),
                *_make_detail_fields(first, numbers).values(),
            ]
            self.size += catalogue.unit_count * sum(values[0].nbytes for values in fields)
            for start in range(0, catalogue.unit_count, UNITS_PER_BLOCK):
                part = slice_units(catalogue, slice(start, start + UNITS_PER_BLOCK))  # a view
                name = f"{catalogue.kind}-{start // UNITS_PER_BLOCK}"
                self.parts[name] = part, _make_detail_fields

    def __getitem__(self, name: str) -> str:
        catalogue, fields = self.parts[name]
        return _pack(fields(catalogue, self.numbers))

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def pack_catalogues(catalogues: Sequence[Catalogue]) -> PageData:
    """Everything that the page's script shows of `catalogues`, which are of one LLM."""
    words, numbers = _number_tokens(catalogues)
    kinds = []
    for catalogue in catalogues:
        first = slice_units(catalogue, slice(1))
        kinds.append(
            {
                "kind": catalogue.kind,
                "units": catalogue.unit_count,
                "tokens": catalogue.statistics.tokens,
                "strongest": catalogue.top.strength.shape[1],
                "listed": _describe_layout(_make_list_fields(first, numbers)),
                "detailed": _describe_layout(_make_detail_fields(first, numbers)),
            }
        )
    index = {"words": words, "kinds": kinds, "edges": EDGES.tolist(), "chunk": UNITS_PER_BLOCK}
    index |= {"window": WINDOW, "before": BEFORE, "levels": LEVELS, "preview": PREVIEW.start}
    index |= {"intervals": INTERVALS, "sequences": len(catalogues[0].texts)}
    index |= {"texts": _describe_layout(_make_text_fields(catalogues[0], numbers))}
    return PageData(index, Blocks(catalogues, numbers))


def _number_tokens(catalogues: Sequence[Catalogue]) -> tuple[list[str], np.ndarray]:
    """The page's own vocabulary, as shown, and [vocabulary + 1] token id (or -1) -> place in it."""
    vocabulary = catalogues[0].vocabulary
    counts = torch.zeros(len(vocabulary) + 1, dtype=torch.int64)
    shown = [torch.from_numpy(catalogues[0].texts)]
    for catalogue in catalogues:
        if catalogue.token_sets is not None:
            shown += [catalogue.token_sets.tokens]
        if catalogue.effect is not None:
            shown += [catalogue.effect.promoted, catalogue.effect.suppressed]
    for part in (part for ids in shown for part in ids.split(COUNTED_AT_ONCE)):
        counts += torch.bincount(part.flatten() + 1, minlength=len(counts))
    counts = counts[1:]
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    numbers = np.zeros(len(vocabulary) + 1, "u2" if len(used) < 2**16 else "u4")
    numbers[used] = range(1, len(used) + 1)
    return ["", *(show_token(vocabulary[token]) for token in used)], numbers


def _make_text_fields(catalogue: Catalogue, numbers: np.ndarray) -> Fields:
    """The sequences that examples are from."""
    return {"tokens": numbers.take(catalogue.texts)}


def _make_list_fields(catalogue: Catalogue, numbers: np.ndarray) -> Fields:
    """What the list of units shows, sorts by and searches."""
    statistics, top = catalogue.statistics, catalogue.top
    fields = {
        "fired": _to_array(statistics.fired, "u4"),
        "mean": _to_array(statistics.mean, "f4"),
        "maximum": _to_array(statistics.maximum, "f4"),
        "peaks": numbers.take(top.tokens[:, :, BEFORE]),
        "preview": numbers.take(top.tokens[:, 0, PREVIEW]),
    }
    if catalogue.token_sets is not None:
        fields["score"] = _to_array(catalogue.token_sets.score, "f4")
        fields["token_set"] = numbers.take(catalogue.token_sets.tokens)
        fields["previous"] = _to_array(catalogue.token_sets.previous, "u1")
    if catalogue.telling is not None:
        fields["telling"] = _to_array(catalogue.telling, "f4")
        fields["copy_of"] = _to_array(catalogue.copy_of, "u4")
    if catalogue.effect is not None:
        fields["promoted"] = numbers.take(catalogue.effect.promoted)
        fields["suppressed"] = numbers.take(catalogue.effect.suppressed)
        fields["sharpness"] = _to_array(catalogue.effect.sharpness, "f4")
    return fields


def _make_detail_fields(catalogue: Catalogue, numbers: np.ndarray) -> Fields:
    """What only a unit's own view shows."""
    shown, maximum = (catalogue.top, catalogue.spread), catalogue.statistics.maximum
    sequence, position = map(np.min_scalar_type, catalogue.texts.shape)
    fields = {
        "sequence": _to_array(torch.cat([examples.sequence for examples in shown], 1), sequence),
        "position": _to_array(torch.cat([examples.position for examples in shown], 1), position),
        "interval": _to_array(find_interval(catalogue.spread.strength, maximum[:, None]), "u1"),
        "strengths": _to_array(
            torch.cat([_quantise(examples, maximum) for examples in shown], 1), "u1"
        ),
        "histogram": _to_array(catalogue.statistics.histogram, "u4"),
    }
    likeness = {"neighbours": catalogue.neighbours, "partners": catalogue.partners}
    for name, related in likeness.items():
        if related is not None:
            hundredths = (related.likeness.nan_to_num() * HUNDREDTHS).round()
            fields[name] = _to_array(related.units, "i4")
            fields[name + "_likeness"] = _to_array(hundredths, "i1")
    return fields


def _quantise(examples: Examples, maximum: Tensor) -> Tensor:
    """[units, n, WINDOW] strengths in steps of a 255th of the unit's maximum; 0 stays 0 only."""
    strengths = examples.strengths.float()
    strengths[:, :, BEFORE] = examples.strength  # as it is: half precision has a least number
    share = strengths / maximum.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    return torch.where(strengths > 0, (share * LEVELS).round().clamp(1, LEVELS), 0)


def _to_array(values: Tensor, dtype: str | np.dtype) -> np.ndarray:
    return values.detach().cpu().numpy().astype(dtype)


def _describe_layout(fields: Fields) -> list[tuple[str, str, int]]:
    """(name, dtype, numbers of a unit) in the order of the block."""
    return [(name, values.dtype.str[1:], values[0].size) for name, values in fields.items()]


def _pack(fields: Fields) -> str:
    packed = []
    for values in fields.values():
        numbers = values.reshape(-1)
        packed.append(numbers.view("u1").reshape(-1, numbers.itemsize).T.tobytes())
    return base64.b64encode(zlib.compress(b"".join(packed), 6)).decode()
