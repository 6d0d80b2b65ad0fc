"""Packing and order: no token lost or repeated, every order reproducible and resumable."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset
from small_text import BOS, SEPARATOR, STYLES, byte_tokenizer, story

from sae_lightning.errors import UserError
from sae_lightning.files import LOCK_FILE
from sae_lightning.stream import open_text, streamed_tokens
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.flat import hash_tokenizer, tokenise_documents, tokenise_indexed
from sae_lightning.stream.hub import HubConfig
from sae_lightning.stream.indexed_tokens import IndexedTokens
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.packing import Packing
from sae_lightning.stream.tokens import open_tokens
from sae_lightning.terminal import console


def text(documents: list[str], style: str, held_out: tuple[str, ...] = ()) -> SplitDocuments:
    return SplitDocuments(*(part_of(list(part), style) for part in (documents, held_out)))


def part_of(documents: list[str], style: str):
    if style == "indexed":
        return Dataset.from_dict({"text": documents})
    streamed = Dataset.from_dict({"text": [*documents, "one too many"]}).to_iterable_dataset()
    return streamed.take(len(documents))


def source(documents: list[str], style: str, tokenizer, context: int = 6, seed: int = 0):
    return open_tokens(text(documents, style), tokenizer, context=context, seed=seed).train


def epoch_of(train) -> torch.Tensor:
    """All sequences of the epoch that `train` serves next, one at a time."""
    epoch, served = train.epoch, []
    while True:
        ahead = copy.deepcopy(train.state_dict())
        sequences = train.next(1).tokens
        if train.epoch != epoch:
            train.load_state_dict(ahead)
            return torch.cat(served)
        served.append(sequences)


def as_text(tokens: list[int]) -> str:
    return byte_tokenizer().decode(tokens)


@pytest.fixture(autouse=True)
def messages(monkeypatch) -> list[str]:
    """Output at the terminal."""
    lines: list[str] = []
    monkeypatch.setattr(console, "print", lambda line: lines.append(line))
    return lines


def test_packing_by_hand(tokenizer):
    #   documents        "abcde"          "f"      "ghi"
    #   token stream     a  b  c  d  e  / f  /  g  h  i  /
    #   windows of 5     └─────┬──────┘ └──────┬──────┘ └──┬──...
    #                    a  b  c  d  e  / f  /  g  h   i  /  + 3 separators
    flat = tokenise_indexed(
        Dataset.from_dict({"text": ["abcde", "f", "", "ghi"]}), tokenizer, SEPARATOR
    )
    a, b, c, d, e, f, g, h, i = (tokenizer.encode(letter)[0] for letter in "abcdefghi")
    assert len(flat) == 12
    train = source(["abcde", "f", "", "ghi"], "streamed", tokenizer)
    train.seed = None  # the documents in their own order
    train._begin(1)
    assert train.next(3).tokens.tolist() == [
        [BOS, a, b, c, d, e],
        [BOS, SEPARATOR, f, SEPARATOR, g, h],
        [BOS, i, SEPARATOR, SEPARATOR, SEPARATOR, SEPARATOR],
    ]
    indexed = source(["abcde", "f", "", "ghi"], "indexed", tokenizer)
    assert sorted(indexed.next(3).tokens.tolist()) == sorted(
        [
            [BOS, a, b, c, d, e],
            [BOS, SEPARATOR, f, SEPARATOR, g, h],
            [BOS, i, SEPARATOR, SEPARATOR, SEPARATOR, SEPARATOR],
        ]
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("context", [2, 7, 64])
def test_an_indexed_epoch_holds_every_token_exactly_once(tokenizer, seed, context):
    documents = story(seed)
    train = source(documents, "indexed", tokenizer, context, seed)
    sequences = epoch_of(train)
    assert (sequences[:, 0] == BOS).all()
    # back into the order of the text: window numbers are the order that was served
    ordered = sequences[torch.from_numpy(np.argsort(train._order))][:, 1:].flatten().tolist()
    expected = np.concatenate(tokenise_documents(tokenizer, documents, SEPARATOR)).tolist()
    assert ordered[: len(expected)] == expected
    assert set(ordered[len(expected) :]) <= {SEPARATOR}
    assert len(ordered) - len(expected) < context - 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("context", [2, 7, 64])
def test_a_streamed_epoch_holds_every_document_exactly_once(tokenizer, seed, context, monkeypatch):
    monkeypatch.setattr(streamed_tokens, "STREAMED_CHARACTERS", 40)
    documents = story(seed)
    sequences = epoch_of(source(documents, "streamed", tokenizer, context, seed))
    assert (sequences[:, 0] == BOS).all()
    flat = sequences[:, 1:].flatten().tolist()
    read = as_text(flat).split("</s>")
    count = sum(len(d) + 1 for d in documents if d)
    assert len(flat) - count < context - 1
    assert Counter(d for d in read if d) == Counter(d for d in documents if d)
    assert [d for d in read if d] != [d for d in documents if d], "shuffled"


@pytest.mark.parametrize("style", STYLES)
def test_an_epoch_has_a_new_order_and_the_same_tokens(tokenizer, style, messages):
    documents = story(1)
    train = source(documents, style, tokenizer, context=6)
    first, second = epoch_of(train), None
    train.next(1)
    assert train.epoch == 2
    count = sum(len(d) + 1 for d in documents if d)
    expected = (
        f"the text ran out after {count:,} tokens; going round again in a new order (epoch 2)"
    )
    assert messages[-1] == expected
    train = source(documents, style, tokenizer, context=6)
    train._begin(2)
    second = epoch_of(train)
    assert not torch.equal(first, second)
    letters = [Counter(part[:, 1:].flatten().tolist()) for part in (first, second)]
    assert letters[0] == letters[1]


@pytest.mark.parametrize("style", STYLES)
def test_the_seed_fixes_the_order(tokenizer, style):
    def order(seed):
        return source(story(2), style, tokenizer, seed=seed).next(50).tokens

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))


@pytest.mark.parametrize("style", STYLES)
def test_every_sequence_has_its_own_id_across_epochs(tokenizer, style):
    train = source(story(2), style, tokenizer)
    ids = torch.cat([train.next(n).sequence_ids for n in (1, 30, 7, 200, 5)])
    assert train.epoch > 2
    assert len(ids.unique()) == len(ids) == 243
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("style", STYLES)
def test_serving_one_at_a_time_equals_serving_many(tokenizer, style):
    one, many = source(story(3), style, tokenizer), source(story(3), style, tokenizer)
    singles = torch.cat([one.next(1).tokens for _ in range(150)])
    assert torch.equal(singles, torch.cat([many.next(50).tokens for _ in range(3)]))


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_opened_anew_begins_again_and_leaves_the_first_where_it_is(tokenizer, style):
    train = source(story(3), style, tokenizer)
    first = train.next(3).tokens
    again = train.reopen()
    assert torch.equal(again.next(3).tokens, first)
    assert torch.equal(again.next(2).tokens, train.next(2).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_resuming_is_exact_at_every_sequence(tokenizer, style, monkeypatch):
    monkeypatch.setattr(streamed_tokens, "STREAMED_CHARACTERS", 40)
    monkeypatch.setattr(streamed_tokens, "SHUFFLE_BUFFER", 5)
    documents = story(4)
    train = source(documents, style, tokenizer)
    reference = source(documents, style, tokenizer).next(260)
    assert epoch_of(source(documents, style, tokenizer)).shape[0] < 100, "several epochs"
    for place in range(0, 200):
        state = pickle.loads(pickle.dumps(train.state_dict()))
        resumed = source(documents, style, tokenizer)
        resumed.load_state_dict(state)
        if place % 7 == 0 or 60 < place < 80:
            continued = resumed.next(60)
            assert torch.equal(continued.tokens, reference.tokens[place : place + 60])
            assert torch.equal(continued.sequence_ids, reference.sequence_ids[place : place + 60])
        train.next(1)


def unreliable():
    yield {"text": "abcdefgh"}
    raise ConnectionError("the hub went away\nfor good")


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_stream_that_breaks_off_says_how_to_go_on(tokenizer, part):
    data = IterableDataset.from_generator(unreliable)
    tokens = open_tokens(SplitDocuments(data, data, "data.name=a/b"), tokenizer, context=6, seed=0)
    read = {
        "train": lambda: tokens.train.next(1),
        "held_out": lambda: tokens.held_out.pick_sequences(9),
    }
    expected = r"^data.name=a/b: reading it broke off \(the hub went away\); .*resume=<run folder>$"
    with pytest.raises(UserError, match=expected) as error:
        read[part]()
    assert isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize("value", [7, 0, ["a"], {"a": 1}])
def test_a_streamed_row_that_holds_no_text_is_told(tokenizer, value):
    data = IterableDataset.from_generator(lambda: iter([{"text": "ab"}, {"text": value}]))
    tokens = open_tokens(SplitDocuments(data, data, "data.name=a/b"), tokenizer, context=6, seed=0)
    told = rf"^data.name=a/b: a row holds {type(value).__name__} in place of text \(.*data.column$"
    with pytest.raises(UserError, match=told):
        tokens.train.next(9)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, UserError("as it is")])
def test_a_stream_explains_nobody_elses_errors(tokenizer, raised):
    train = source(["abc"], "streamed", tokenizer)

    def rows():
        raise raised
        yield

    train._documents = rows()
    with pytest.raises(raised if isinstance(raised, type) else UserError) as error:
        train.next(1)
    assert "broke off" not in str(error.value)


def test_resuming_with_another_text_is_refused(tokenizer):
    state = source(["abc", "def"], "indexed", tokenizer).state_dict()
    with pytest.raises(UserError, match="has 4 tokens but the run to be resumed read one of 8"):
        source(["abc"], "indexed", tokenizer).load_state_dict(state)


@pytest.mark.parametrize("style", STYLES)
def test_resuming_with_a_changed_text_of_as_many_tokens_is_refused(tokenizer, style):
    train = source(story(3), style, tokenizer)
    train.next(20)
    state, swapped = train.state_dict(), str.maketrans("ab", "ba")
    changed = source([text.translate(swapped) for text in story(3)], style, tokenizer)
    with pytest.raises(UserError, match="no longer the one that the run to be resumed read"):
        changed.load_state_dict(state)
    del state["text"]  # like states of versions that saved no text
    changed.load_state_dict(state)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("documents", [["", ""], []])
def test_text_without_a_token_is_refused(tokenizer, style, documents):
    with pytest.raises(UserError, match="the text holds no token to train on"):
        source(documents, style, tokenizer).next(1)


@pytest.mark.parametrize("style", STYLES)
def test_text_that_is_all_held_out_is_refused(tokenizer, style):
    with pytest.raises(UserError, match="data: no text is held out"):
        open_tokens(text(["abc"], style), tokenizer, context=6, seed=0).held_out.pick_sequences(3)


def test_held_out_windows_are_spread_over_all_documents(tokenizer):
    held_out = ("a" * 99, "b" * 99, "c" * 99)
    tokens = open_tokens(text(["x"], "indexed", held_out), tokenizer, context=11, seed=0).held_out
    taken = tokens.pick_sequences(6)
    assert taken.shape == (6, 11)
    assert "".join(sorted(set(as_text(taken[:, 1:].flatten().tolist())) & set("abc"))) == "abc"
    assert torch.equal(taken, tokens.pick_sequences(6))
    everything = tokens.pick_sequences(1000)
    assert everything.shape == (30, 11), "no more than there are"
    assert as_text(everything[:, 1:].flatten().tolist()) == "</s>".join([*held_out, ""])


def test_streamed_held_out_windows_are_the_first_ones(tokenizer):
    tokens = open_tokens(
        text(["x"], "streamed", ("abcd", "efg")), tokenizer, context=5, seed=0
    ).held_out
    assert [as_text(row) for row in tokens.pick_sequences(9).tolist()] == ["<s>abcd", "<s></s>efg"]
    assert len(tokens.pick_sequences(1)) == 1


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_never_sees_padding(tokenizer, style):
    tokens = open_tokens(text(["x"], style, ("abc",)), tokenizer, context=128, seed=0).held_out
    assert [as_text(row) for row in tokens.pick_sequences(9).tolist()] == ["<s>abc</s>"]


def test_training_never_serves_held_out_text(tokenizer, tmp_path):
    # Each document has a letter of its own, so a token says which document it is from.
    documents = [chr(ord("a") + i) * 9 for i in range(26)]
    lines = "\n".join(f'{{"text": "{d}"}}' for d in documents)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(lines)
    for config in (
        LocalConfig(path=str(tmp_path / "data"), held_out=0.2),
        HubConfig(name=str(tmp_path / "data"), held_out_documents=5),
        HubConfig(name=str(tmp_path / "data"), held_out_documents=5, streaming=False),
    ):
        tokens = open_tokens(open_text(config), tokenizer, context=6, seed=0)
        train = set(tokens.train.next(200).tokens[:, 1:].unique().tolist()) - {SEPARATOR}
        held_out = set(tokens.held_out.pick_sequences(99)[:, 1:].unique().tolist()) - {SEPARATOR}
        assert (len(train), len(held_out)) == (21, 5)
        assert not train & held_out


def test_sequences_run_across_the_pieces_in_which_text_is_stored():
    whole = np.arange(13, dtype=np.int32)
    pieces = whole[:5], whole[5:5], whole[5:8], whole[8:]
    one, other = (
        IndexedTokens(pa.chunked_array(parts), Packing(4, BOS, SEPARATOR), seed=0)
        for parts in ([whole], pieces)
    )
    assert torch.equal(one.next(9).tokens, other.next(9).tokens)
    assert one.fingerprint() == other.fingerprint()


def test_text_on_disk_is_tokenised_once_and_read_through_the_memory_map(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 50)
    (tmp_path / "b.txt").write_text("world " * 50)
    (tmp_path / "c.txt").write_text("third " * 50)
    config = LocalConfig(path=str(tmp_path / "*.txt"), held_out=0.3)
    folder, calls = Path(datasets.config.HF_DATASETS_CACHE) / "sae_lightning", []
    left = folder / ".tokens.abcdefgh.tmp"  # by a process that was killed
    left.mkdir(parents=True)
    (left / LOCK_FILE).touch()

    class Counting:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, texts, **options):
            calls.append(len(texts))
            return tokenizer(texts, **options)

    flats = [tokenise_indexed(open_text(config).train, Counting(), SEPARATOR) for _ in range(2)]
    assert calls == [2], "the second time it comes from the cache"
    assert len(flats[0]) == len(flats[1]) == 602
    assert flats[1] == flats[0]
    assert not flats[0].slice(3, 90).to_numpy().flags.owndata, "a view, not a copy"
    assert {file.suffix for file in folder.iterdir()} == {".arrow"}
    assert len(tokenise_indexed(open_text(config).train, Counting(), 0)) == 602
    assert calls == [2, 2], "another separator is another text"


def test_the_tokenizer_hash_follows_its_behaviour_and_nothing_else(tokenizer):
    before = hash_tokenizer(tokenizer)
    tokenizer(["a", "bc"], truncation=True, max_length=1)  # stays set in its backend
    assert hash_tokenizer(tokenizer) == before
    changed = byte_tokenizer()
    changed.add_tokens(["hello"])
    assert hash_tokenizer(changed) != before


@pytest.mark.slow
def test_the_tokenizer_hash_is_the_same_in_another_process(tokenizer):
    code = (
        "from tests.small_text import byte_tokenizer\n"
        "from sae_lightning.stream.flat import hash_tokenizer\n"
        "import sys; sys.stdout.write(hash_tokenizer(byte_tokenizer()))"
    )
    folder = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    assert out.stdout == hash_tokenizer(tokenizer)
