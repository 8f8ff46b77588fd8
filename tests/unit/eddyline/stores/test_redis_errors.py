"""Errors of redis-py: which are retried, which are refused; no message has a password."""

from __future__ import annotations

import pytest
from redis import exceptions

from eddyline.errors import SlotUnavailable, StoreRefused, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores.redis_errors import translate_error
from eddyline.stores.redis_url import target


def translated(
    error: exceptions.RedisError, url: str = "redis://ann:s3cret@h:1/0", cluster: bool = False
) -> str:
    made = translate_error(error, target(Settings(redis_url=url, redis_cluster=cluster)))
    assert "s3cret" not in str(made) and "Redis at " in str(made)
    return f"{type(made).__name__} {made}"


WAITED = StoreUnavailable.__name__
OF_ONE_SLOT = SlotUnavailable.__name__
REFUSED = StoreRefused.__name__


@pytest.mark.parametrize(
    ("error", "became", "said"),
    [
        (exceptions.ConnectionError("Error 111 connecting to h:1."), WAITED, "Error 111"),
        (exceptions.TimeoutError("Timeout reading from h:1"), WAITED, "Timeout"),
        (exceptions.BusyLoadingError("Redis is loading"), WAITED, "loading"),
        (
            exceptions.OutOfMemoryError("not allowed when used memory > 'maxmemory'."),
            WAITED,
            "memory",
        ),
        (
            exceptions.ReadOnlyError("You can't write against a read only replica."),
            WAITED,
            "read only",
        ),
        (exceptions.ClusterDownError("The cluster is down"), WAITED, "cluster is down"),
        (exceptions.MasterDownError("Link with MASTER is down"), WAITED, "MASTER"),
        (
            exceptions.TryAgainError("Multiple keys request during rehashing of slot"),
            OF_ONE_SLOT,
            "rehashing",
        ),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), WAITED, "MISCONF"),
        (exceptions.ResponseError("BUSY Redis is busy running a script"), WAITED, "BUSY"),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas"), WAITED, "NOREPLICAS"),
        (
            exceptions.ResponseError("WRONGTYPE Operation against a key"),
            REFUSED,
            "refuses a command",
        ),
        (
            exceptions.AuthenticationError("invalid username-password pair"),
            REFUSED,
            "user and the password",
        ),
        (exceptions.NoPermissionError("User ann has no permissions"), REFUSED, "docs/security.md"),
        (
            exceptions.ResponseError("ACL failure in script: User ann …"),
            REFUSED,
            "docs/security.md",
        ),
        (exceptions.MovedError("1 h:2"), REFUSED, "set redis_cluster = true"),
        (exceptions.InvalidResponse('Protocol error, got "H"'), REFUSED, "rediss://"),
        (exceptions.ConnectionError("Connection closed by server."), WAITED, "rediss://"),
        (
            exceptions.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] x"),
            REFUSED,
            "redis_ca_file",
        ),
        (
            exceptions.ConnectionError("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED]"),
            REFUSED,
            "redis_cert_file",
        ),
        (exceptions.ConnectionError("[SSL: TLSV1_ALERT_UNKNOWN_CA] x"), REFUSED, "redis_cert_file"),
        (exceptions.ConnectionError("[SSL: WRONG_VERSION_NUMBER] x"), REFUSED, "speaks no TLS"),
        (
            exceptions.ConnectionError("[SSL: UNEXPECTED_EOF_WHILE_READING] x"),
            WAITED,
            "UNEXPECTED_EOF",
        ),
    ],
)
def test_what_waiting_heals_is_waited_for_and_the_rest_refused(
    error: exceptions.RedisError, became: str, said: str
) -> None:
    text = translated(error)
    assert text.startswith(became) and said in text
    # As redis-py tells it of a command of a pipeline.
    error.args = (f"Command # 1 (GET fence:{{u3}}:clicks:3) of pipeline caused error: {error}",)
    assert translated(error).startswith(became)


def test_a_slot_that_moves_is_waited_for_in_a_cluster() -> None:
    assert translated(exceptions.AskError("7 h:2"), cluster=True) == (
        f"{OF_ONE_SLOT} Redis at redis://ann:***@h:1/0: hash slot 7 is being moved to h:2"
    )
    assert "asks for a user and a password" in translated(
        exceptions.AuthenticationError("x"), "redis://h:1"
    )
