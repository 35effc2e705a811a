"""Several processes of one command on this host, that end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# How long the others have to notice by themselves that one is gone.
GRACE_SECONDS = 30
USER_ERROR = 2  # the exit status of what the user can put right


def run_on_this_host(command: Sequence[str], count: int) -> int:
    """Run a Python command as that many processes of `jax.distributed`, on this host's CPU.

    Each is given --coordinator, --process-id and --launcher. When one fails the others are given a
    while to say so themselves, and are then killed.

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
        end(children, grace=2)  # from a terminal they have had it as well
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        end(children, grace=0)


def wait_for(children: list[subprocess.Popen]) -> int:
    """Wait until all have ended, the rest soon after the first that failed."""
    while True:
        statuses = [child.poll() for child in children]
        if any(statuses):
            break
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.1)
    end(children)
    # Who was killed is the cause; the others may have noticed in the same moment.
    status, number = min((status, number) for number, status in enumerate(statuses) if status)
    if status == USER_ERROR:
        return USER_ERROR  # and it has said which
    print(
        f"process {number} of {len(children)} ended {how(status)}, and the others with it; the "
        "same command goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 1


def how(status: int) -> str:
    """Say what an exit status means."""
    if status < 0:
        return f"by signal {-status} ({signal.Signals(-status).name})"
    return f"with status {status}"


def end(children: list[subprocess.Popen], grace: float = GRACE_SECONDS) -> None:
    """Wait for the children, but not for long; a checkpoint is whole whenever they are killed."""
    deadline = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
