"""A function in several processes that train together, as torchrun would start them, within one test."""

import multiprocessing
import os
import socket
import traceback
from typing import Any

import pytest

# Seconds, many times what any of them takes.
LIMIT = 60

_context = multiprocessing.get_context("forkserver")
# Imported once, in the process that the others are forked from.
_context.set_forkserver_preload(
    [
        *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "transformers"),
        *("minipeft.train.loop", "minipeft.nf4.hf"),
    ]
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def _run(function: Any, rank: int, count: int, port: int, arguments: Any, out: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCH_CPP_LOG_LEVEL="ERROR")
    import torch

    torch.set_num_threads(1)
    try:
        given, options = arguments
        out.put((rank, function(*given, **options), None))
    except BaseException:
        out.put((rank, None, traceback.format_exc()))


def in_processes(count: int, function: Any, *given: Any, **options: Any) -> list[Any]:
    """The results of a module's `function(*given, **options)` in `count` processes, which find their rank in RANK.

    A process that raises fails the test with its traceback, and so does one that hangs.
    """
    out, port = _context.Queue(), free_port()
    started = [
        _context.Process(target=_run, args=(function, rank, count, port, (given, options), out))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        results: dict[int, Any] = {}
        while len(results) < count:
            rank, result, problem = out.get(timeout=LIMIT)
            if problem is not None:
                pytest.fail(f"process {rank} of {count}:\n{problem}")
            results[rank] = result
        return [results[rank] for rank in range(count)]
    finally:
        for process in started:
            process.join(timeout=5)
            process.kill()
