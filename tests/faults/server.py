"""Runs of the command line that start at once, one after the other, and may be disturbed; see `harness.py`.

Imports what a run imports once, then forks for every run that it is asked for on stdin, a JSON object a line. The shim
(shim.c) has been preloaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

shim = ctypes.CDLL(None)
shim.fault_record.restype = ctypes.c_char_p
GRACE_S = 20.0  # a launcher gives the others this long when one process has ended


def main() -> None:
    """Serve requests until stdin ends."""
    from rlhf_kit import __main__ as command_line
    from rlhf_kit import pipeline  # noqa: F401  (so that forks have it)
    from rlhf_kit.stages import ppo, reward, sft  # noqa: F401

    command_line.quiet_libraries()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run the command line in `processes` forks; return their exit codes (minus the signal that ended one)."""
    world = request["processes"]
    port = free_port()
    started = time.monotonic()
    children = [fork(request, rank, world, port) for rank in range(world)]
    codes: dict[int, int] = {}
    signal_at = started + request["signal_after_s"] if request["signal_after_s"] is not None else None
    first_end = None
    while len(codes) < world:
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    first_end = first_end or time.monotonic()
        running = [child for child in children if child not in codes]
        now = time.monotonic()
        if signal_at is not None and now >= signal_at:
            for child in running if request["only"] is None else children[request["only"] :][:1]:
                if child in running:
                    os.kill(child, request["signal"])
            signal_at = None
        if running and first_end is not None and codes[next(iter(codes))] != 0:  # as a launcher does
            for child in running:
                os.kill(child, signal.SIGKILL if now > first_end + GRACE_S else signal.SIGTERM)
        if running:
            select.select([], [], [], 0.01)
    return {
        "codes": [codes[child] for child in children],
        "operations": shim.fault_record().decode(errors="replace").splitlines(),
        "seconds": time.monotonic() - started,
    }


def free_port() -> int:
    """Return a port for the processes to meet at, below those that systems give away themselves: nobody is given it
    before the run has it.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def fork(request: dict[str, Any], rank: int, world: int, port: int) -> int:
    """Start one process of a run; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        if rank == 0:
            what = request["below"].encode(), request["at"].encode()
            shim.fault_arm(*what, ctypes.c_long(request["at_time"]), request["error"], request["at_signal"])
        exec(request["before"], {})
        sys.argv = ["rlhf-kit", *request["arguments"]]
        from rlhf_kit import __main__ as command_line

        command_line.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
