"""The driver's end of a peer: another library in a process of its own, told by lines
of JSON when it is its turn (`worker.py` is the other end)."""

import json
import pathlib
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
PYTHON = HERE / ".envs" / "trl" / "bin" / "python"


class Peer:
    """A worker process: says hello, then answers one line to each request."""

    def __init__(
        self, script: str, job: dict[str, Any], directory: pathlib.Path
    ) -> None:
        path = directory / "job.json"
        path.write_text(json.dumps(job))
        self.process = subprocess.Popen(
            [str(PYTHON), str(HERE / script), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self.read()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the peer's process ended early; its messages are above")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def finish(self) -> dict[str, Any]:
        """Its last answer: there are no more requests."""
        self.process.stdin.close()
        last = self.read()
        self.process.wait()
        return last


def require_peer() -> None:
    """Ends the program with a hint if the peer's environment is not there."""
    if not PYTHON.exists():
        sys.exit(f"{PYTHON} is missing: run benchmarks/envs.sh (or make bench)")
