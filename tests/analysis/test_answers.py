"""Questions are answered once, whatever the server does, and the key stays where it is."""

import json
import logging
import sys
import threading
from urllib.parse import quote

import chat_server
import pytest
import torch
from chat_server import ChatServer

from sae_lightning.analysis.explain.answers import Answers
from sae_lightning.analysis.explain.key import censor
from sae_lightning.analysis.explain.models import Endpoint, LocalModel, Question, open_model
from sae_lightning.errors import UserError
from sae_lightning.llm.generate import Reply

QUESTIONS = [Question(f"what is {i}?", 5) for i in range(6)]
ECHOES = [question.text.upper() for question in QUESTIONS]
KEY = "sk-very-secret-123"


@pytest.fixture
def server():
    with ChatServer(str.upper) as running:
        yield running


def make_answers(server: ChatServer, folder, model: str = "small", **options) -> Answers:
    return Answers(Endpoint(server.url, model, **options), folder)


def test_a_second_run_asks_nothing(server, tmp_path):
    first = make_answers(server, tmp_path)
    assert first.ask(QUESTIONS + QUESTIONS[:2]) == ECHOES + ECHOES[:2]
    assert len(server.requests) == 6, "the same question twice is asked once"
    assert first.spent == (6, 600, 42)
    second = make_answers(server, tmp_path)
    done = []
    assert second.ask(QUESTIONS, done.append) == ECHOES
    assert (len(server.requests), second.spent.requests, sum(done)) == (6, 0, 6)


def test_what_changes_the_answer_is_asked_again(server, tmp_path):
    server.models = ("small", "other")
    question = QUESTIONS[0]
    make_answers(server, tmp_path).ask([question])
    make_answers(server, tmp_path).ask([question._replace(tokens=6)])
    make_answers(server, tmp_path, model="other").ask([question])
    assert [(r["model"], r["max_tokens"]) for r in server.requests] == [
        ("small", 5),
        ("small", 6),
        ("other", 5),
    ]
    assert all(request["temperature"] == 0 for request in server.requests)


def test_a_broken_file_in_the_cache_is_no_answer(server, tmp_path):
    make_answers(server, tmp_path).ask(QUESTIONS[:1])
    (file,) = tmp_path.iterdir()
    for broken in ("", "{}", "[1", '{"text": "YES"}'):
        file.write_text(broken)
        assert make_answers(server, tmp_path).ask(QUESTIONS[:1]) == ECHOES[:1]
    assert len(server.requests) == 5


def test_failures_that_pass_are_waited_for(server, tmp_path):
    server.failures = [(500, "out of order"), (429, "too many"), (503, "restarting")]
    assert make_answers(server, tmp_path).ask(QUESTIONS[:1]) == ECHOES[:1]
    assert len(server.requests) == 4


def test_a_failure_that_stays_is_one_line_and_what_was_answered_is_kept(server, tmp_path):
    patience = {"retries": 2, "concurrency": 1}

    def breaks(question: str) -> str:
        if question == QUESTIONS[2].text:
            server.broken = 429, "quota used up"
        return question.upper()

    server.answer = breaks
    message = r"endpoint=.*: .*429.*quota used up.*; lower concurrency.*; 3 of 6 answers are kept"
    with pytest.raises(UserError, match=message) as caught:
        make_answers(server, tmp_path, **patience).ask(QUESTIONS)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 3 + 3

    server.broken, server.answer, server.requests = None, str.upper, []
    assert make_answers(server, tmp_path, **patience).ask(QUESTIONS) == ECHOES
    assert len(server.requests) == 3


