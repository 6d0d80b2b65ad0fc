"""Words and their first letters, in a prompt that asks for letters.

    BOS " the has the first letter: T\\n" " dog has the first letter: D\\n" " cat ...
                                           ^ is read                       ^ is read

Chanin et al. 2024 give ten examples before each word and read the word's token. What follows a word
cannot change its activation, so here each word of a long prompt is read, and is an example for
those after it, which takes a tenth of the tokens. The first words, which have too few examples, are
not read.
"""

import re
from string import ascii_lowercase

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.analysis.benchmarks.absorption import (
    ConceptSamples,
    SampleParts,
    fit_one_against_rest,
)
from sae_lightning.analysis.subject import Subject
from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import distinct_sites
from sae_lightning.llm.vocabulary import find_bos_id, read_vocabulary
from sae_lightning.terminal import phase

MAX_READ_WORDS = 16_384
WORDS_IN_PROMPT, EXAMPLES = 32, 4
FITTED_SHARE, CHOSEN_SHARE = 0.6, 0.2  # of the prompts; the others are tested
MIN_WORDS = 10  # of a letter, in each part
MIN_F1 = 0.6  # of a letter's probe, for the letter to be tested (SAEBench)
L2_PENALTY = 1e-3  # 1e-4 and 3e-3 change the mean F1 of SmolLM2's probes by 0.01


def find_words(vocabulary: list[str]) -> dict[str, int]:
    """Word -> token id, for the tokens that are a space and at least two lower-case letters."""
    return {text[1:]: i for i, text in enumerate(vocabulary) if re.fullmatch(" [a-z]{2,}", text)}


def make_prompt(
    words: list[str], ids: dict[str, int], answers: dict[str, list[int]], bos: int
) -> tuple[list[int], list[int]]:
    """The token ids of a prompt, and the position of each word in it."""
    tokens, positions = [bos], []
    for word in words:
        positions.append(len(tokens))
        tokens += [ids[word], *answers[word[0]]]
    return tokens, positions


def read_first_letters(subject: Subject) -> ConceptSamples:
    """Read words in prompts, and fit a probe for each letter; letters with too few words, or that
    the LLM does not know, are left out. UserError if none remains."""
    ids = find_words(read_vocabulary(subject.llm))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:MAX_READ_WORDS]
    words = [list(ids)[i] for i in order.tolist()]
    answers = {letter: _encode_answer(subject, letter) for letter in ascii_lowercase}
    line = 1 + max(map(len, answers.values()))
    count = min(WORDS_IN_PROMPT, ((subject.context or MAX_READ_WORDS) - 1) // line)
    chunks = [words[i : i + count] for i in range(0, len(words), count)]
    samples = [word for chunk in chunks for word in chunk[EXAMPLES:]]
    place = torch.tensor([i / len(chunks) for i, c in enumerate(chunks) for _ in c[EXAMPLES:]])
    fit = place < FITTED_SHARE
    choose = ~fit & (place < FITTED_SHARE + CHOSEN_SHARE)
    parts = SampleParts(fit, choose, ~fit & ~choose)
    labels = torch.tensor([[word[0] == letter for letter in ascii_lowercase] for word in samples])
    enough = torch.stack([labels[part].sum(dim=0) >= MIN_WORDS for part in parts]).all(dim=0)
    _check(subject, enough, f"{len(words):,} whole words are too few for any letter")
    bos = find_bos_id(subject.tokenizer)
    source, target = _capture(subject, [make_prompt(c, ids, answers, bos) for c in chunks])
    return _fit_probes(subject, samples, source, target, labels, enough, parts)


def _capture(subject: Subject, prompts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Activations [words that are read, d] at the SAE's source and target, float32 on the CPU."""
    sites, longest = distinct_sites([subject.sites]), max(len(tokens) for tokens, _ in prompts)
    batch, rows = max(1, subject.config.llm.batch // 2), {site: [] for site in sites}
    with phase("reading words", total=len(prompts)) as advance:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            tokens = torch.tensor([t + t[:1] * (longest - len(t)) for t, _ in part])
            at = [i * longest + p for i, (_, places) in enumerate(part) for p in places[EXAMPLES:]]
            captured = capture(subject.llm.model, tokens, sites, torch.tensor(at, dtype=torch.long))
            for site in sites:
                rows[site].append(captured[site].float().cpu())
            advance(len(part))
    source, target = (torch.cat(rows[site]) for site in subject.sites)
    return source, target


def _fit_probes(
    subject: Subject,
    samples: list[str],
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    enough: Tensor,
    parts: SampleParts,
) -> ConceptSamples:
    """Fit a probe for each letter, and keep the letters with `enough` words that it detects."""
    from sklearn.metrics import f1_score

    x = target - target[parts.fit].mean(dim=0)
    x /= x[parts.fit].square().mean().sqrt()
    with phase("fitting probes of letters"):
        weights, biases = fit_one_against_rest(x[parts.fit], labels[parts.fit], l2=L2_PENALTY)
    detected = x @ weights.T + biases > 0
    f1 = [
        f1_score(labels[parts.test, c], detected[parts.test, c], zero_division=0.0)
        for c in range(len(ascii_lowercase))
    ]
    known = enough & (torch.tensor(f1) >= MIN_F1)
    best = max(f1[c] for c in enough.nonzero().squeeze(1).tolist())
    _check(subject, known, f"no first letter is known (the best probe has an F1 of {best:.2f})")
    kept = known.nonzero().squeeze(1).tolist()
    return ConceptSamples(
        noun="letter",
        concepts=[ascii_lowercase[c] for c in kept],
        names=samples,
        source=source,
        target=target,
        labels=labels[:, known],
        detected=detected[:, known],
        directions=normalize(weights[known], dim=1),
        parts=parts,
        probe_f1=[f1[c] for c in kept],
    )


def _check(subject: Subject, letters: Tensor, why: str) -> None:
    if not letters.any():
        raise UserError(
            f"suite=absorption: {why} in llm.name={subject.config.llm.name}, {subject.sites}; "
            "choose a larger LLM or another layer"
        )


def _encode_answer(subject: Subject, letter: str) -> list[int]:
    """Token ids of what follows a word in a prompt."""
    encode, front = subject.tokenizer.encode, "a"
    line = encode(f"{front} has the first letter: {letter.upper()}\n", add_special_tokens=False)
    return line[len(encode(front, add_special_tokens=False)) :]
