"""Files are replaced whole, and locks end with their process."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eddyline.process.files import read_if_exists, replacing, write_atomically
from eddyline.process.locks import is_locked, try_lock

HOLD = """
import sys, time
from pathlib import Path
from eddyline.process.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held" if lock else "refused", flush=True)
time.sleep(60)
"""


def test_a_reader_sees_the_old_or_the_new_content(tmp_path: Path) -> None:
    path, contents = tmp_path / "a" / "f", [bytes([n]) * 100_000 for n in range(20)]
    write_atomically(path, contents[0])
    seen, done = set[bytes](), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_atomically(path, content)
    done.set()
    reader.join(10)
    assert seen <= set(contents) and [p.name for p in path.parent.iterdir()] == ["f"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_who_may_read_it(mode: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", b"x", mode=mode)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert read_if_exists(path) is None
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert read_if_exists(path) == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_lock_is_exclusive_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    assert not is_locked(path)
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert is_locked(path) and is_locked(path) and try_lock(path) is None
        finally:
            holder.kill()
        holder.wait(10)
    assert not is_locked(path)
    lock = try_lock(path)
    assert lock is not None and is_locked(path)
    threading.Thread(target=lock.release).start()
    for _ in range(1_000):
        if not is_locked(path):
            break
    assert not is_locked(path)