def test_answers_in_flight_are_kept_when_another_fails(tmp_path):
    class Halting:
        name, concurrency, key = "halting", 2, ""
        together = threading.Barrier(2, timeout=10)

        def complete(self, question: Question, patient: bool = True) -> Reply:
            self.together.wait()
            if question is QUESTIONS[0]:
                raise KeyboardInterrupt
            return Reply(question.text, 1, 1)

    answers = Answers(Halting(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        answers.ask(QUESTIONS[:2])
    assert answers.read_cached(QUESTIONS[1]).text == QUESTIONS[1].text


def test_as_many_questions_as_allowed_are_asked_at_a_time(server, tmp_path):
    together = threading.Barrier(3, timeout=10)

    def waits(question: str) -> str:
        together.wait()
        return question.upper()

    server.answer = waits
    assert make_answers(server, tmp_path, concurrency=3).ask(QUESTIONS) == ECHOES


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    answers = make_answers(server, tmp_path, key_env="MY_KEY")
    answers.ask(QUESTIONS)
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.broken = 401, f"{KEY} is no good key"
    with pytest.raises(UserError, match=r"\*\*\* is no good.*; check the key in MY_KEY$") as e:
        answers.ask([Question("more?", 5)])
    assert e.value.__suppress_context__, "the client's error holds the headers"
    written = "".join(file.read_text() + file.name for file in tmp_path.rglob("*.*"))
    assert len(written) > 100
    assert KEY not in written + str(e.value) + repr(answers.__dict__) + "".join(capfd.readouterr())


def test_a_missing_key_is_named(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.broken = 401, "who are you?"
    with pytest.raises(
        UserError, match="key_env=.*who are you.* environment variable OPENAI_API_KEY"
    ):
        make_answers(server, tmp_path).check_model()


def test_an_unknown_model_is_told_which_ones_there_are(server, tmp_path):
    message = "endpoint=http.*/v1, explainer=big: .*unknown model.*; .* its models are small"
    with pytest.raises(UserError, match=message):
        make_answers(server, tmp_path, model="big").check_model()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_address_is_told_at_once(server, tmp_path):
    server.__exit__()
    with pytest.raises(UserError, match="endpoint=http.*/v1: .*refused; check the address") as e:
        make_answers(server, tmp_path).check_model()
    assert "\n" not in str(e.value)


def test_a_page_that_is_no_api_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr("chat_server._completion", lambda text: {"hello": "there"})
    with pytest.raises(UserError, match="does not answer as OpenAI's API does"):
        make_answers(server, tmp_path).check_model()


def test_a_server_that_answers_is_checked_once(server, tmp_path):
    for _ in range(2):
        make_answers(server, tmp_path).check_model()
    assert len(server.requests) == 1


def test_a_reasoning_model_gets_the_parameters_that_it_takes(server, tmp_path):
    server.failures = [
        (400, "'max_tokens' is not supported, use 'max_completion_tokens' instead"),
        (400, "'temperature' does not support 0"),
    ]
    assert make_answers(server, tmp_path, concurrency=1).ask(QUESTIONS) == ECHOES
    last = server.requests[-1]
    assert last["max_completion_tokens"] == 5
    assert not {"max_tokens", "temperature"} & last.keys()
    assert len(server.requests) == 6 + 2


def test_questions_in_flight_learn_what_a_reasoning_model_takes(server, tmp_path):
    """Each of them is refused once for either parameter, and none fails for it."""
    server.refused = {
        "max_tokens": "is not supported, use 'max_completion_tokens' instead",
        "temperature": "does not support 0",
    }
    assert make_answers(server, tmp_path, concurrency=6).ask(QUESTIONS) == ECHOES


def test_a_question_that_is_refused_is_not_asked_again(server, tmp_path):
    server.broken = 400, "longer than the context of 512 tokens"
    with pytest.raises(UserError, match="endpoint=.*context of 512.*; .* too long, lower together"):
        make_answers(server, tmp_path).ask(QUESTIONS[:1])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "endpoint=localhost:8000/v1: give a web address"),
        ("ftp://host/v1", "give a web address"),
        (f"http://me:{KEY}@host/v1", "holds a user name, a password"),
        (f"http://host/v1?key={KEY}", "or a query"),
        (f"http://host/v1#{KEY}", "or a query"),
        ("http://some.host/v1", "would get the key unencrypted; use https"),
        ("HTTP://some.host/v1", "would get the key unencrypted; use https"),
        ("hTtP://127.0.0.1.some.host/v1", "would get the key unencrypted; use https"),
        ("http://localhost.some.host/v1", "would get the key unencrypted; use https"),
        ("ht\ntp://some.host/v1", "give a web address"),
        ("http://localhost:port/v1", "give a web address"),
        ("https://host/\x1b[2J", "give a web address"),
        ("http://[::1/v1", "give a web address"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused(monkeypatch, url, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, "small")
    assert KEY not in str(caught.value)


def test_a_key_may_travel_on_this_machine_or_encrypted_only(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    for url in ("http://localhost:1/v1", "HTTP://127.0.0.1:1/v1", "HTTPS://some.host/v1"):
        Endpoint(url, "small", "MY_KEY")
    Endpoint("http://some.host/v1", "small", None)
    with pytest.raises(UserError, match="would get the key unencrypted"):
        Endpoint("http://some.host/v1", "small", "MY_KEY")


def test_neither_a_redirect_nor_a_proxy_takes_the_key_elsewhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(str.upper) as other:
        server.redirect = f"{other.url}/chat/completions"
        with pytest.raises(UserError, match="307.*; it redirects requests; if you trust"):
            make_answers(server, tmp_path).check_model()
        server.redirect = None
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, other.url)
        assert make_answers(server, tmp_path).ask(QUESTIONS) == ECHOES
        assert other.requests == other.keys == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"no {KEY}!", "no ***!"),
        ("no very-secret-123", "no ***"),
        ("its secret is very kept", "its secret is very kept"),
        (f"?key={quote('a+/' + KEY, safe='')}&b", "?key=a%2B%2F***&b"),
        ("sk%2Dvery%252Dsecret", "***"),
        ("sk-v*********-123.", "***."),
        ("sk-very...123", "***"),
        ("ends in ••••••123", "ends in ***"),
        ("sk-v… and ... so on", "*** and ... so on"),
        ("100% of 5%3D", "100% of 5%3D"),
    ],
)
def test_a_key_is_recognised_in_part_encoded_and_masked(text, clean):
    assert censor(text, KEY) == clean


