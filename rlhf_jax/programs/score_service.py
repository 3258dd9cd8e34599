"""One thread that owns a reward model, and the queue of requests in front of it.

    with ScoreService(scorer, ...) as service:
        rewards = service.submit(items).result()

The thread encodes and scores, so nothing of jax or of the tokenizer is used twice at
once. Requests that wait at the same time are scored together, which changes no score
beyond float rounding (see `evals.scoring`).
"""

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.programs.score_requests import Item, Refused, encode_items
from rlhf_jax.programs.scorer import Scorer

_log = logging.getLogger(__name__)


class ScoringFailed(RuntimeError):
    """The model failed, or gave a reward that is not finite."""


class ScoreService:
    """A thread and its queue; the class is there because they live as long."""

    def __init__(
        self, scorer: Scorer, *, max_batch: int, batch_wait_s: float, max_waiting: int
    ) -> None:
        """A service that is not running yet.

        Args:
            scorer: the model; used by the service's thread alone from now on.
            max_batch: completions scored together.
            batch_wait_s: how long the first request waits for others, at most.
            max_waiting: requests in the queue before `submit` refuses.
        """
        self.scorer = scorer
        self.max_batch, self.batch_wait_s = max_batch, batch_wait_s
        self._queue: queue.Queue[_Job | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)

    def __enter__(self) -> "ScoreService":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, items: Sequence[Item]) -> concurrent.futures.Future[list[float]]:
        """The rewards of a request, in its order, once they are there.

        The future may hold Refused (a text the model cannot score) or ScoringFailed.

        Raises:
            queue.Full: too many requests wait.
        """
        job = _Job(items, concurrent.futures.Future())
        self._queue.put_nowait(job)
        return job.future

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    def _work(self) -> None:
        last = False
        while not last and (job := self._queue.get()) is not None:
            jobs, last = self._with_company(job)
            self._score(jobs)

    def _with_company(self, job: "_Job") -> "tuple[list[_Job], bool]":
        """The job and those that come with it, and whether the end came too."""
        jobs, count = [job], len(job.items)
        deadline = time.monotonic() + self.batch_wait_s
        while count < self.max_batch:
            try:
                more = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                return jobs, True
            jobs.append(more)
            count += len(more.items)
        return jobs, False

    def _score(self, jobs: "list[_Job]") -> None:
        """Answers every job, whatever happens: one request must not end the server."""
        ready: list[_Job] = []
        encoded: list[EncodedCompletion] = []
        for job in jobs:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                encoded += encode_items(job.items, self.scorer)
                ready.append(job)
            except Refused as error:
                job.future.set_exception(error)
            except Exception as error:
                _fail([job], error)
        try:
            parts = [
                self.scorer.rewards(encoded[start : start + self.max_batch])
                for start in range(0, len(encoded), self.max_batch)
            ]
        except Exception as error:
            _fail(ready, error)
            return
        rewards = iter(np.concatenate(parts).tolist() if parts else [])
        for job in ready:
            found = [next(rewards) for _ in job.items]
            bad = [i.where for i, r in zip(job.items, found) if not np.isfinite(r)]
            if bad:
                failed = ScoringFailed(f"{bad[0]}: the reward is not finite")
                job.future.set_exception(failed)
            else:
                job.future.set_result(found)


def _fail(jobs: "list[_Job]", error: Exception) -> None:
    """Tells the senders what went wrong, and the log where."""
    _log.error("scoring failed", exc_info=error)
    for job in jobs:
        job.future.set_exception(ScoringFailed(f"{type(error).__name__}: {error}"))


class _Job(NamedTuple):
    """A request on its way."""

    items: Sequence[Item]
    future: concurrent.futures.Future[list[float]]
