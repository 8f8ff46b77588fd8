"""Run a program that is killed when the process that started it dies, even by `kill -9`.

    python -I -S exec_with_parent.py PARENT_PID [--user UID:GID] PROGRAM [ARGUMENT …]

--user: run it as this user, which only root may.

It asks the kernel for SIGKILL at the parent's death (prctl(2), PR_SET_PDEATHSIG) and then becomes
PROGRAM under the same pid; the request survives exec. It is a file of its own, run by path, because
a `preexec_fn` is not safe in a process with threads. For the kernel the parent is the *thread* that
forked, so Supervisor starts every child from one thread that ends last. Without prctl (not Linux)
the program runs without this guard.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
# The exit code of a shell for a program that cannot be run.
NOT_FOUND = 127


def main(arguments: list[str]) -> None:
    """Set the signal, then become the program.

    Never returns; exits with 127 if it cannot be run.
    """
    parent, *argv = arguments
    if argv[0] == "--user":  # before the signal: a change of the user clears it
        uid, gid = map(int, argv[1].split(":"))
        argv = argv[2:]
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
        if os.getppid() != int(parent):  # it died before the signal was set
            sys.exit("the supervisor is gone")
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
        sys.exit(NOT_FOUND)


if __name__ == "__main__":
    main(sys.argv[1:])