def test_placeholders_change_no_other_word():
    assert censor("none of the nonesuch", "none") == "*** of the nonesuch"
    assert censor("x: 1", "x") == censor("x: 1", "") == "x: 1"


def test_the_key_is_in_no_answer_model_list_message_cache_or_log(
    server, tmp_path, monkeypatch, caplog
):
    """Of a server that quotes it wherever it can."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.answer = lambda question: f"your key is {KEY}"
    answers = make_answers(server, tmp_path)
    assert answers.ask(QUESTIONS[:1]) == ["your key is ***"]
    (file,) = tmp_path.iterdir()
    assert KEY not in file.read_text()
    file.write_text(json.dumps({"text": KEY, "tokens_in": 1, "tokens_out": 1}))  # as it once was
    assert make_answers(server, tmp_path).read_cached(QUESTIONS[0]).text == "***"
    assert KEY not in file.read_text()
    server.models = ("small", f"model-{KEY}", quote(KEY))
    messages = []
    for trouble in (404, 401, 400, 307):
        server.broken = trouble, f"Incorrect API key: {KEY[:7]}****{KEY[-4:]} or {quote(KEY)}"
        server.redirect = f"http://somewhere/{KEY}" if trouble == 307 else None
        with pytest.raises(UserError) as caught:
            answers.ask([Question("more?", 5)])
        messages.append(str(caught.value))
    assert "its models are small, model-***, ***" in messages[0]
    assert not any(part in caplog.text + "".join(messages) for part in (KEY, KEY[:7], KEY[-4:]))


def test_a_key_that_the_client_would_quote_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="^key_env=OPENAI_API_KEY: holds characters") as caught:
        Endpoint("http://localhost:1/v1", "small")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("count", [float("nan"), float("inf"), "many", [1]])
def test_a_count_of_tokens_that_is_none_is_told(server, tmp_path, monkeypatch, count):
    completion = chat_server._completion
    monkeypatch.setattr(
        "chat_server._completion",
        lambda text: completion(text) | {"usage": {"prompt_tokens": count, "completion_tokens": 1}},
    )
    with pytest.raises(UserError, match="does not answer as OpenAI's API does"):
        make_answers(server, tmp_path).check_model()


def test_without_the_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install .*\[explain\]"):
        Endpoint("http://localhost:1/v1", "small")


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="answers cannot be kept in .*XDG_CACHE_HOME"):
        make_answers(server, tmp_path / "file")


def test_a_model_on_this_machine_answers_and_is_known_by_its_weights(tiny, tmp_path):
    llm = tiny("llama")
    answers = Answers(LocalModel(llm), tmp_path)
    (text,) = answers.ask([Question("the dog", 4)])
    assert answers.spent.tokens_out <= 4
    assert Answers(LocalModel(llm), tmp_path).read_cached(Question("the dog", 4)).text == text
    *_, last = llm.model.parameters()
    before = last.clone()
    with torch.no_grad():
        last += 1
        trained = LocalModel(llm).name
        last.copy_(before)  # other tests have the same model
    assert trained != LocalModel(llm).name


def test_the_model_is_one_at_an_endpoint_or_a_local_one_or_none(tiny_folder):
    assert open_model(None, None) is None
    assert open_model(None, tiny_folder("gpt2")).llm.name == tiny_folder("gpt2")
    assert open_model("http://localhost:1/v1", "small").url == "http://localhost:1/v1"
    with pytest.raises(UserError, match="^explainer=/nowhere: no such folder"):
        open_model(None, "/nowhere")
