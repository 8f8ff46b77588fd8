"""Apache Kafka's jars: downloaded once for all clones of the user, each checked against kafka.lock.

kafka.lock lists one jar a line, `<sha-256>  <path in a Maven repository>`; `python -m
sandbox.servers --lock` rewrites it from ENDPOINT. A download takes exactly these files, so it reads
no POM. jgo 3.2 writes into the final file and takes any file there for complete; here a file gets
its name only after its checksum was right, so a killed download resumes where it stopped.
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
LOCK = Path(__file__).with_name("kafka.lock")

# Seconds without a byte of one file.
TIMEOUT_S = 30
TRIES = 3
# Small files from one host: round trips take most of the time.
CONNECTIONS = 8
# Another set-up of the same user may be downloading the same files.
LOCK_TIMEOUT_S = 300

# (files done, files in all)
Progress = Callable[[int, int], None]


def locked() -> dict[str, str]:
    """{path in a Maven repository: sha-256} of every jar, in the order of kafka.lock."""
    pairs = (line.split() for line in LOCK.read_text(encoding="utf-8").splitlines() if line)
    return {path: digest for digest, path in pairs}


def folder() -> Path:
    """The folder of the jars: `eddyline/kafka-<version>` in XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "eddyline" / f"kafka-{VERSION}"


def missing(where: Path) -> dict[str, str]:
    """The part of `locked()` that the folder lacks or has with other bytes.

    Reads every jar: 42 MB, about 0.1 s.
    """
    return {
        path: digest
        for path, digest in locked().items()
        if _digest(where / PurePosixPath(path).name) != digest
    }


def fetch(on_progress: Progress = lambda done, total: None) -> list[Path]:
    """The jars, in the order of kafka.lock; downloads missing ones first.

    on_progress: called from this thread after each file
    Raises LocalServerError if a jar cannot be downloaded.
    """
    where = folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
        if missing(where):
            with _locked(where / ".lock"):
                _fetch(missing(where), where, on_progress)
    except OSError as error:
        raise LocalServerError(
            f"fetching Apache Kafka: {where}: {error.strerror or error}. Set XDG_CACHE_HOME to "
            "another place."
        ) from None
    return [where / PurePosixPath(path).name for path in locked()]


def resolve() -> str:
    """The text of a new kafka.lock: what jgo finds for ENDPOINT now.

    Needs the registry; about 15 s.
    """
    import jgo

    with tempfile.TemporaryDirectory() as temporary:
        files = jgo.build(ENDPOINT, cache_dir=Path(temporary)).all_jars
        paths = {
            a.filename: (a.component.path_prefix / a.filename).as_posix()
            for a in jgo.resolve(ENDPOINT)
        }
        lines = sorted((paths[file.name], _digest(file)) for file in files)
    return "".join(f"{digest}  {path}\n" for path, digest in lines)


def _fetch(needed: dict[str, str], where: Path, on_progress: Progress) -> None:
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
    total = len(locked())
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
                        raise RuntimeError(f"its SHA-256 is {found}, kafka.lock says {digest}")
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
