"""An indexed text as one long run of tokens that may be larger than memory."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sae_lightning.files import clean, private_folder
from sae_lightning.llm.quiet import quiet
from sae_lightning.terminal import phase

BATCH = 256  # documents tokenised at a time


def encode(tokenizer: Any, texts: list[str | None], separator: int) -> list[np.ndarray]:
    """Tokenise documents, each closed by the separator -> arrays [tokens + 1] int32.

    A document without tokens gives an empty array. `verbose=False` because a document longer than
    the LLM's window is no mistake here: it is cut into sequences.
    """
    ids = tokenizer(
        [text or "" for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return [np.asarray([*document, separator] if document else [], np.int32) for document in ids]


def flat_tokens(data: Any, tokenizer: Any, separator: int, what: str = "text") -> pa.ChunkedArray:
    """Tokenise an indexed data set once -> [tokens] int32; on disk if the data set is.

    The file is found again by the data, the tokenizer's behaviour and the separator, so the next
    run with the same three opens it in no time. Slices read it through the memory map.
    """
    import datasets

    key = hashlib.sha256()
    for part in (data._fingerprint, tokenizer_hash(tokenizer), str(separator)):
        key.update(part.encode())
    fingerprint = key.hexdigest()[:32]
    file = None
    if data.cache_files:  # our own place: beside a saved data set may not be writable
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "sae_lightning"
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        file = folder / f"tokens-{fingerprint}.arrow"
    with quiet(), phase(f"tokenising the {what}", total=len(data)) as advance:

        def tokenise(batch: dict[str, list[str | None]]) -> dict[str, list[np.ndarray]]:
            tokens = encode(tokenizer, batch["text"], separator)
            advance(len(tokens))
            return {"tokens": tokens}

        map_to = partial(
            data.map,
            tokenise,
            batched=True,
            batch_size=BATCH,
            remove_columns=["text"],
            features=datasets.Features({"tokens": datasets.List(datasets.Value("int32"))}),
            # given, because hashing the function would hash the tokenizer object: slow, and
            # different from process to process
            new_fingerprint=fingerprint,
        )
        if file and not file.exists():
            with private_folder(file) as place:  # for the temporary files of `map`, too
                map_to(cache_file_name=str(place / file.name))
                if (place / file.name).exists():  # not of a text without documents
                    os.replace(place / file.name, file)
        tokenised = map_to(cache_file_name=file and str(file))
    documents = tokenised.data.column("tokens").chunks if len(tokenised) else []
    return pa.chunked_array([chunk.flatten() for chunk in documents], pa.int32())


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python: its class and its vocabulary
        behaviour: Any = sorted(tokenizer.get_vocab().items())
    else:
        behaviour = json.loads(backend.to_str())
        for call in ("truncation", "padding"):  # set by whoever called it last, not by us
            behaviour.pop(call, None)
    text = json.dumps([type(tokenizer).__name__, behaviour], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
