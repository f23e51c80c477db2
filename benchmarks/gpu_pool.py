"""The gpu suite's worker processes, one for each family of providers."""

import time
from pathlib import Path

from benchmarks.harness import Worker, WorkerError

START_TIMEOUT = 150.0
TURN_TIMEOUT = 75.0


class OutOfTime(Exception):
    """The suite's minutes are over."""


class Pool:
    """The workers by family, started when first asked for and again after one died."""

    def __init__(
        self,
        device: str,
        threads: int,
        folder: Path,
        deadline: float,
        module: str = "benchmarks.gpu_worker",
        env: dict | None = None,
    ):
        self.device, self.threads, self.folder = device, threads, folder
        self.deadline, self.module, self.env = deadline, module, env
        self.workers: dict[str, Worker] = {}
        self.greeted: dict[str, dict] = {}

    def start(self, families: list[str]) -> None:
        """Imports take seconds: all at once."""
        for family in families:
            if family not in self.workers:
                self.workers[family] = Worker(
                    self.module,
                    [self.device, str(self.threads)],
                    self.threads,
                    self.folder / f"{family}.log",
                    self.env,
                )
                self.workers[family].send({"do": "hello"})

    def hello(self, family: str) -> dict:
        """What the family's process says of itself, once it is up."""
        self.start([family])
        if family not in self.greeted:
            self.greeted[family] = self._receive(family, START_TIMEOUT)
        return self.greeted[family]

    def ask(self, family: str, request: dict, timeout: float | None = None) -> dict:
        """Raises WorkerError with the reason, OutOfTime after the deadline."""
        self.hello(family)
        self.workers[family].send(request)
        return self._receive(family, timeout or TURN_TIMEOUT)

    def only(self, family: str) -> None:
        """End the others, whose contexts hold memory of the device."""
        for name in [name for name in self.workers if name != family]:
            self.workers.pop(name).close()
            self.greeted.pop(name, None)

    def _receive(self, family: str, timeout: float) -> dict:
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise WorkerError("out of time")
            return self.workers[family].receive(min(timeout, left))
        except WorkerError as error:
            # After any other error its GPU context may be lost: the next request gets a new one.
            if not error.missing:
                self.workers.pop(family).close()
                self.greeted.pop(family, None)
            if time.monotonic() >= self.deadline:
                raise OutOfTime from error
            raise

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
