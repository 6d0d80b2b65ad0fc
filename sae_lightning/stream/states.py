"""Checks saved states before anything is built from them.

States come from checkpoints and shared caches, which may be damaged or not to be trusted.
"""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site

ANY_COUNT = range(2**62)
LLM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect(value: Any, like: Any, name: str) -> None:
    """Raise ValueError about `name` unless `value` matches `like`: a tensor of the same shape and
    dtype, a range of ints, a type, an equal value, or a dict whose values are any of these."""
    if isinstance(like, dict):
        expect(value, dict, name)
        for key, inner in like.items():
            if key not in value:
                raise ValueError(f"{name} lacks {key}")
            expect(value[key], inner, f"{name}.{key}")
        return
    if isinstance(like, Tensor):
        expected = _describe_tensor(like)
        matches = isinstance(value, Tensor) and _describe_tensor(value) == expected
    elif isinstance(like, range):
        expected = f"{like.start} to {like.stop - 1}" if like else "no number"
        matches = type(value) is int and value in like
    elif isinstance(like, type):
        expected, matches = like.__name__, type(value) is like
    else:
        expected, matches = repr(like), type(value) is type(like) and value == like
    if not matches:
        actual = repr(value) if isinstance(value, int | float) else type(value).__name__
        actual = _describe_tensor(value) if isinstance(value, Tensor) else actual
        raise ValueError(f"{name} is {actual} and should be {expected}")


def _describe_tensor(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def expect_ids(ids: Any, n: int, stop: int, name: str, dtype: torch.dtype = torch.int64) -> None:
    """Raise ValueError unless `ids` [n], of tokens or sequences, are from 0 to `stop` - 1."""
    expect(ids, torch.empty(n, dtype=dtype, device="meta"), name)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < stop:
        raise ValueError(f"{name} holds {int(ids.min())} to {int(ids.max())}, not below {stop}")


def expect_rows(
    state: Any, sites: Iterable[Site], *, batch: int, context: int, vocabulary: int
) -> int:
    """Raise ValueError unless `state` is a possible state of `LLMRows` in batches of `batch`
    sequences; returns the number of sequences whose rows were served."""
    expect(state, {"llm_batches": ANY_COUNT, "tokens": dict}, "rows")
    expect(state, {"read": range(state["llm_batches"] + 1)}, "rows")
    medians = state.get("medians")
    expect(state, {"medians": dict if medians else type(None)}, "rows")
    if medians:
        expect(medians, {str(site): float for site in sites}, "rows.medians")
        if not all(0 < median < inf for median in medians.values()):
            raise ValueError("rows.medians: a median norm is not positive and finite")
    tokens, sequences_read = state["tokens"], state["read"] * batch
    pattern = {"epoch": range(1, ANY_COUNT.stop)}
    if "texts" in tokens or "cursor" in tokens:  # a mixture, or one indexed text
        texts, position = tokens.get("texts", [tokens]), 0
        expect(texts, list, "tokens.texts")
        for text in texts:
            expect(text, pattern | {"tokens": range(1, ANY_COUNT.stop)}, "tokens")
            windows = -(-text["tokens"] // (context - 1))  # BOS takes one position
            expect(text, {"cursor": range(windows + 1)}, "tokens")
            position += (text["epoch"] - 1) * windows + text["cursor"]
        expect(position, sequences_read, "the text's position")
    else:
        pattern |= {"documents": ANY_COUNT, "read": ANY_COUNT, "served": sequences_read}
        expect(tokens, pattern | {"carry": Tensor}, "tokens")
        carry = tokens["carry"]
        expect_ids(carry, carry.numel(), vocabulary, "tokens.carry", torch.int32)
    return state["llm_batches"] * batch


def expect_activations(rows: Any, widths: Mapping[Site, int], n: int, name: str) -> None:
    """Raise ValueError unless `rows` holds activations [n, width] at each site of `widths`, in a
    dtype that LLMs compute in."""
    for site, width in widths.items():
        expect(rows, {str(site): Tensor}, name)
        dtype = rows[str(site)].dtype
        expected_dtype = dtype if dtype in LLM_DTYPES else torch.float32
        like = torch.empty(n, width, dtype=expected_dtype, device="meta")
        expect(rows[str(site)], like, f"{name}.{site}")


def expect_stream(
    state: Any, widths: Mapping[Site, int], *, capacity: int, served: int, sequences: int
) -> None:
    """Raise ValueError unless `state` is a possible state of a stream after `served` batches: its
    pool holds at most `capacity` rows of these `widths`, with ids below `sequences`."""
    pattern = {"rows": dict, "ids": Tensor, "random": dict}
    expect(state, {"served": served, "rows": dict, "pool": pattern}, "stream")
    pool = state["pool"]
    n = len(pool["ids"]) if pool["ids"].ndim else 0
    expect(n, range(capacity + 1), "rows in the pool")
    expect_ids(pool["ids"], n, sequences, "pool.ids")
    expect_activations(pool["rows"], widths, n, "pool.rows")
    np.random.PCG64().state = pool["random"]  # raises an error if it is no state of a PCG64


class TextChanged(UserError):
    """The text, or file of activations, is not the one that a run or cache was made from."""


def check_text(state: dict[str, Any], fingerprint: str | int) -> None:
    """Raise TextChanged if `state` was saved with a text of another `fingerprint`."""
    if state.get("text", fingerprint) != fingerprint:
        raise TextChanged(
            "data: the text is no longer the one that the run to be resumed read "
            f"({fingerprint}, not {state['text']}); resume with the same data settings and files, "
            "and the version of sae_lightning that it was begun with"
        )
