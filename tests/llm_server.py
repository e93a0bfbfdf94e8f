"""A deterministic OpenAI-compatible server on this machine that fails on demand and keeps the bill.

Like hosted services that honour an Idempotency-Key, it answers a key it has already answered from memory and
does not bill it again; `idempotent = False` gives a server that bills every time.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-key"
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def answer(prompt: str) -> str:
    """The model: a pure function of the prompt."""
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    try:
        data = json.loads(prompt)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        return json.dumps({"answer": f"saw {mark}"})
    if "caption" in data:
        return json.dumps({"question": "What is said first?", "answer": data["caption"].split(". ")[0][:250]})
    if "question" in data:
        return json.dumps({"answer": f"Roads and buildings, as far as they go. Mark {mark}."})
    return json.dumps({"question": f"Where does traffic slow down near {mark}?"})


def text_of(body: dict) -> str:
    """The user's text of a request."""
    content = body["messages"][1]["content"]
    return content if isinstance(content, str) else content[1]["text"]


class Model:
    """`behave(body, number of this key's try)` gives None (answer), a status, "hang", "cut", "garbage",
    "empty", "long", "thought" (cut off before any text), "filtered", "refused" (both without text), or the
    text of a reply."""

    def __init__(self):
        self.tries, self.paid, self.bodies, self.keys = Counter(), Counter(), [], []
        self.behave = lambda body, attempt: None
        self.idempotent = True
        self.active = self.most_active = 0
        self.delay, self.hang = 0.0, 5.0  # seconds before a reply, and that a hanging one takes
        self.lock = threading.Lock()
        self._answered: dict[str, tuple[str | None, str]] = {}
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers["Idempotency-Key"]
                with model.lock:
                    model.tries[key] += 1
                    model.keys.append(self.headers.get("Authorization"))
                    model.bodies.append(body)
                    model.active += 1
                    model.most_active = max(model.most_active, model.active)
                    kind = model.behave(body, model.tries[key])
                try:
                    time.sleep(model.delay)
                    self.reply(body, key, kind)
                finally:
                    with model.lock:
                        model.active -= 1

            def reply(self, body, key, kind):
                if isinstance(kind, int):
                    self.respond(kind, json.dumps({"error": {"message": f"no: {KEY}"}}).encode())
                elif kind == "garbage":
                    self.respond(200, b"<html>gateway</html>")
                elif kind == "empty":
                    self.respond(200, b'{"choices": []}')
                else:
                    data = model.completion(body, key, kind)
                    if kind == "hang":
                        time.sleep(model.hang)
                        self.close_connection = True
                        return
                    self.respond(200, data, data[: len(data) // 2] if kind == "cut" else data)
                    self.close_connection = kind == "cut"

            def respond(self, status, announced, data=None):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(announced)))
                self.end_headers()
                self.wfile.write(announced if data is None else data)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that were killed or ran out of patience

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def completion(self, body, key, kind) -> bytes:
        """A chat completion, billed unless this key has been answered before."""
        with self.lock:
            if not (self.idempotent and key in self._answered):
                self.paid[key] += 1
                own = isinstance(kind, str) and kind not in ("cut", "hang")
                content = kind if own else answer(text_of(body))
                content = None if kind in ("thought", "filtered", "refused") else content
                finish = {"long": "length", "thought": "length", "filtered": "content_filter"}
                self._answered[key] = content, finish.get(kind, "stop")
            content, finish = self._answered[key]
        message = {"role": "assistant", "content": content}
        message |= {"refusal": "I cannot help with that."} if kind == "refused" else {}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        return json.dumps(whole | {"choices": [choice], "usage": USAGE}).encode()

    def forget(self):
        """As if no key had been answered."""
        self._answered.clear()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
