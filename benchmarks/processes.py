"""Other processes that a benchmark measures: draft-serve, and an engine on its own; and the cores that each may use."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import TYPE_CHECKING, Any

from draft.errors import UserError

if TYPE_CHECKING:
    from serving.engine import Engine

_END_SECONDS = 60


@dataclass(frozen=True)
class Cores:
    """Which of the machine's cores the arithmetic gets, and which the sockets: a server's event loop, and clients."""

    engine: tuple[int, ...]
    io: tuple[int, ...]

    @classmethod
    def split(cls) -> Cores:
        """Half and half of those that this process may use; a single one is shared."""
        allowed = sorted(os.sched_getaffinity(0)) if _binds() else list(range(os.cpu_count() or 1))
        half = max(1, len(allowed) // 2)
        return cls(tuple(allowed[:half]), tuple(allowed[half:] or allowed))

    def __str__(self) -> str:
        if not _binds():
            return "processes are bound to no cores: this system cannot"
        return f"engine on core {_names(self.engine)}; server I/O and client on core {_names(self.io)}"


def bind(thread: int, cores: Sequence[int]) -> None:
    """thread: its number as the system has it, a process's number being its first thread's; 0: the caller's own.

    Threads that it starts from now on inherit the cores.
    """
    if _binds():
        os.sched_setaffinity(thread, cores)


@contextmanager
def bound(cores: Sequence[int]) -> Iterator[None]:
    """The caller's thread, meanwhile."""
    before = os.sched_getaffinity(0) if _binds() else ()
    bind(0, cores)
    try:
        yield
    finally:
        bind(0, tuple(before))


def _binds() -> bool:
    return hasattr(os, "sched_setaffinity")


def _names(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores))


# ---- draft-serve ----


# ---- an engine without HTTP ----


class EngineProcess:
    """The same engine as a server's, in a process of its own: what requests cost without HTTP."""

    def __init__(self, options: dict[str, Any], cores: Cores) -> None:
        """options: of `load_engine`. Raises UserError when it cannot be loaded."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run_engine, args=(theirs, options, cores), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def closed_loop(
        self, chats: Sequence[str], new_tokens: int, concurrency: int, wishes: dict[str, Any]
    ) -> tuple[int, float]:
        """Answer each chat of one turn, greedily, so many at a time: tokens generated, and seconds.

        wishes: of Speculation.
        """
        self._connection.send((chats, new_tokens, concurrency, wishes))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError("the engine's process ended; what it said is above.") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends its loop
        self._process.join(_END_SECONDS)
        self._process.kill()


def _run_engine(connection: Connection, options: dict[str, Any], cores: Cores) -> None:
    from serving.cli import load_engine

    bind(0, cores.engine)
    try:
        engine = load_engine(**options)
    except UserError as error:
        connection.send(error)
        return
    engine.start()
    bind(0, cores.io)
    connection.send("ready")
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        connection.send(_closed_loop(engine, *asked))


def _closed_loop(
    engine: Engine, chats: Sequence[str], new_tokens: int, concurrency: int, wishes: dict[str, Any]
) -> tuple[int, float]:
    from serving.engine import SamplingParams, Speculation

    turns = [[{"role": "user", "content": chat}] for chat in chats]
    prompts = [engine.target.encode_chat(turn, add_generation_prompt=True) for turn in turns]
    params, speculation = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True), Speculation(**wishes)
    began = perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda prompt: engine.submit(prompt, params, speculation).result(), prompts)
        tokens = sum(len(answer.token_ids) for answer in answers)
    return tokens, perf_counter() - began
