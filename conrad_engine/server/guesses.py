"""Questions about the elevation of pictures, which belong to no job: idle workers answer them, before the next job."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..errors import ConradError
from ..protocol import ElevationGuess, Error, GuessElevation
from .clients import Clients
from .requests import check_guess
from .worker_messages import Guess, Guessed
from .workers import ENDED, Worker, Workers

MAX_WAITING = 4
"""Questions that wait for a worker to start; their pictures lie in memory."""
GUESS_LIMIT_S = 60.0
"""A worker that takes longer is killed: decoding a picture of the largest size takes some seconds, the estimate one."""


class Busy(ConradError):
    """Not now; the same request can be made later."""

    code = "busy"


@dataclass(frozen=True)
class Question:
    """Who asked what; `asked` is the route of the worker process that looks at it."""

    route: bytes
    guess: GuessElevation
    asked: bytes = b""


class Guesses:
    """The open questions of one engine."""

    def __init__(self, clients: Clients, workers: Workers) -> None:
        self._clients = clients
        self._workers = workers
        self._waiting: deque[Question] = deque()
        self._asked: dict[int, Question] = {}
        """By the number of the worker that looks at it."""

    def ask(self, route: bytes, guess: GuessElevation) -> None:
        """Take a question; it is answered as soon as a worker is idle.

        Raises:
            InputError: It has no picture that can be looked at.
            Busy: All workers are at work, or too many questions wait.
        """
        check_guess(guess)
        if all(worker.job is not None for worker in self._workers):
            raise Busy("the engine is at work on a job: ask for the elevation again when it is done")
        if len(self._waiting) >= MAX_WAITING:
            raise Busy("other elevations are being estimated: ask again in a moment")
        self._waiting.append(Question(route, guess))

    def schedule(self) -> None:
        """Give questions to idle workers, and tell those who asked a worker that has ended."""
        for worker in self._workers:
            question = self._asked.get(worker.number)
            if question is not None and (worker.state == ENDED or worker.route != question.asked):
                del self._asked[worker.number]
                self._fail(question, "internal", "the worker ended before it had looked at the picture: ask again")
        while self._waiting and self._workers.problem:
            self._fail(self._waiting.popleft(), "internal", self._workers.problem)
        while self._waiting:
            self._workers.wake()
            worker = self._workers.idle()
            if worker is None:
                return
            self._give(worker, self._waiting.popleft())

    def answered(self, worker: Worker, guessed: Guessed) -> None:
        """A worker has looked at its picture."""
        question = self._asked.pop(worker.number, None)
        if question is None:
            return
        if guessed.code:
            self._fail(question, guessed.code, guessed.message)
            return
        answer = (guessed.elevation_deg, guessed.spread_deg, guessed.is_sure)
        self._clients.tell(question.route, ElevationGuess(*answer, question.guess.request))

    def _give(self, worker: Worker, question: Question) -> None:
        guess = question.guess
        self._asked[worker.number] = Question(question.route, guess, worker.route)
        order = Guess(worker.device, guess.fov_deg, guess.picture, guess.pixels, guess.mask, guess.mask_pixels)
        self._workers.guess(worker, order, GUESS_LIMIT_S)

    def _fail(self, question: Question, code: str, message: str) -> None:
        self._clients.tell(question.route, Error(code, message, request=question.guess.request))
