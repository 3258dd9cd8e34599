"""`rlhf-jax serve`: a reward model behind HTTP, for any trainer that can POST.

    POST /get_reward   {"query": [...]} or {"prompts": [...], "completions": [...]}
                       -> {"rewards": [...]}     else a status and {"error": "..."}
    GET /health        -> model, template, max_length, waiting

Read `run`, then `make_app`. What a request may hold is in `score_requests`, who scores
it in `score_service`. There is no authentication, so the default is this machine alone.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import ipaddress
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rlhf_jax.programs.score_requests import Refused, read_request
from rlhf_jax.programs.score_service import ScoreService, ScoringFailed
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer

PATH = "/get_reward"
_HEADERS = {413: {"Connection": "close"}, 503: {"Retry-After": "1"}}
"""By status; after 413 the rest of the body is not read."""
_GRACE_S = 30
"""How long requests under way may take once the server is told to stop."""


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serve a reward model over HTTP."""

    model: str
    """Reward model: run directory (its best checkpoint), HF directory, hub id or
    .gguf; or ensemble:DIR, attributes:DIR (see docs/rewards.md)."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's own is open to whoever can
    reach it: there is no authentication."""
    port: int = 5000
    """Port to listen on; 0 = a free one, printed."""
    max_batch: int = 256
    """Completions scored together, of one request or of several."""
    batch_wait_ms: float = 5.0
    """How long the first request of a batch waits for others, in milliseconds."""
    max_waiting: int = 256
    """Requests in the queue; further ones get status 503."""
    max_request_bytes: int = 16 * 2**20
    """Longest request body; longer ones get status 413."""
    seed: int = 0
    """Seed of a random head (scoring.untrained_head)."""
    scoring: ScoringConfig = ScoringConfig()
    """How texts become rewards."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: expected 0 to 65535")
        for name in ("max_batch", "max_waiting", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected at least 1"
                )  # fmt: skip
        if not 0 <= self.batch_wait_ms <= 60_000:
            raise ValueError(
                f"batch_wait_ms {self.batch_wait_ms}: expected 0 to 60000 milliseconds"
            )


def run(config: ServeConfig) -> None:
    """Serves until SIGINT or SIGTERM; requests under way are answered first.

    Raises:
        ValueError: the extra `serve` is missing, the address cannot be listened on, or
            there is no such reward model.
    """
    uvicorn = _require("uvicorn")
    _require("starlette")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bind(config.host, config.port))
        scorer = open_scorer(config.model, config.scoring, seed=config.seed)
        service = ScoreService(
            scorer,
            max_batch=config.max_batch,
            batch_wait_s=config.batch_wait_ms / 1000,
            max_waiting=config.max_waiting,
        )
        stack.enter_context(service)
        app = make_app(service, config)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        stack.enter_context(_sigterm_exits())
        listener.listen(128)  # whoever reads the next line may connect at once
        _announce(config, service, listener)
        server.run(sockets=[listener])


def make_app(service: ScoreService, config: ServeConfig) -> Any:
    """The Starlette application on a running service."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def get_reward(request: Request) -> Response:
        status, content = await _get_reward(request, service, config)
        return JSONResponse(content, status, headers=_HEADERS.get(status))

    async def health(request: Request) -> Response:
        scorer = service.scorer
        return JSONResponse(
            {
                "model": config.model,
                "template": scorer.encoder.describe(),
                "max_length": scorer.max_length,
                "random_head": scorer.random_head,
                "waiting": service.waiting,
            }
        )

    async def refuse(request: Request, error: Exception) -> Response:
        """404 and 405, in the form of every other error."""
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail}; POST {PATH}"
        return JSONResponse({"error": told}, error.status_code, headers=error.headers)

    routes = [
        Route(PATH, get_reward, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


async def _get_reward(
    request: Any, service: ScoreService, config: ServeConfig
) -> tuple[int, dict[str, Any]]:
    """(status, answer) to a request."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    try:
        body = await _read_body(request, config.max_request_bytes)
        if body is None:
            limit = f"{config.max_request_bytes:,} bytes (max_request_bytes)"
            told = f"the body is longer than {limit}; send fewer texts"
            return 413, {"error": told}
        items = await run_in_threadpool(read_request, body)
        return 200, {"rewards": await asyncio.wrap_future(service.submit(items))}
    except ClientDisconnect:
        return 499, {}  # nobody is left to read it
    except queue.Full:
        waiting = f"{config.max_waiting} requests are waiting"
        return 503, {"error": f"{waiting}; try again"}
    except Refused as error:
        return 422, {"error": str(error)}
    except ValueError as error:
        return 400, {"error": str(error)}
    except ScoringFailed as error:
        return 500, {"error": str(error)}


async def _read_body(request: Any, limit: int) -> bytes | None:
    """The body; None if it is longer than `limit`, of which no more is then read."""
    if int(request.headers.get("content-length", 0)) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _require(name: str) -> Any:
    """An optional package, imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"serve needs {name}, which is not installed; install the extra serve: "
            "pip install 'rlhf-jax[serve]'"
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, taken before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"host {host}, port {port}: cannot listen there: {error.strerror}; "
            "choose others with --host and --port"
        ) from None
    return listener


def _announce(
    config: ServeConfig, service: ScoreService, listener: socket.socket
) -> None:
    """Says where the server is, and what to know before using it."""
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    scorer = service.scorer
    lines = [
        f"serving {config.model} at http://{shown}:{port}{PATH}; "
        f"at most {scorer.max_length} tokens; {scorer.encoder.describe()}"
    ]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        lines.append(
            f"host {config.host}: other machines can reach it, and there is no "
            "authentication"
        )
    if scorer.random_head:
        lines.append("the model has no reward head: its scores mean nothing")
    print("\n".join(lines), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Makes SIGTERM an exit with code 143 that closes what is open.

    uvicorn handles the signal first, and raises it again when all is answered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
