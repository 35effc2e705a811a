"""Run several processes of one command on this host, and end them together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# How long the other processes may take to notice that one has died.
GRACE_SECONDS = 30
USER_ERROR = 2  # the exit status of errors that the user can fix


def run_on_this_host(command: Sequence[str], count: int) -> int:
    """Run a Python command as `count` processes of `jax.distributed`, on this host's CPU.

    Each gets --coordinator, --process-id and --launcher. When one fails, the others have some time
    to report it themselves, and are then killed.

    Returns:
      The exit status: 0 if all succeeded.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--coordinator", address, "--launcher", str(os.getpid())]
    children = [
        subprocess.Popen(
            [sys.executable, *command, *shared, "--process-id", str(number)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(count)
    ]
    for number, child in enumerate(children):
        print(f"process {number} has the id {child.pid}", flush=True)
    try:
        return wait_for(children)
    except KeyboardInterrupt:
        end(children, grace=2)  # from a terminal they also received the interrupt
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        end(children, grace=0)


def wait_for(children: list[subprocess.Popen]) -> int:
    """Wait until all have ended. If one fails, end the others soon after."""
    while True:
        statuses = [child.poll() for child in children]
        if any(statuses):
            break
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.1)
    end(children)
    # A killed process is the cause; the others may have noticed at the same time.
    status, number = min((status, number) for number, status in enumerate(statuses) if status)
    if status == USER_ERROR:
        return USER_ERROR  # the process has printed the error
    print(
        f"process {number} of {len(children)} ended {how(status)}, and the others with it; the "
        "same command continues from the last checkpoint",
        file=sys.stderr,
    )
    return 1


def how(status: int) -> str:
    """Describe an exit status."""
    if status < 0:
        return f"by signal {-status} ({signal.Signals(-status).name})"
    return f"with status {status}"


def end(children: list[subprocess.Popen], grace: float = GRACE_SECONDS) -> None:
    """Wait a limited time, then kill the children; this never damages a checkpoint."""
    deadline = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
