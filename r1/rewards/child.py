"""A worker process: reads calls from stdin, answers on stdout. Started by workers.py."""

import importlib
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

LENGTH = struct.Struct("<I")
MEMORY_BYTES = 4 << 30
LOG_BYTES = 1 << 20


def read_message(stream: BinaryIO) -> Any:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return json.loads(stream.read(LENGTH.unpack(head)[0]))


def write_message(stream: BinaryIO, body: bytes) -> None:
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def answer(call: dict[str, Any]) -> bytes:
    """The value of one call, or the text of what it raised, as JSON: the parent decides what that
    means.

    A call that is not to run yet imports its module and calls the module's `load`, if it has one.
    """
    name, _, function = call["target"].partition(":")
    try:
        module = importlib.import_module(name)
        if call["run"]:
            return json.dumps({"value": getattr(module, function)(*call["args"])}).encode()
        getattr(module, function)
        getattr(module, "load", lambda: None)()
        return json.dumps({"value": None}).encode()
    except Exception as error:
        # it crosses the pipe to the parent
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LOG_BYTES, LOG_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            call = read_message(requests)
        except EOFError:
            return
        # If the parent dies, nobody else ends a hanging call: the kernel does, GIL or not.
        signal.setitimer(signal.ITIMER_REAL, 2 * call["timeout"] + 1)
        reply = answer(call)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_message(replies, reply)


if __name__ == "__main__":
    main()
