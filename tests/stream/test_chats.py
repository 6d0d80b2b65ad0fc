"""Conversations: through the chat template, with the assistant's tokens told from others."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_text import byte_tokenizer

from sae_lightning import UserError
from sae_lightning.llm.load import LLM
from sae_lightning.stream import open_text
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.tokens import open_tokens

# each message on a line: U Hi / A Hello
PLAIN = (
    "{% for m in messages %}{{ m['role'][0]|upper + ' ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'][0]|upper + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
# as Qwen3 drops earlier thoughts
REWRITING = (
    "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}x"
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
TEXT = "U Hi\nA Hello\nU Bye\nA So long\n"


def with_template(template: str | None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(folder, *talks, name: str = "a.jsonl", column: str = "messages"):
    file = folder / name
    file.write_text("\n".join(json.dumps({"id": n, column: t}) for n, t in enumerate(talks)))
    return file


def open_chats(file, template=PLAIN, context=64, **settings):
    config = LocalConfig(path=str(file), chat=True, context=context, **settings)
    return open_tokens(open_text(config), with_template(template), context=context, seed=0)


def read_epoch(tokens) -> list[tuple[str, str]]:
    """(text, the part of it that is trained on) of each sequence of an epoch."""
    sequences, decode = tokens.train.next(tokens.train.window_count), byte_tokenizer().decode
    return [
        tuple(decode(part, skip_special_tokens=True) for part in (row, row[kept]))
        for row, kept in zip(sequences.tokens, sequences.is_text, strict=True)
    ]


def read_one(file, template=PLAIN, **settings) -> tuple[str, str]:
    (only,) = read_epoch(open_chats(file, template, held_out=0.5, **settings))
    return only


def test_a_conversation_goes_through_the_template_and_all_of_it_is_trained_on(tmp_path):
    text, trained = read_one(write(tmp_path, TALK, TALK))
    assert text == TEXT
    assert trained == TEXT


@pytest.mark.parametrize(
    ("template", "trained"), [(PLAIN, "Hello\nSo long\n"), (MARKED, "HelloSo long")]
)
def test_only_what_the_assistant_wrote_is_trained_on(tmp_path, template, trained):
    """By the template's own marks, or else by what a message adds to those before it."""
    read, kept = read_one(write(tmp_path, TALK, TALK), template, assistant_only=True)
    assert read == TEXT, "the LLM reads all of it"
    assert kept == trained


def test_every_token_of_every_conversation_is_in_one_window(tmp_path):
    talks = [[{"role": "user", "content": "ab" * n}, TALK[1]] for n in range(1, 20)]
    tokens = open_chats(write(tmp_path, *talks), context=8, held_out=0.2, assistant_only=True)
    kept = "".join(kept for _, kept in read_epoch(tokens))
    assert sorted(kept) == sorted(15 * "Hello\n")


def test_files_of_all_kinds_hold_the_same_conversations(tmp_path):
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    lines = write(tmp_path, TALK[:2], TALK[:2])
    gpt = write(tmp_path, shared, shared, name="b.jsonl", column="conversations")
    own = write(tmp_path, TALK[:2], TALK[:2], name="c.jsonl", column="talk")
    array = tmp_path / "d.json"
    array.write_text(json.dumps([{"messages": TALK[:2]}] * 2))
    pq.write_table(pa.table({"messages": [TALK[:2]] * 2}), tmp_path / "e.parquet")
    wanted = "U Hi\nA Hello\n"
    for file in (lines, gpt, array, tmp_path / "e.parquet"):
        assert read_one(file)[0] == wanted, file
    assert read_one(own, column="talk")[0] == wanted


def test_conversations_are_held_out_as_a_whole(tmp_path):
    talks = [[{"role": "user", "content": "x" * 1000}], *([TALK] * 9)]
    split = open_text(LocalConfig(path=str(write(tmp_path, *talks)), chat=True, held_out=0.2))
    assert (len(split.train), len(split.held_out)) == (8, 2)


BAD = {
    "no column": (
        {"text": "a"},
        r"row 2 of .*a\.jsonl has no messages, a list of messages",
    ),
    "no list": ({"messages": "Hi"}, r"row 2 of .*a\.jsonl: messages is not a list of messages"),
    "empty": ({"messages": []}, r"row 2 of .*a\.jsonl: messages is not a list of messages"),
    "no role": ({"messages": [{"content": "Hi"}]}, r"row 2 of .*message \"\{'content': 'Hi'\}\""),
    "no text": ({"messages": [{"role": "user", "content": [1]}]}, r"row 2 of .* needs a `role`"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_number(tmp_path, name):
    row, message = BAD[name]
    rows = [{"messages": TALK}, row]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=rf"^data\.path=.*{message}") as error:
        open_chats(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ['{"messages": [', "\ufeff" + json.dumps({"messages": TALK})])
def test_a_file_that_is_not_json_to_its_end_is_refused(tmp_path, end):
    """Silently, training would read the conversations before that place only."""
    file = write(tmp_path, TALK, TALK)
    file.write_text(f"{file.read_text()}\n{end}")
    with pytest.raises(UserError, match=r"^data\.path=.*a\.jsonl is not valid JSON after row 2 \("):
        open_chats(file)


def test_a_template_that_fails_names_the_row(tmp_path):
    file = write(tmp_path, TALK, TALK[1:], TALK[1:])
    with pytest.raises(UserError, match=r"^row [23] of .*: the LLM's chat template fails \(a us"):
        open_chats(file, STRICT, held_out=0.3)
    with pytest.raises(UserError, match=r"^row . of .*: the LLM's chat template changes a message"):
        open_chats(file, REWRITING, held_out=0.3, assistant_only=True)
    with pytest.raises(UserError, match=r"^data\.chat=true: the LLM's tokenizer has no chat templ"):
        open_chats(file, None)


def test_settings_and_files_without_conversations_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^data\.assistant_only=true has no meaning without"):
        LocalConfig(path="a", assistant_only=True)
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(UserError, match=r"^data\.chat=true: .* holds no conversations; give"):
        open_chats(tmp_path / "a.txt")


def test_another_template_tokenises_anew(tmp_path):
    file = write(tmp_path, TALK, TALK)
    assert read_one(file)[0] != read_one(file, PLAIN.replace("\n", "!"))[0]
    assert read_one(file)[1] != read_one(file, assistant_only=True)[1]


def test_rows_and_evaluation_are_of_the_assistants_tokens(tmp_path, llm):
    chats = LLM(model=llm.model, tokenizer=with_template(MARKED), name="tiny")
    tokens = open_chats(write(tmp_path, *[TALK] * 8), MARKED, context=16, assistant_only=True)
    rows = LLMRows(chats, tokens.train, [], batch=tokens.train.window_count)
    selected = rows.select_tokens()
    kept = selected.tokens.flatten()[selected.positions]
    decode = byte_tokenizer().decode
    assert set(decode(kept)) == set("HelloSo long")
    held_out = HeldOut(chats, tokens.held_out, [], tokens=100, loss_tokens=0, batch=2)
    assert set(decode(held_out.tokens[held_out._keep])) == set("HelloSo long")
    assert held_out.tokens.min() >= 0
