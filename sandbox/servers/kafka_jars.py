"""Apache Kafka's jars: downloaded once for all clones of the user, checked against a lock file.

kafka.lock has the broker's jars, connect.lock those that Kafka Connect with Debezium adds. A lock
file lists one jar a line, `<sha-256>  <path in a Maven repository>`; `python -m sandbox.servers
--lock` rewrites both from their coordinates. A download takes exactly these files, so it reads no
POM. jgo 3.2 writes into the final file and takes any file there for complete; here a file gets its
name only after its checksum was right, so a killed download resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from eddyline.errors import LocalServerError
from eddyline.process.files import move

VERSION = "4.3.0"
# slf4j-simple: Kafka logs through slf4j; with log4j's own binding among the coordinates jgo took
# kafka-clients 3.8.0.
ENDPOINT = f"org.apache.kafka:kafka_2.13:{VERSION}+org.slf4j:slf4j-simple:1.7.36"
DEBEZIUM_VERSION = "3.6.1.Final"
CONNECT_ENDPOINT = (
    f"{ENDPOINT}+org.apache.kafka:connect-runtime:{VERSION}+org.apache.kafka:connect-json:{VERSION}"
    f"+io.debezium:debezium-connector-postgres:{DEBEZIUM_VERSION}"
)
LOCK = Path(__file__).with_name("kafka.lock")
CONNECT_LOCK = LOCK.with_name("connect.lock")

# Seconds without a byte of one file.
TIMEOUT_S = 30
TRIES = 3
# Small files from one host: round trips take most of the time.
CONNECTIONS = 8
# Another set-up of the same user may be downloading the same files.
LOCK_TIMEOUT_S = 300

# (files done, files in all)
Progress = Callable[[int, int], None]


def locked(lock: Path | None = None) -> dict[str, str]:
    """{path in a Maven repository: sha-256} of every jar, in the order of the lock file.

    lock: default: LOCK
    """
    lines = (lock or LOCK).read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line)
    return {path: digest for digest, path in pairs}


def folder() -> Path:
    """The folder of the jars: `eddyline/kafka-<version>` in XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "eddyline" / f"kafka-{VERSION}"


def missing(where: Path, lock: Path | None = None) -> dict[str, str]:
    """The part of `locked(lock)` that the folder lacks or has with other bytes.

    Reads every jar: 42 MB, about 0.1 s.
    """
    return {
        path: digest
        for path, digest in locked(lock).items()
        if _digest(where / PurePosixPath(path).name) != digest
    }


def fetch(on_progress: Progress = lambda done, total: None, lock: Path | None = None) -> list[Path]:
    """The jars, in the order of the lock file; downloads missing ones first.

    lock: default: LOCK
    on_progress: called from this thread after each file
    Raises LocalServerError if a jar cannot be downloaded.
    """
    where = folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
        if missing(where, lock):
            with _locked(where / ".lock"):
                _fetch(missing(where, lock), len(locked(lock)), where, on_progress)
    except OSError as error:
        raise LocalServerError(
            f"fetching Apache Kafka: {where}: {error.strerror or error}. Set XDG_CACHE_HOME to "
            "another place."
        ) from None
    return [where / PurePosixPath(path).name for path in locked(lock)]


def resolve(endpoint: str = ENDPOINT) -> str:
    """The text of a new lock file: what jgo finds for the coordinates now.

    Needs the registry; about 15 s, with Connect a minute.
    """
    import jgo

    with tempfile.TemporaryDirectory() as temporary:
        files = jgo.build(endpoint, cache_dir=Path(temporary)).all_jars
        paths = {
            a.filename: (a.component.path_prefix / a.filename).as_posix()
            for a in jgo.resolve(endpoint)
        }
        lines = sorted((paths[file.name], _digest(file)) for file in files)
    return "".join(f"{digest}  {path}\n" for path, digest in lines)


def write_locks() -> None:
    """Rewrite both lock files. Raises LocalServerError if Connect needs other jars of the broker.

    One class path cannot hold two versions of a jar.
    """
    kafka = resolve()
    both = resolve(CONNECT_ENDPOINT).splitlines(keepends=True)
    if lacking := set(kafka.splitlines(keepends=True)) - set(both):
        raise LocalServerError(
            f"resolving Kafka Connect: it takes other versions of {len(lacking)} of the broker's "
            f"jars: {min(lacking).split()[1]}, …"
        )
    LOCK.write_text(kafka, encoding="utf-8")
    own = [line for line in both if line not in kafka]
    CONNECT_LOCK.write_text("".join(own), encoding="utf-8")


def _fetch(needed: dict[str, str], total: int, where: Path, on_progress: Progress) -> None:
    if not needed:
        return
    try:
        from jgo.config import GlobalSettings
        from jgo.constants import MAVEN_CENTRAL_URL
        from jgo.maven import MavenContext
    except ImportError:
        raise LocalServerError(
            "fetching Apache Kafka: the package jgo is missing; install eddyline[local], or set "
            "KAFKA_BOOTSTRAP_SERVERS"
        ) from None

    # A mirror in the user's jgo settings comes before Maven Central.
    repositories = {**GlobalSettings.load().repositories, "central": MAVEN_CENTRAL_URL}
    on_progress(total - len(needed), total)
    for left in where.glob(".fetch-*"):  # of a killed download; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=where, prefix=".fetch-") as temporary:
        context = MavenContext(
            repo_cache=Path(temporary), remote_repos=repositories, timeout=TIMEOUT_S
        )

        def download(path: str, digest: str) -> None:
            *group, artifact, version, _name = PurePosixPath(path).parts
            jar = context.project(".".join(group), artifact).at_version(version).artifact()
            for attempt in range(1, TRIES + 1):
                try:
                    file = jar.resolve()
                    if (found := _digest(file)) != digest:
                        raise RuntimeError(f"its SHA-256 is {found}, the lock says {digest}")
                    move(file, where / file.name)
                    return
                # The errors of requests and jgo have no common base below Exception.
                except Exception as error:
                    shutil.rmtree(Path(temporary, *group, artifact), ignore_errors=True)
                    if attempt == TRIES:
                        raise LocalServerError(
                            f"fetching Apache Kafka: {path}: {error}. Run the command again when "
                            "the registry can be reached (files that are here are kept), or set "
                            "KAFKA_BOOTSTRAP_SERVERS to a Kafka of your own."
                        ) from None
                    time.sleep(attempt)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            jobs = [pool.submit(download, path, digest) for path, digest in needed.items()]
            try:
                for done, job in enumerate(as_completed(jobs), start=total - len(needed) + 1):
                    job.result()
                    on_progress(done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock; waits up to LOCK_TIMEOUT_S for another process."""
    try:
        held = FileLock(path, LOCK_TIMEOUT_S, poll_interval=0.2, fallback_to_soft=False).acquire()
    except Timeout:
        raise LocalServerError(
            f"fetching Apache Kafka: another process has held {path} for {LOCK_TIMEOUT_S} s"
        ) from None
    with held:
        yield
