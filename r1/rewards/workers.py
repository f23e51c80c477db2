"""Calls that may hang or crash, in worker processes that can be killed.

A worker is a fresh interpreter in its own process group, fed through pipes. Neither fork (unsafe
once torch or vLLM hold threads) nor signals (no use in threads or inside C code) are involved.
"""

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from r1.rewards.child import LENGTH

START_TIMEOUT = 120.0
REPLY_BYTES = 1 << 20


class Call(NamedTuple):
    """`module:function` and its JSON-ready arguments."""

    target: str
    args: tuple[Any, ...]


class Outcome(NamedTuple):
    """The value of a call, or why there is none: "timeout", "crashed: ..." or "error: ..."."""

    value: Any
    error: str | None = None


class WorkerStartError(RuntimeError):
    """A worker could not start or could not import its target: an installation fault."""


class Pool:
    """A fixed number of persistent workers.

    Args:
        workers: processes; each starts with its first call.
        timeout: seconds of wall clock one call may take before its worker is killed.

    Thread-safe. Use it as a context manager or call `close`; a pool that is dropped closes itself.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0) -> None:
        if workers < 1 or not timeout > 0:
            raise ValueError(
                f"Pool needs workers >= 1 and timeout > 0, got {workers} and {timeout}"
            )
        self._timeout = timeout
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker() for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="r1-rewards")
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._threads)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def submit(self, call: Call) -> "Future[Outcome]":
        """Starts a call; the future holds its Outcome, or raises WorkerStartError."""
        if not self._finalizer.alive:
            raise RuntimeError("the pool is closed")
        return self._threads.submit(_run, self._idle, call, self._timeout)

    def map(self, calls: Iterable[Call]) -> list[Outcome]:
        """The outcomes of the calls, in their order."""
        return [future.result() for future in [self.submit(call) for call in calls]]

    def close(self) -> None:
        """Kills every worker and waits for it; running calls end as crashed."""
        self._finalizer()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(idle: "queue.LifoQueue[_Worker]", call: Call, timeout: float) -> Outcome:
    worker = idle.get()
    try:
        return worker.run(call, timeout)
    finally:
        idle.put(worker)


def _stop(workers: "list[_Worker]", threads: ThreadPoolExecutor) -> None:
    for worker in workers:
        worker.stop()
    threads.shutdown(wait=True, cancel_futures=True)
    for worker in workers:
        worker.reap()


class _Worker:
    """One process; used by one thread at a time, except for `stop`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def run(self, call: Call, timeout: float) -> Outcome:
        try:
            body = json.dumps(call.args)
        except (TypeError, ValueError) as error:
            return Outcome(None, f"error: {error}")
        if not self._start():
            return Outcome(None, "crashed: the pool was closed")
        if call.target not in self._loaded:
            # Imports are slow and no fault of the call: they have a deadline of their own.
            loaded = self._exchange(call.target, "[]", False, START_TIMEOUT)
            if loaded.error is not None:
                detail = f"{loaded.error}\n{self._log_tail()}".strip()
                self.reap()
                if self._closed:
                    return Outcome(None, "crashed: the pool was closed")
                raise WorkerStartError(f"reward worker cannot load {call.target!r}: {detail}")
            self._loaded.add(call.target)
        return self._exchange(call.target, body, True, timeout)

    def stop(self) -> None:
        """Ends the process; a thread that waits for it sees the end of its pipe."""
        with self._lock:
            self._closed = True
            if self.process is not None:
                self._signal()

    def reap(self) -> None:
        """Kills the process, waits for it and closes its pipes."""
        with self._lock:
            if self.process is None:
                return
            self._signal()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self._log.close()
            self.process = None

    def _signal(self) -> None:
        # A process that was not waited for keeps its id, so the group is ours.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _start(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            self.reap()
        with self._lock:
            if self._closed:
                return False
            if self.process is None:
                self._spawn()
            return True

    def _spawn(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "r1.rewards.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        self._loaded = set()
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)

    def _exit_status(self) -> str:
        try:
            return f"exit status {self.process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            return "closed its pipe"

    def _log_tail(self) -> str:
        with self._lock:
            if self.process is None:
                return ""
            end = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, end - 2000))
            return self._log.read().decode(errors="replace")

    def _exchange(self, target: str, body: str, run: bool, timeout: float) -> Outcome:
        head = json.dumps({"target": target, "run": run, "timeout": timeout})
        message = f'{head[:-1]}, "args": {body}}}'.encode()
        try:
            reply = self._send_receive(LENGTH.pack(len(message)) + message, timeout)
        except TimeoutError:
            self.reap()
            return Outcome(None, "timeout")
        except (OSError, EOFError, ValueError) as error:
            detail = str(error) or self._exit_status()
            self.reap()
            return Outcome(None, f"crashed: {detail}")
        if "error" in reply:
            return Outcome(None, f"error: {reply['error']}")
        return Outcome(reply["value"])

    def _send_receive(self, message: bytes, timeout: float) -> dict[str, Any]:
        process = self.process
        if process is None:
            raise EOFError
        deadline = time.monotonic() + timeout
        pending, received = memoryview(message), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        pending = pending[os.write(key.fd, pending) :]
                        if not pending:
                            selector.unregister(process.stdin)
                        continue
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        raise EOFError
                    received += chunk
                if len(received) < LENGTH.size:
                    continue
                length = LENGTH.unpack_from(received)[0]
                if length > REPLY_BYTES:
                    raise ValueError(f"a reply of {length} bytes")
                if len(received) >= LENGTH.size + length:
                    return json.loads(received[LENGTH.size : LENGTH.size + length])
