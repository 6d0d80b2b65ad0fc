"""A tokenizer with one token per byte, and documents of random letters."""

import random

from transformers import PreTrainedTokenizerFast

from benchmarks.timing.models import make_byte_tokenizer

STYLES = ["indexed", "streamed"]
BOS, SEPARATOR = 256, 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, at most 8 tokens: code must not let it warn about longer texts, because
    warnings are errors in tests."""
    tokenizer = make_byte_tokenizer()
    tokenizer.model_max_length = 8
    return tokenizer


def story(seed: int, documents: int = 25) -> list[str]:
    """Documents of 0 to 30 letters, some of them longer than several windows, some empty."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=rng.randrange(31))) for _ in range(documents)]
