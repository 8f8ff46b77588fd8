"""Parsing of `redis_url`; no message shows its password."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eddyline.errors import SettingsError
from eddyline.settings.loader import Settings
from eddyline.stores.redis_url import Target, target, without_password


def at(url: str, *, cluster: bool = False) -> Target:
    return target(Settings(redis_url=url, redis_cluster=cluster))


@pytest.mark.parametrize(
    ("url", "addresses", "db", "user", "password", "tls"),
    [
        ("redis://host", (("host", 6379),), 0, "", "", False),
        ("redis://host:1/", (("host", 1),), 0, "", "", False),
        ("redis:///3", (("localhost", 6379),), 3, "", "", False),
        ("rediss://:pw@host:65535/15", (("host", 65535),), 15, "", "pw", True),
        ("redis://ann:p%25w%40@h/0", (("h", 6379),), 0, "ann", "p%w@", False),
        ("redis://ann:a:b@c/d#e?f@h:7", (("h", 7),), 0, "ann", "a:b@c/d#e?f", False),
        ("redis://[::1]:7000/1", (("::1", 7000),), 1, "", "", False),
        ("redis://ann@[fe80::1]", (("fe80::1", 6379),), 0, "ann", "", False),
    ],
)
def test_a_url_says_where_and_who(
    url: str, addresses: tuple[tuple[str, int], ...], db: int, user: str, password: str, tls: bool
) -> None:
    found = at(url)
    assert (found.addresses, found.db, found.user, found.password) == (
        addresses,
        db,
        user,
        password,
    )
    assert (found.tls, found.path, found.cluster) == (tls, "", False)
    assert password == "" or password not in repr(found) + found.shown


def test_a_unix_socket_and_a_cluster() -> None:
    found = at("unix://ann:pw@/run/redis.sock")
    assert (found.path, found.addresses, found.password) == ("/run/redis.sock", (), "pw")
    assert found.shown == "unix://ann:***@/run/redis.sock"
    several = at("rediss://ann:pw@a:1,b,[::1]:3/0", cluster=True)
    assert (
        several.addresses == (("a", 1), ("b", 6379), ("::1", 3)) and several.tls and several.cluster
    )
    assert several.shown == "rediss://ann:***@a:1,b,[::1]:3/0"


@pytest.mark.parametrize(
    ("url", "addresses", "service", "db", "tls"),
    [
        ("redis+sentinel://a:1,b,[::1]:3/m", (("a", 1), ("b", 26379), ("::1", 3)), "m", 0, False),
        ("redis+sentinel://ann:pw@a/my.state-1/15", (("a", 26379),), "my.state-1", 15, False),
        ("rediss+sentinel://a/m/", (("a", 26379),), "m", 0, True),
    ],
)
def test_sentinels_and_the_name_of_the_primary(
    url: str, addresses: tuple[tuple[str, int], ...], service: str, db: int, tls: bool
) -> None:
    found = at(url)
    assert (found.addresses, found.service, found.db, found.tls) == (addresses, service, db, tls)
    assert not found.cluster and found.path == "" and at("redis://a").service == ""
    assert "pw" not in found.shown


@pytest.mark.parametrize(
    ("url", "cluster", "said"),
    [
        ("", False, "expected redis://"),
        ("host:6379", False, "expected redis://"),
        ("sentinel://host/m", False, "expected redis://"),
        ("redis+sentinel://host:26379", False, "the name of the primary must follow"),
        ("redis+sentinel://host/a b", False, "the name of the primary must follow"),
        ("redis+sentinel://host/" + "m" * 257, False, "the name of the primary must follow"),
        ("redis+sentinel://host/m/one", False, "only a database may follow"),
        ("redis+sentinel://host:65536/m", False, "the port from 1 to 65535"),
        ("redis+sentinel://host/m", True, "Sentinel cannot be a cluster's"),
        ("http://:s3cret@host", False, "expected redis://"),
        ("redis://:s3cret", False, "expected host:port"),
        ("redis://:s3cret/0", False, "expected host:port"),
        ("redis://ann:s3cret@host:0", False, "port from 1 to 65535"),
        ("redis://ann:s3cret@host:65536", False, "port from 1 to 65535"),
        ("redis://ann:s3cret@host:6379000", False, "port from 1 to 65535"),
        ("redis://ann:s3cret@ho st", False, "expected host:port"),
        ("redis://ann:s3cret@::1", False, "expected host:port"),
        ("redis://host/0?password=s3cret", False, "takes nothing after a"),
        ("redis://:s3cret@host/-1", False, "only a database"),
        ("redis://:s3cret@host/1/2", False, "only a database"),
        ("redis://:s3cret@host/999999", False, "only a database"),
        ("redis://:s3cret@a,b", False, "several addresses are a cluster's"),
        ("redis://:s3cret@a,b/1", True, "database 1 cannot be a cluster's"),
        ("unix://:s3cret@/run/s", True, "a Unix socket cannot be a cluster's"),
        ("redis://:s3cret@a,b:x", True, "expected host:port"),
    ],
)
def test_a_bad_url_is_told_without_its_password(url: str, cluster: bool, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as raised:
        at(url, cluster=cluster)
    assert "redis_url = " in str(raised.value) and "s3cret" not in str(raised.value)


@given(
    st.text(min_size=1, max_size=20), st.sampled_from(["host:1", "host:1/0", "a:1,b:2/0", "[::1]"])
)
@example("x@", "host:1")
@example("se/cr#e?t", "host:1")
@example("%41", "host:1")
def test_whatever_the_password_is_it_is_read_and_not_shown(password: str, place: str) -> None:
    written = password.replace("%", "%25")
    found = at(f"redis://ann:{written}@{place}", cluster="," in place)
    assert found.password == password and found.user == "ann"
    # What is shown is the same for every password.
    assert found.shown == without_password(f"redis://ann:x@{place}") == f"redis://ann:***@{place}"


@given(st.text(max_size=60))
@example("redis://:pw")
@example("redis://")
def test_no_text_breaks_the_reading(url: str) -> None:
    try:
        at(f"redis://{url}")
    except SettingsError as raised:
        assert str(raised).startswith("redis_url = ")
