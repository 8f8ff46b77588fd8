"""The supervisor on real child processes: restart, back-off, order of stopping, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eddyline.errors import LocalServerError
from sandbox.servers import supervisor as module
from sandbox.servers.supervisor import Child, Supervisor

ROOT = Path(__file__).parents[3]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "logs") as running:
        yield running


def child(tmp_path: Path, name: str = "one", code: str = "", **more: object) -> Child:
    """Touches `<name>.ready`, notes its start in `<name>.starts`, then runs `code` or sleeps."""
    ready = tmp_path / f"{name}.ready"
    text = f"""
        import os, pathlib, signal, sys, time
        with open({str(tmp_path / name)!r} + ".starts", "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        {code}
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(60)
    """
    return Child(
        name=name,
        argv=[sys.executable, "-u", "-c", textwrap.dedent(text)],
        ready=ready.exists,
        **more,  # type: ignore[arg-type]
    )


def alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_starts_are_waited_for_and_the_shim_becomes_the_program(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    supervisor.start(child(tmp_path, "one"), child(tmp_path, "two"))
    for name, pid in supervisor.pids().items():
        assert (tmp_path / f"{name}.starts").read_text(encoding="utf-8") == f"{pid}\n"
    assert supervisor.states() == {"one": ("ready", 0), "two": ("ready", 0)}


def test_a_killed_child_is_started_again_and_listeners_hear_of_it(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    heard: list[dict[str, int]] = []
    supervisor.start(child(tmp_path))
    first = supervisor.pids()["one"]
    supervisor.listen(lambda: heard.append(supervisor.pids()))
    os.kill(first, signal.SIGKILL)
    eventually(lambda: any(pids.get("one", first) != first for pids in heard))
    supervisor.wait("one", timeout_s=10)
    assert supervisor.states()["one"] == ("ready", 1)


def test_the_back_off_doubles_up_to_its_bound(
    tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKOFF_S_FIRST", 0.05)
    monkeypatch.setattr(module, "BACKOFF_S_MAX", 0.1)
    waits: list[float] = []
    real = module.log.warning
    monkeypatch.setattr(
        module.log, "warning", lambda *args, **more: (waits.append(args[3]), real(*args, **more))
    )
    supervisor.start(child(tmp_path))
    for _ in range(4):
        os.kill(supervisor.pids()["one"], signal.SIGKILL)
        eventually(lambda n=len(waits): len(waits) > n)
        eventually(lambda: "one" in supervisor.pids())
    assert waits == [0.05, 0.1, 0.1, 0.1]


def test_the_back_off_is_forgotten_after_a_healthy_while(
    tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEALTHY_S", 0.0)
    waits, real = list[float](), module.log.warning
    monkeypatch.setattr(
        module.log, "warning", lambda *args, **more: (waits.append(args[3]), real(*args, **more))
    )
    supervisor.start(child(tmp_path))
    for _ in range(3):
        pid = supervisor.pids()["one"]
        time.sleep(2 * module.TICK_S_READY)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda p=pid: supervisor.pids().get("one", p) != p)
        supervisor.wait("one", timeout_s=5)
    assert waits == [module.BACKOFF_S_FIRST] * 3


def test_a_child_that_never_works_is_given_up_with_the_end_of_its_log(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    broken = child(tmp_path, code="print('the disk is full'); sys.exit(3)")
    with pytest.raises(
        LocalServerError, match=r"one ended with exit code 3(?s:.)*the disk is full"
    ):
        supervisor.start(broken)
    assert (
        len((tmp_path / "one.starts").read_text(encoding="utf-8").splitlines())
        == module.FIRST_TRIES
    )


def test_a_child_that_is_not_ready_in_time_is_killed(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    with pytest.raises(LocalServerError, match=r"not ready within 1 s"):
        supervisor.start(child(tmp_path, code="time.sleep(60)", ready_timeout_s=1.0))
    pids = [
        int(line) for line in (tmp_path / "one.starts").read_text(encoding="utf-8").splitlines()
    ]
    assert pids and not any(alive(pid) for pid in pids)


def test_a_program_that_is_not_there_says_so(tmp_path: Path, supervisor: Supervisor) -> None:
    with pytest.raises(LocalServerError, match="No such file"):
        supervisor.start(
            Child(
                name="none",
                argv=[str(tmp_path / "nothing")],
                ready=lambda: False,
                ready_timeout_s=1,
            )
        )


def test_stop_goes_backwards_and_kills_what_does_not_go(tmp_path: Path) -> None:
    order = tmp_path / "order"
    note = (
        "signal.signal(signal.SIGTERM, lambda *_: "
        f"(open({str(order)!r}, 'a').write(NAME), sys.exit(0)))"
    )
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    supervisor = Supervisor(tmp_path / "logs")
    supervisor.start(child(tmp_path, "a", note.replace("NAME", "'a'")))
    supervisor.start(child(tmp_path, "b", note.replace("NAME", "'b'")))
    supervisor.start(child(tmp_path, "deaf", deaf, stop_timeout_s=0.3))
    pids = supervisor.pids().values()
    supervisor.stop()
    supervisor.stop()
    assert order.read_text(encoding="utf-8") == "ba"
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(LocalServerError, match="stopped"):
        supervisor.start(child(tmp_path, "late"))


def test_children_are_out_of_reach_of_the_terminals_signals(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    supervisor.start(child(tmp_path))
    pid = supervisor.pids()["one"]
    assert os.getpgid(pid) == pid and os.getsid(pid) == os.getsid(0)


@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux'"
)
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = f"""
        import pathlib, sys, time
        from sandbox.servers.supervisor import Child, Supervisor
        supervisor = Supervisor(pathlib.Path({str(tmp_path)!r}))
        supervisor.start(Child(name="one", argv=["sleep", "60"], ready=lambda: True))
        print(supervisor.pids()["one"], flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert alive(pid)
        finally:
            process.kill()
    eventually(lambda: not alive(pid))


def test_a_long_log_is_put_aside_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_BYTES_MAX", 10)
    path = tmp_path / "x.log"
    for size, kept in ((10, True), (11, False)):
        path.write_bytes(b"y" * size)
        module.open_log(path).close()
        assert (path.stat().st_size == size) is kept
    assert (tmp_path / "x.log.1").stat().st_size == 11


def test_tail_of_nothing_and_of_much(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert module.tail(path, 3) == []
    path.write_bytes(b"x" * 100_000 + b"\nlast but one\n\xff last\n")
    assert module.tail(path, 2) == ["last but one", "\ufffd last"]


def test_nothing_to_start_is_started_at_once(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.check()
    assert supervisor.pids() == {}


def test_an_exit_code_that_is_final_is_not_tried_again(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    ready = tmp_path / "one.ready"
    code = f"pathlib.Path({str(ready)!r}).touch(); time.sleep(0.3); sys.exit(3)"
    one = child(tmp_path, code=code, final_codes=frozenset({3}))
    supervisor.start(one)
    eventually(lambda: supervisor.states()["one"][0] == "failed")
    with pytest.raises(LocalServerError, match="one ended with exit code 3"):
        supervisor.check()
    assert supervisor.states()["one"][1] == 0


def test_a_probe_that_raises_anything_does_not_end_the_supervisor(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    answers = iter([ValueError("half an answer"), KeyError("x"), True])

    def ready() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    one = child(tmp_path)
    supervisor.start(Child(name="one", argv=one.argv, ready=ready))
    assert supervisor.states()["one"] == ("ready", 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a child as another user")
def test_a_child_of_another_user_dies_with_its_supervisor(tmp_path: Path) -> None:
    """A change of the user clears the request for a signal at the parent's death."""
    tmp_path.chmod(0o777)
    code = f"""
        import os, sys, time
        from pathlib import Path
        from sandbox.servers.supervisor import Child, Supervisor
        Supervisor(Path({str(tmp_path)!r})).start(
            Child(name="one", argv=["/bin/sleep", "60"], ready=lambda: True, user=(65534, 65534))
        )
        print("up", flush=True)
        time.sleep(60)
    """
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert running.stdout is not None and running.stdout.readline() == b"up\n"
        [pid] = _children(running.pid)
        eventually(lambda: os.stat(f"/proc/{pid}").st_uid == 65534)
        groups = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        assert "\nGroups:\t \n" in groups or "\nGroups:\t\n" in groups
        running.kill()
        eventually(lambda: not alive(pid))
    finally:
        running.kill()
        running.wait(10)
        running.stdout.close()


def _children(pid: int) -> list[int]:
    """Direct children of a process: those of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(p) for t in tasks for p in (t / "children").read_text(encoding="utf-8").split()]
