"""A server, in a thread, with the part of Weights & Biases' protocol that a run needs."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ME = {"id": "e", "name": "me"}


class WandbServer(ThreadingHTTPServer):
    """Keeps what one run sends: `started` (its name and settings), `history`, `exit_codes`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: list[dict] = []
        self.started: list[dict] = []
        self.exit_codes: list[int] = []
        self.gone = False  # whether connections are dropped
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        """Say nothing: clients drop connections when they end."""

    def answer(self, query: str, variables: dict) -> dict:
        """The answer to a GraphQL query."""
        name = re.search(r"(query|mutation)\s+(\w+)", query)[2]
        run = {"id": "r", "name": variables.get("name"), "displayName": None, "config": "{}"}
        if name == "UpsertBucket":
            self.started.append(variables)
            bucket = run | {"project": {"id": "p", "name": "p", "entity": ME}}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if name == "RunResumeStatus":
            return {"model": {"id": "p", "name": "p", "entity": ME, "bucket": self._resume(run)}}
        if name == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/file"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _resume(self, run: dict) -> dict | None:
        if not self.history:
            return None
        counts = dict.fromkeys(("logLineCount", "historyLineCount", "eventsLineCount"), 1)
        last = json.dumps(self.history[-1])
        texts = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        return run | counts | texts | {"tags": [], "wandbConfig": json.dumps({"t": {"1": [1]}})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_) -> None:
        pass

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.gone:
            self.close_connection = True
            return
        answer = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            sent = json.loads(body)
            for name, part in (sent.get("files") or {}).items():
                if "history" in name:
                    self.server.history += map(json.loads, part["content"])
            if sent.get("complete"):
                self.server.exit_codes.append(sent["exitcode"])
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET = do_PUT
