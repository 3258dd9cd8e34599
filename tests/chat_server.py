"""A chat endpoint on this machine that answers by a script, for tests."""

import http.server
import json
import threading
import time
from collections.abc import Callable


class Server:
    """Answers with its script, one entry a request, (status, body or seconds[,
    headers]), and when that is spent with `reply` of the last message."""

    def __init__(self, script=(), reply: Callable[[str], str] = "re: {}".format):
        self.script, self.requests = list(script), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((time.monotonic(), body))
                entry = outer.script.pop(0) if outer.script else (200, None)
                status, answer, headers = (*entry, {"retry-after-ms": "1"})[:3]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = None
                if answer is None:
                    text = reply(body["messages"][-1]["content"])
                    message = {"role": "assistant", "content": text}
                    answer = {"choices": [{"index": 0, "message": message}]}
                data = (
                    answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                )
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:
                    pass

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
