"""redis-py's errors as StoreUnavailable (retry) or StoreRefused (a person must act).

No message shows a password.
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.sentinel import MasterNotFoundError

from eddyline.errors import EddylineError, SlotUnavailable, StoreRefused, StoreUnavailable
from eddyline.stores.redis_url import Target

# Temporary errors. Any other error answer (wrong key type, an error in a script) is permanent.
_TEMPORARY = (OutOfMemoryError, ReadOnlyError, ClusterError, TryAgainError)
_TEMPORARY_CODES = (
    "OOM",
    "LOADING",
    "BUSY",
    "MISCONF",
    "READONLY",
    "NOREPLICAS",
    "CLUSTERDOWN",
    "TRYAGAIN",
)
# Errors of one hash slot: the node answers at once, and its other slots may be well.
_OF_ONE_SLOT = ("hash slot", "tryagain")
_TLS_REASON = re.compile(r"\[SSL: ([A-Z0-9_]+)\]")
_NO_TLS_THERE = {
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "UNKNOWN_PROTOCOL",
}
# Behind the repr of each Sentinel's client, why it names none.
_OF_SENTINEL = re.compile(r"> - ([^<,]+)")
# redis-py's prefix to the server's message if a command of a pipeline failed.
_IN_PIPELINE = re.compile(r"^Command # \d+ .*?caused error: ", re.DOTALL)


def translate_error(error: RedisError, to: Target) -> EddylineError:
    """An error of redis-py as StoreUnavailable or StoreRefused, with the address."""
    at, text = f"Redis at {to.shown}", _IN_PIPELINE.sub("", str(error))
    if isinstance(error, NoPermissionError) or text.startswith(("NOPERM", "ACL failure in script")):
        return StoreRefused(f"{at}: {text}; docs/security.md lists what each process may do")
    if isinstance(error, AuthenticationError | AuthorizationError):
        if to.password:
            return StoreRefused(f"{at} refuses the user and the password of redis_url: {text}")
        return StoreRefused(f"{at} asks for a user and a password, and redis_url has none: {text}")
    if found := _TLS_REASON.search(text):
        return _translate_tls(found[1], at, text)
    if isinstance(error, MasterNotFoundError):
        why = ", ".join(_OF_SENTINEL.findall(text)) or "none answers"
        return StoreUnavailable(f"{at}: Sentinel names no primary {to.service!r}: {why}")
    if isinstance(error, InvalidResponse):
        hint = "" if to.tls else "; where that is a port for TLS, redis_url begins with rediss://"
        return StoreRefused(f"{at} does not speak as Redis does: {text}{hint}")
    if isinstance(error, AskError):
        if not to.cluster:
            return cluster_not_set(to.shown)
        what = "has been moved" if isinstance(error, MovedError) else "is being moved"
        return SlotUnavailable(
            f"{at}: hash slot {error.slot_id} {what} to {error.host}:{error.port}"
        )
    if any(what in text.lower() for what in _OF_ONE_SLOT) or isinstance(error, TryAgainError):
        return SlotUnavailable(f"{at}: {text}")
    if isinstance(error, _TEMPORARY) or text.startswith(_TEMPORARY_CODES):
        return StoreUnavailable(f"{at}: {text}")
    if isinstance(error, ResponseError):
        return StoreRefused(f"{at} refuses a command: {text}")
    return StoreUnavailable(f"{at}: {type(error).__name__}: {text}{_hint(text, to)}")


def cluster_not_set(shown: str) -> StoreRefused:
    """The error for a cluster node where the settings say a single server."""
    return StoreRefused(f"Redis at {shown} is a node of a Redis Cluster: set redis_cluster = true")


def _translate_tls(reason: str, at: str, text: str) -> EddylineError:
    if reason == "CERTIFICATE_VERIFY_FAILED":
        return StoreRefused(
            f"{at} shows a certificate that is not trusted: {text}; redis_ca_file names the CA of "
            "the certificate, which must name the host in redis_url"
        )
    if "ALERT" in reason and any(
        what in reason for what in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE")
    ):
        return StoreRefused(
            f"{at} asks for another certificate of ours (redis_cert_file, redis_key_file): {text}"
        )
    if reason in _NO_TLS_THERE:
        return StoreRefused(
            f"{at} speaks no TLS there; without it redis_url begins with redis://: {text}"
        )
    return StoreUnavailable(f"{at}: {text}")


def _hint(text: str, to: Target) -> str:
    """Another possible reason if a server closes at once or does not finish the handshake."""
    if to.tls and text.startswith("Timeout connecting"):
        return " (if this persists: the port may speak no TLS, redis://)"
    if "closed by server" not in text.lower() and "reset by peer" not in text.lower():
        return ""
    if to.tls:
        return " (if this persists: it may ask for redis_cert_file and redis_key_file)"
    return " (if this persists: it may be a port for TLS, rediss://)"
