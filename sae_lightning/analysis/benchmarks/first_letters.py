"""Words and their first letters, in a prompt that asks for letters.

    BOS " the has the first letter: T\\n" " dog has the first letter: D\\n" " cat ...
                                           ^ is read                       ^ is read

Chanin et al. 2024 give ten examples before each word and read the activation at the word's token.
What follows a word cannot change that activation. So here each word of a long prompt is read, and
its line is also an example for the words after it; this takes a tenth of the tokens. The first
words of a prompt have too few examples before them and are not read.
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
WORDS_IN_PROMPT = 32
EXAMPLES = 4  # words at the start of a prompt that are not read
FIT_END, CHOOSE_END = 0.6, 0.8  # shares of the prompts where two parts of `SampleParts` end
MIN_WORDS = 10  # a letter is left out if fewer words in one of the parts begin with it
MIN_F1 = 0.6  # a letter is left out if the F1 of its probe is lower (SAEBench)
L2_PENALTY = 1e-3  # 1e-4 and 3e-3 change the mean F1 of SmolLM2's probes by 0.01


def find_words(vocabulary: list[str]) -> dict[str, int]:
    """Word -> token id, for the tokens that are a space and at least two lower-case letters."""
    return {text[1:]: i for i, text in enumerate(vocabulary) if re.fullmatch(" [a-z]{2,}", text)}


def make_prompt(
    words: list[str], word_ids: dict[str, int], answers: dict[str, list[int]], bos: int
) -> tuple[list[int], list[int]]:
    """The token ids of a prompt that lists `words`, and the position of each word in it.

    word_ids: word -> its token id; answers: letter -> the token ids that follow a word which begins
    with it.
    """
    tokens, positions = [bos], []
    for word in words:
        positions.append(len(tokens))
        tokens += [word_ids[word], *answers[word[0]]]
    return tokens, positions


def read_first_letters(subject: Subject) -> ConceptSamples:
    """Read words in prompts, and fit a probe for each letter; letters with too few words, or that
    the LLM does not know, are left out. UserError if none remains."""
    word_ids = find_words(read_vocabulary(subject.llm))
    all_words = list(word_ids)
    order = torch.randperm(len(all_words), generator=torch.Generator().manual_seed(0))
    words = [all_words[i] for i in order[:MAX_READ_WORDS].tolist()]
    answers = {letter: _encode_answer(subject, letter) for letter in ascii_lowercase}
    line_tokens = 1 + max(map(len, answers.values()))
    size = WORDS_IN_PROMPT
    if subject.context is not None:  # the LLM's limit
        size = min(size, (subject.context - 1) // line_tokens)  # without BOS
    word_lists = [words[i : i + size] for i in range(0, len(words), size)]  # one for each prompt
    samples, shares = [], []  # for each sample, the share of the prompts that precede its own
    for i, listed in enumerate(word_lists):
        samples += listed[EXAMPLES:]
        shares += [i / len(word_lists)] * len(listed[EXAMPLES:])
    share_before = torch.tensor(shares)
    fit = share_before < FIT_END
    choose = ~fit & (share_before < CHOOSE_END)
    parts = SampleParts(fit, choose, ~fit & ~choose)
    labels = torch.tensor([[word[0] == letter for letter in ascii_lowercase] for word in samples])
    frequent = torch.stack([labels[part].sum(dim=0) >= MIN_WORDS for part in parts]).all(dim=0)
    _check_any(subject, frequent, f"{len(words):,} whole words are too few for any letter")
    bos = find_bos_id(subject.tokenizer)
    prompts = [make_prompt(listed, word_ids, answers, bos) for listed in word_lists]
    source, target = _capture(subject, prompts)
    return _fit_probes(subject, samples, source, target, labels, frequent, parts)


def _capture(subject: Subject, prompts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Activations [words that are read, d] at the SAE's source and target, float32 on the CPU, from
    the token ids of each prompt and the positions of its words."""
    sites, longest = distinct_sites([subject.sites]), max(len(tokens) for tokens, _ in prompts)
    # half of a usual batch: a prompt of 32 lines is about twice as long as a usual sequence
    batch, activations = max(1, subject.config.llm.batch // 2), {site: [] for site in sites}
    with phase("reading words", total=len(prompts)) as advance:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            # padded at the end with BOS, which cannot change activations before it
            padded = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids, _ in part])
            places = torch.tensor(  # in the flattened batch
                [
                    i * longest + position
                    for i, (_, positions) in enumerate(part)
                    for position in positions[EXAMPLES:]
                ],
                dtype=torch.long,
            )
            captured = capture(subject.llm.model, padded, sites, places)
            for site in sites:
                activations[site].append(captured[site].float().cpu())
            advance(len(part))
    source, target = (torch.cat(activations[site]) for site in subject.sites)
    return source, target


def _fit_probes(
    subject: Subject,
    samples: list[str],
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    frequent: Tensor,
    parts: SampleParts,
) -> ConceptSamples:
    """Fit a probe for each letter; keep the letters that are `frequent` [letters] and that their
    probe detects. labels: [n, letters]."""
    from sklearn.metrics import f1_score

    x = target - target[parts.fit].mean(dim=0)
    x /= x[parts.fit].square().mean().sqrt()  # so that the penalty means the same at any scale
    with phase("fitting probes of letters"):
        weights, biases = fit_one_against_rest(x[parts.fit], labels[parts.fit], l2=L2_PENALTY)
    detected = x @ weights.T + biases > 0
    f1 = [
        f1_score(labels[parts.test, c], detected[parts.test, c], zero_division=0.0)
        for c in range(len(ascii_lowercase))
    ]
    is_kept = frequent & (torch.tensor(f1) >= MIN_F1)
    best = max(f1[c] for c in frequent.nonzero().squeeze(1).tolist())
    _check_any(
        subject, is_kept, f"no first letter is known (the best probe has an F1 of {best:.2f})"
    )
    kept = is_kept.nonzero().squeeze(1).tolist()
    return ConceptSamples(
        noun="letter",
        concepts=[ascii_lowercase[c] for c in kept],
        names=samples,
        source=source,
        target=target,
        labels=labels[:, kept],
        detected=detected[:, kept],
        directions=normalize(weights[kept], dim=1),
        parts=parts,
        probe_f1=[f1[c] for c in kept],
    )


def _check_any(subject: Subject, letters: Tensor, why: str) -> None:
    """UserError that says `why` if no element of the mask `letters` is True."""
    if not letters.any():
        raise UserError(
            f"suite=absorption: {why} in llm.name={subject.config.llm.name}, {subject.sites}; "
            "choose a larger LLM or another layer"
        )


def _encode_answer(subject: Subject, letter: str) -> list[int]:
    """Token ids of the text that a prompt has after each word that begins with `letter`."""
    encode, word = subject.tokenizer.encode, "a"  # any word; its tokens are cut off below
    line = encode(f"{word} has the first letter: {letter.upper()}\n", add_special_tokens=False)
    return line[len(encode(word, add_special_tokens=False)) :]
