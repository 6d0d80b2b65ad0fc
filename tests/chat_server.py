"""A local server of OpenAI's chat completions API."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Replies with answer(question) and records requests and API keys."""

    def __init__(self, answer: Callable[[str], str], models: tuple[str, ...] = ("small",)):
        self.answer, self.models = answer, models
        self.failures: list[tuple[int, str]] = []  # status and message of the next replies
        self.broken: tuple[int, str] | None = None  # status and message of every reply
        self.refused: dict[str, str] = {}  # parameter -> error message
        self.redirect: str | None = None  # where all requests are redirected to
        self.requests: list[dict] = []
        self.keys: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self._send(200, {"object": "list", "data": [_model(name) for name in chat.models]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.requests.append(request)
                chat.keys.append(self.headers["Authorization"])
                error = chat.failures.pop(0) if chat.failures else chat.broken
                for parameter in chat.refused.keys() & request.keys():
                    error = 400, f"{parameter} {chat.refused[parameter]}"
                if request["model"] not in chat.models:
                    error = 404, "unknown model"
                if chat.redirect:
                    error = 307, "elsewhere"
                if error:
                    status, message = error
                    self._send(status, {"error": {"message": message}})
                else:
                    self._send(200, _completion(chat.answer(request["messages"][0]["content"])))

            def _send(self, status: int, content: dict):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Retry-After-Ms", "1")
                if chat.redirect:
                    self.send_header("Location", chat.redirect)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "me"}


def _completion(text: str) -> dict:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "small",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }


def oracle(question: str) -> str:
    """The answer of a perfect model, which explains a feature by the word that is marked most often
    and judges texts by that word."""
    if "the word " not in question:
        marked = re.findall(r"^\(\d+/10\).*?<<(\w+)>>", question, re.MULTILINE)
        return f"Explanation: the word {Counter(marked).most_common(1)[0][0]}"
    word = re.search(r"the word (\w+)", question)[1]
    fuzzing = "between << and >>" in question

    def fits(text: str) -> bool:
        pieces = re.findall("<<(.*?)>>", text) if fuzzing else [text]
        return any(word in piece.split() for piece in pieces)

    texts = re.findall(r"^(\d+)\. (.*)$", question, re.MULTILINE)
    return "\n".join(f"{n}: {'yes' if fits(text) else 'no'}" for n, text in texts)
