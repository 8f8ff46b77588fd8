"""Parsing of `redis_url`, and the TLS files of the settings.

Not redis-py's parser: errors show no password, a password may have any character, and a cluster may
have several addresses.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote

from eddyline.errors import SettingsError
from eddyline.process.files import check_readable
from eddyline.settings.loader import Settings
from eddyline.stores.cluster_slots import Address

# The settings that belong to the address, for a child process that gets its settings by
# environment.
_FILES = ("redis_ca_file", "redis_cert_file", "redis_key_file")
NAMES = ("redis_cluster", "redis_sentinel_user", "redis_sentinel_password", *_FILES)
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_PORT = 6379
_SENTINEL_PORT = 26_379


@dataclass(frozen=True)
class Target:
    """Address and credentials of Redis.

    shown:     the URL without its password
    addresses: (host, port); several only for a cluster or for Sentinel, whose addresses these are
               then; none with a `path` (a Unix socket)
    service:   the name under which Sentinel knows the primary; "" without Sentinel
    """

    shown: str
    addresses: tuple[Address, ...]
    path: str
    db: int
    user: str
    password: str = field(repr=False)
    tls: bool
    cluster: bool
    service: str = ""


def target(settings: Settings) -> Target:
    """Parse and check `redis_url`. Raises SettingsError, which shows no password."""
    shown = without_password(settings.redis_url)
    scheme, found, rest = settings.redis_url.partition("://")
    if not found or scheme not in _SCHEMES:
        raise SettingsError(
            f"redis_url = {shown!r}: expected redis://, rediss:// (TLS), redis+sentinel://, "
            "rediss+sentinel:// or unix:// and an address"
        )
    sentinel = scheme.endswith("+sentinel")
    # The last @ ends the password, which may have any character; only % is written as %25.
    credentials, _, place = rest.rpartition("@")
    user, _, password = credentials.partition(":")
    place, options, _ = place.partition("?")
    if options:
        raise SettingsError(
            f"redis_url = {shown!r}: takes nothing after a '?'; TLS files are settings of their own"
        )
    at, _, name = place.partition("/") if scheme != "unix" else ("", "", "")
    service, name = _service(name, shown) if sentinel else ("", name)
    made = Target(
        shown=shown,
        addresses=()
        if scheme == "unix"
        else tuple(
            _address(part, shown, _SENTINEL_PORT if sentinel else _PORT) for part in at.split(",")
        ),
        path=place if scheme == "unix" else "",
        db=_database(name, shown),
        user=unquote(user),
        password=unquote(password),
        tls=scheme.startswith("rediss"),
        cluster=settings.redis_cluster,
        service=service,
    )
    if made.cluster and (made.db or made.path or sentinel):
        what = f"database {made.db}" if made.db else "Sentinel" if sentinel else "a Unix socket"
        raise SettingsError(
            f"redis_url = {shown!r}: {what} cannot be a cluster's; redis_cluster is set"
        )
    if len(made.addresses) > 1 and not (made.cluster or sentinel):
        raise SettingsError(
            f"redis_url = {shown!r}: several addresses are a cluster's: set redis_cluster; those "
            "of Sentinel begin with redis+sentinel://"
        )
    return made


def tls(settings: Settings, to: Target) -> ssl.SSLContext | None:
    """The TLS context; None without TLS. Raises SettingsError, which names the setting."""
    files = {name: getattr(settings, name) for name in _FILES if getattr(settings, name)}
    if not to.tls:
        if files:
            raise SettingsError(
                f"{', '.join(files)}: set, but redis_url = {to.shown!r} is not rediss:// (TLS)"
            )
        return None
    for name, path in files.items():
        check_readable(name, path)
    if settings.redis_key_file and not settings.redis_cert_file:
        raise SettingsError(
            f"redis_key_file = {settings.redis_key_file!r}: set without redis_cert_file"
        )
    try:
        # With a CA file only its certificates are trusted, without one those of the system.
        context = ssl.create_default_context(cafile=settings.redis_ca_file or None)
    except ssl.SSLError:
        raise SettingsError(
            f"redis_ca_file = {settings.redis_ca_file!r}: holds no certificate in PEM form"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.redis_cert_file:
        _load_own(context, settings)
    return context


def _load_own(context: ssl.SSLContext, settings: Settings) -> None:
    certificate, key = settings.redis_cert_file, settings.redis_key_file

    def no_pass_phrase() -> str:
        raise SettingsError(
            f"redis_key_file = {key or certificate!r}: the key must not have a pass phrase"
        )

    try:
        context.load_cert_chain(certificate, key or None, no_pass_phrase)
    except ssl.SSLError as error:
        raise SettingsError(
            f"redis_cert_file = {certificate!r}, redis_key_file = {key!r}: not a certificate and "
            f"its own key in PEM form ({error.reason or 'unreadable'})"
        ) from None


def _service(name: str, shown: str) -> tuple[str, str]:
    """(service, database) of `service/0`."""
    service, _, database = name.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,256}", service):
        raise SettingsError(
            f"redis_url = {shown!r}: behind Sentinel's addresses the name of the primary must "
            "follow, as /mymaster or /mymaster/0"
        )
    return service, database


def _address(text: str, shown: str, port: int = _PORT) -> Address:
    """`host`, `host:port` or `[host]:port`."""
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.%]+)\](?::(\d{1,5}))?", text)
    plain = re.fullmatch(r"([^:\[\]\s]*)(?::(\d{1,5}))?", text)
    found = bracketed or plain
    if found is None or not 1 <= int(found[2] or port) <= 65_535:
        raise SettingsError(f"redis_url = {shown!r}: expected host:port, the port from 1 to 65535")
    return unquote(found[1]) or "localhost", int(found[2] or port)


def _database(name: str, shown: str) -> int:
    if name and not re.fullmatch(r"\d{1,5}/?", name):
        raise SettingsError(
            f"redis_url = {shown!r}: behind the address only a database may follow, as /0"
        )
    return int(name.rstrip("/") or 0)


# `host:port,…`, up to a slash.
_ADDRESSES = re.compile(
    r"(?:\[[^\]]*\]|[^:,/]*)(?::\d+)?(?:,(?:\[[^\]]*\]|[^:,/]*)(?::\d+)?)*(?:/|\Z)"
)


def without_password(url: str) -> str:
    """A URL for a log line.

    >>> without_password("redis://ann:s3cret@127.0.0.1:6379/0")
    'redis://ann:***@127.0.0.1:6379/0'
    >>> without_password("redis://:s3/cr@t@host:6379/0")
    'redis://:***@host:6379/0'
    >>> without_password("redis://host/0?password=s3cret")
    'redis://host/0?***'
    >>> without_password("redis://:s3cret/0")  # the @ is missing
    'redis://***'
    """
    scheme, found, rest = url.partition("://")
    # Everything before the last @ may be part of the password.
    credentials, at, place = rest.rpartition("@")
    shown = place.partition("?")[0]
    if not found or not (at or scheme == "unix" or _ADDRESSES.match(shown)):
        return f"{scheme}://***" if found else "***"
    options = "?***" if "?" in place else ""
    user = f"{credentials.partition(':')[0]}:***@" if ":" in credentials else f"{credentials}{at}"
    return f"{scheme}://{user}{shown}{options}"
