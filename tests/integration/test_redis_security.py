"""Redis' users and TLS: the right credentials work; others are refused, and no secret is shown.

The users are those of docs/security.md, to the letter. TLS runs with real certificates against a
terminator in front of the bundled server, which is built without TLS, and against a server with TLS
where the PATH has one.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import redis
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from cli.commands.capacity import Sizes, redis_parts
from eddyline.errors import EddylineError, SettingsError, StoreRefused, StoreUnavailable
from eddyline.kafka import topics
from eddyline.process import discovery
from eddyline.schema import co_visits, seen_items
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.layout import Layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    LogId,
    RefusedRecord,
    Source,
    UserEffects,
    UserQuery,
    UserWrite,
)
from serving.rpc.client import is_ready
from tests.integration.redis_servers import (
    Server,
    real_cluster,
    real_server,
    tls_program,
    tls_terminator,
    wait_for,
)

pytestmark = pytest.mark.timeout(240)

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
ADMIN = "Winkelhaken-3"
PASSWORDS = {"ingest": "Setz/kasten@8#", "worker": "Steg:17?", "operator": "Ahle-21"}
WRONG = "Hurenkind-5"
SECRETS = (ADMIN, *PASSWORDS.values(), WRONG)
LOG = LogId("cluster", "topic")
CLICKS = Source("clicks", 3)
DECAYS = [EventDecay(1), EventDecay(10)]


def documented() -> dict[str, list[str]]:
    """The users of the documentation: name -> rules of ACL SETUSER."""
    found = re.findall(r"^user (\w+) (.+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: rules.split() for name, rules in found}


def make_users(client: redis.Redis, namespace: str) -> None:
    info = client.info("server")
    old = "valkey_version" not in info and info["redis_version"] < "7.2"
    for name, rules in documented().items():
        rules = [rule for rule in rules if not (old and rule == "+client|setinfo")]
        mine = [rule.replace("~shop", f"~{namespace}") for rule in rules]
        assert f">PASSWORD-OF-{name.upper()}" in mine
        mine = [f">{PASSWORDS[name]}" if rule.startswith(">") else rule for rule in mine]
        client.execute_command("ACL SETUSER", name, "reset", *mine)


def url(user: str, port: int, password: str = "", scheme: str = "redis") -> str:
    return f"{scheme}://{user}:{password or PASSWORDS[user]}@127.0.0.1:{port}/0"


def no_secret(*texts: object) -> None:
    for text in map(str, texts):
        assert not [secret for secret in SECRETS if secret in text], text


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[RedisStore]:
    store = RedisStore(settings)
    try:
        yield store
    finally:
        store.close()


def refusal(settings: Settings, call: Callable[[RedisStore], object] = RedisStore.check) -> str:
    """The message with which a store of these settings is refused."""
    with opened(settings) as store:
        with pytest.raises(StoreRefused) as raised:
            call(store)
        no_secret(
            raised.value, repr(raised.value), repr(store._redis), repr(store._target), settings
        )
        return str(raised.value)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that requires a password."""
    with real_server(tmp_path_factory.mktemp("asking"), requirepass=ADMIN) as server:
        yield server


@pytest.fixture
def namespace(asking: Server) -> str:
    """A namespace of this test; the documented users may access this one only."""
    made = f"t-{uuid.uuid4().hex[:12]}"
    with asking.client(password=ADMIN) as client:
        make_users(client, made)
    return made


def test_credentials_that_are_wrong_or_missing_are_refused(asking: Server, namespace: str) -> None:
    port = asking.port
    here = Settings(namespace=namespace)

    def at(address: str) -> Settings:
        return msgspec.structs.replace(here, redis_url=address)

    with opened(at(url("ingest", port))) as store:
        store.check()
        no_secret(repr(store._redis), repr(store._target), store.address)
    assert f"redis://ingest:***@127.0.0.1:{port}/0 refuses the user and the password" in refusal(
        at(url("ingest", port, WRONG))
    )
    assert "refuses the user and the password" in refusal(at(url("nobody", port, WRONG)))
    assert "asks for a user and a password, and redis_url has none" in refusal(
        at(f"redis://127.0.0.1:{port}")
    )
    with asking.client(password=ADMIN) as client:
        client.execute_command("ACL SETUSER", "ingest", "off")
    assert "refuses the user and the password" in refusal(at(url("ingest", port)))


def test_a_wrong_password_ends_a_process_with_a_sentence(
    asking: Server, namespace: str, fresh_settings: Settings
) -> None:
    """Processes and commands end with exit code 3, name the reason and show no secret."""
    topics.ensure_topics(msgspec.structs.replace(fresh_settings, namespace=namespace))
    env = {
        **os.environ,
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": fresh_settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": url("ingest", asking.port, WRONG),
        "EDDYLINE_NAMESPACE": namespace,
        "EDDYLINE_DATA_DIR": fresh_settings.data_dir,
        "EDDYLINE_LOG_LEVEL": "debug",
        "EDDYLINE_CLICKS_PARTITIONS": "4",
        "EDDYLINE_ITEMS_PARTITIONS": "2",
        "EDDYLINE_WORKER_PORT": "0",
    }
    commands = (["streams"], ["serving"], ["cli", "accept-log", "--yes"])
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", *words],
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            for words in commands
        ]
        for process in running:
            stack.callback(process.kill)
        for process, words in zip(running, commands, strict=True):
            texts = process.communicate(timeout=90)
            no_secret(*texts)
            said = " ".join("".join(texts).split())
            assert "refuses the user and the password of redis_url" in said, said[-2_000:]
            assert process.returncode == 3, words


def test_each_documented_user_may_do_what_it_needs_and_nothing_else(
    asking: Server, namespace: str
) -> None:
    """Every command that the documentation gives to ingest and worker is used, and no other."""
    settings = Settings(namespace=namespace, redis_url=url("ingest", asking.port))
    for user, work in (("ingest", ingest_works), ("worker", worker_reads)):
        with asking.client(password=ADMIN) as client:
            client.script_flush("SYNC")
            client.config_resetstat()
            with opened(
                msgspec.structs.replace(settings, redis_url=url(user, asking.port))
            ) as store:
                work(store)
            used = {
                name.removeprefix("cmdstat_")
                for name, of in client.info("commandstats").items()
                if of["calls"] > of["rejected_calls"]
            } - {"auth", "config|resetstat", "script|flush"}
        given = {rule[1:] for rule in documented()[user] if rule.startswith("+")}
        assert used == given - {"cluster|slots", "asking"}, user


def test_the_documented_operator_may_plan(asking: Server, namespace: str) -> None:
    settings = Settings(namespace=namespace, redis_url=url("operator", asking.port))
    assert redis_parts(settings, Sizes(users=9, items=9, history=9))
    with pytest.raises(StoreRefused, match=r"docs/security\.md"):
        redis_parts(
            msgspec.structs.replace(settings, redis_url=url("worker", asking.port)), Sizes(9, 9, 9)
        )


def ingest_works(store: RedisStore) -> None:
    """Every kind of call that ingest makes to the store."""
    store.check()
    store.check_rights()
    store.claim_layout(Layout(1, 8, 4, 1))
    effects = UserEffects(
        accepted={"e": 9},
        histories={"ana": seen("a")},
        embeddings={"1": {"ana": (1, b"1234")}},
        emptied=("bo",),
    )
    store.write_users("u3", CLICKS, None, at(9), effects)
    later = UserEffects(
        accepted={"f": 10}, window_floor=10, seen={"ana": bytes(seen_items.ENTRY_BYTES)}, seen_max=9
    )
    assert store.write_many([UserWrite("u3", CLICKS, at(9), at(10), later)])
    assert store.read_many([UserQuery("u3", CLICKS, ["ana"], ["1"])])[0].fence == at(10)
    assert store.read_slot("u3", CLICKS).accepted == {"f": 10}
    store.write_profiles(
        "u3", Source("users", 3), None, at(1), {"ana": {"age": 1}, "bo": None}, ["1"]
    )
    assert sum(store.remove_embeddings("1", ["u3"])) == 1
    store.drop_fences("i0", [Source("items@1", 0)])
    store.count_clicks("i0", CLICKS, None, at(0), {1: {"a": 1, "b": 2}}, 2, 1)
    store.count_clicks("i0", CLICKS, at(0), at(1), {5: {"a": 1}}, 2, 1, ["a"] * 40, DECAYS)
    one = co_visits.entries([(1, 1_000, 1)])
    pairs = Source("co-visits", 3)
    for fence, new in ((None, at(0)), (at(0), at(1))):  # the second write compacts the rows
        store.append_co_visits("i0", pairs, fence, new, {"a": one}, {"b": one}, 2, 60_000)
    store.write_item_metadata(
        "i0", Source("items", 0), None, at(1), {"a": ItemMetadata(0, 1, b"{}")}
    )
    refused = ItemMetadata(0, 2, b"{}", refused=RefusedRecord(0, 3, 0, "bad_field"))
    for place, metadata in ((2, refused), (3, ItemMetadata(0, 3, b"{}"))):
        source = Source("items", 0)
        store.write_item_metadata("i0", source, at(place - 1), at(place), {"a": metadata})
    assert store.count_refused_items(["i0"]) == 0
    assert store.read_item_metadata(["a"], 1) and store.fences(CLICKS, ["u3"]) == {"u3": at(10)}


def worker_reads(store: RedisStore) -> None:
    """Every kind of call that a query worker makes to the store."""
    store.check()
    store.claim_layout(Layout(1, 8, 4, 1))
    assert store.read_user("u3", 3, "ana", "1").history == seen("a")
    assert store.popular("i0", 10) == {5: {"a": 1}}
    assert store.read_co_visits(["a"], ["b"], 1)[0][0].next.tolist() == [2.0]
    assert store.popular_trend("i0", DECAYS, 10).events == 40


def seen(item: str) -> UserHistory:
    return UserHistory(entries=(Entry(item, at_ms=1, kind=0, weight=1.0),))


def at(offset: int) -> Fence:
    return Fence(offset, LOG)


def test_what_a_user_may_not_do_is_refused_by_name(asking: Server, namespace: str) -> None:
    settings = Settings(namespace=namespace, redis_url=url("worker", asking.port))
    layout = Layout(1, 8, 4, 1)
    with opened(settings) as reader:
        with pytest.raises(StoreUnavailable, match="no layout yet, which ingest writes"):
            reader.claim_layout(layout)
    ingest = msgspec.structs.replace(settings, redis_url=url("ingest", asking.port))
    with opened(ingest) as writer:
        writer.claim_layout(layout)
    known = replace(layout, id_form="nfc")
    with opened(settings) as reader:
        reader.claim_layout(layout)
        with pytest.raises(StoreRefused, match="12"):
            reader.claim_layout(Layout(1, 12, 4, 1))
        reader.claim_layout(known)  # it may not look at the ids
        assert reader.layout() == layout
    with opened(ingest) as writer:
        writer.claim_layout(known)
        assert writer.layout() == known

    def write(store: RedisStore) -> None:
        store.write_users("u3", CLICKS, None, at(0), UserEffects())

    assert "permissions to run the 'evalsha' command" in refusal(settings, write)
    other = msgspec.structs.replace(ingest, namespace="someone-else")
    assert "permissions" in refusal(other, write) and "docs/security.md" in refusal(
        other, RedisStore.layout
    )
    with asking.client(password=ADMIN) as client:
        client.execute_command("ACL SETUSER", "ingest", "-mset")
        message = refusal(
            ingest,
            lambda store: store.write_users(
                "u3", CLICKS, None, at(0), UserEffects(histories={"ana": seen("a")})
            ),
        )
        assert "docs/security.md" in message


def test_ingest_and_worker_run_with_the_documented_users(
    asking: Server, fresh_settings: Settings, make_live, authority: Authority, dataset
) -> None:
    """Real processes over TLS: ingest with its user, a worker with a read-only user."""
    with asking.client(password=ADMIN) as client:
        make_users(client, fresh_settings.namespace)
        client.execute_command("ACL LOG", "RESET")
        with tls_terminator(asking.port, authority.server()) as port:
            settings = msgspec.structs.replace(
                fresh_settings,
                redis_ca_file=authority.ca,
                redis_url=url("ingest", port, scheme="rediss"),
            )
            live = make_live(SimpleNamespace(settings=settings))
            child, address = live.deployment.worker_child(
                is_ready,
                "reader",
                redis_url=url("worker", port, scheme="rediss"),
                clicks_partitions="4",
                items_partitions="2",
            )
            live.supervisor.start(child)
            wait_for("the reader", lambda: is_ready(address))
            token = live.click("ana", dataset.items[0].item_id)
            live.applied()
            answer = live.client(address).retrieve(
                "ana", 5, after=token, wait_ms=2_000, timeout_s=10
            )
            assert answer.freshness.after.applied and len(answer.items) == 5 and not answer.missing
            live.supervisor.stop()
            logs = [
                live.supervisor.log_file(name).read_text(encoding="utf-8")
                for name in ("ingest", "worker", "reader")
            ]
        no_secret(*logs)
        tried = {
            (entry["username"], entry["object"]) for entry in client.execute_command("ACL LOG")
        }
        # The other worker of the scene goes by ingest's name, and ingest reads no popular list.
        assert tried <= {("ingest", "zrange")}, "nothing was tried that is not allowed"


# ---- TLS


class Authority:
    """A CA of this test, its certificates, and an unrelated CA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mine, self.foreign = trustme.CA(), trustme.CA()
        self.ca, self.foreign_ca = str(folder / "ca.pem"), str(folder / "foreign.pem")
        self.mine.cert_pem.write_to_path(self.ca)
        self.foreign.cert_pem.write_to_path(self.foreign_ca)

    def files(
        self, name: str = "127.0.0.1", *, foreign: bool = False, expired: bool = False
    ) -> dict[str, str]:
        """A certificate and its key as files, for the settings of a client or a server."""
        until = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) if expired else None
        before = datetime.datetime(2019, 1, 1, tzinfo=datetime.UTC) if expired else None
        made = (self.foreign if foreign else self.mine).issue_cert(
            name, not_after=until, not_before=before
        )
        stem = self.folder / uuid.uuid4().hex
        made.cert_chain_pems[0].write_to_path(f"{stem}.pem")
        made.private_key_pem.write_to_path(f"{stem}.key")
        return {"redis_cert_file": f"{stem}.pem", "redis_key_file": f"{stem}.key"}

    def server(self, *, ask: bool = False, **more: object) -> ssl.SSLContext:
        """The TLS context of a terminator. ask: require a client certificate of this CA."""
        files = self.files(**more)  # type: ignore[arg-type]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files["redis_cert_file"], files["redis_key_file"])
        if ask:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


Behind = Callable[..., contextlib.AbstractContextManager[int]]


@pytest.fixture(params=["terminator", "server"])
def behind_tls(
    request: pytest.FixtureRequest,
    asking: Server,
    authority: Authority,
    tmp_path: Path,
    namespace: str,
) -> Behind:
    """Opens a TLS port in front of a server with the documented users."""
    program = tls_program() if request.param == "server" else None
    if request.param == "server" and program is None:
        pytest.skip("no server with TLS on the PATH")

    @contextlib.contextmanager
    def opened_port(*, ask: bool = False, **more: object) -> Iterator[int]:
        if request.param == "terminator":
            with tls_terminator(asking.port, authority.server(ask=ask, **more)) as port:
                yield port
            return
        files = authority.files(**more)  # type: ignore[arg-type]
        server = Server(
            tmp_path / uuid.uuid4().hex,
            endpoints_port(tmp_path),
            {
                "tls-cert-file": files["redis_cert_file"],
                "tls-key-file": files["redis_key_file"],
                "tls-ca-cert-file": authority.ca,
                "tls-auth-clients": "yes" if ask else "no",
                "requirepass": ADMIN,
                "unixsocket": str(tmp_path / "s"),
            },
            program,
        )
        server.as_tls()
        try:
            server.start()
            wait_for("the socket", (tmp_path / "s").exists)
            with redis.Redis(unix_socket_path=str(tmp_path / "s"), password=ADMIN) as client:
                make_users(client, namespace)
            yield server.port
        finally:
            server.kill()

    return opened_port


def endpoints_port(folder: Path) -> int:
    from sandbox.servers import free_ports

    return free_ports.choose_ports(folder, ("tls",))["tls"]


def secured(port: int, namespace: str, **more: object) -> Settings:
    made = Settings(
        namespace=namespace, redis_url=url("ingest", port, scheme="rediss"), redis_timeout_ms=3_000
    )
    return msgspec.structs.replace(made, **more)


def test_tls_works_with_the_ca_that_signed_and_with_no_other(
    behind_tls: Behind, authority: Authority, namespace: str
) -> None:
    with behind_tls() as port:
        with opened(secured(port, namespace, redis_ca_file=authority.ca)) as store:
            ingest_works(store)
            no_secret(repr(store._redis), repr(store._target))
        for ca in ("", authority.foreign_ca):
            message = refusal(secured(port, namespace, redis_ca_file=ca))
            assert "certificate that is not trusted" in message and "redis_ca_file" in message
        wrong = secured(port, namespace, redis_ca_file=authority.ca)
        wrong = msgspec.structs.replace(
            wrong, redis_url=url("ingest", port, WRONG, scheme="rediss")
        )
        assert "refuses the user and the password" in refusal(wrong)


@pytest.mark.parametrize(
    ("more", "said"), [({"name": "other.example"}, "mismatch"), ({"expired": True}, "expired")]
)
def test_a_certificate_of_another_host_or_time_is_refused(
    behind_tls: Behind, authority: Authority, namespace: str, more: dict[str, object], said: str
) -> None:
    with behind_tls(**more) as port:
        message = refusal(secured(port, namespace, redis_ca_file=authority.ca))
        assert "certificate that is not trusted" in message and said in message


def test_a_server_that_asks_for_our_certificate_gets_the_right_one_only(
    behind_tls: Behind, authority: Authority, namespace: str
) -> None:
    with behind_tls(ask=True) as port:
        mine = secured(port, namespace, redis_ca_file=authority.ca)
        with opened(msgspec.structs.replace(mine, **authority.files("ingest"))) as store:
            store.check()
        for bad in ({}, authority.files("ingest", foreign=True)):
            message = refusal(msgspec.structs.replace(mine, **bad))
            assert (
                "asks for another certificate of ours" in message and "redis_cert_file" in message
            )


def test_tls_and_no_tls_do_not_meet_in_silence(
    behind_tls: Behind, authority: Authority, namespace: str, asking: Server
) -> None:
    silent = secured(asking.port, namespace, redis_ca_file=authority.ca, redis_timeout_ms=500)
    with opened(silent) as store:
        # The server takes our hello for the begin of a command, and waits for its end.
        with pytest.raises(StoreUnavailable, match=r"the port may speak no TLS, redis://"):
            store.check()
    with (
        behind_tls() as port,
        opened(Settings(redis_url=url("ingest", port), redis_timeout_ms=1_000)) as plain,
    ):
        with pytest.raises(EddylineError, match="rediss://") as refused:
            plain.check()
        no_secret(refused.value)


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.files("ingest"), authority.files("ingest")
    locked = tmp_path / "locked.key"
    key = load_pem_private_key(Path(good["redis_key_file"]).read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(WRONG.encode())
        )
    )
    text = tmp_path / "text.pem"
    text.write_text("no certificate", encoding="utf-8")
    cases: list[tuple[dict[str, str], str]] = [
        ({"redis_ca_file": str(tmp_path / "none")}, "redis_ca_file = .*none.*No such file"),
        ({"redis_ca_file": str(tmp_path)}, "redis_ca_file = .*cannot be read"),
        ({"redis_ca_file": str(text)}, "redis_ca_file = .*holds no certificate"),
        ({"redis_key_file": good["redis_key_file"]}, "redis_key_file = .*without redis_cert_file"),
        ({"redis_cert_file": good["redis_cert_file"]}, "not a certificate and its own key"),
        (good | {"redis_key_file": other["redis_key_file"]}, "not a certificate and its own key"),
        (good | {"redis_key_file": str(locked)}, "redis_key_file = .*pass phrase"),
    ]
    for files, said in cases:
        settings = secured(1, "n", kafka_bootstrap_servers="localhost:1", **files)
        for call in (redis_client.client, discovery.resolve):
            with pytest.raises(SettingsError, match=said) as raised:
                call(settings)
            no_secret(raised.value)
    with pytest.raises(SettingsError, match=r"redis_ca_file: set, but redis_url = .*rediss://"):
        redis_client.check(Settings(redis_url="redis://127.0.0.1:1", redis_ca_file=authority.ca))


def test_a_cluster_with_users_behind_tls(authority: Authority, tmp_path: Path) -> None:
    """Each node announces the port of its terminator, which has a certificate of its own."""
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(real_cluster(tmp_path, cluster_node_timeout="15000"))
        free_ports = []
        for server in nodes.servers:
            free_ports.append(stack.enter_context(tls_terminator(server.port, authority.server())))
            with server.client() as client:
                make_users(client, "t-cluster")
                client.config_set("cluster-announce-port", free_ports[-1])

        def announced() -> bool:
            """Whether every node announces all ports: a client may ask any node."""
            reported = []
            for server in nodes.servers:
                with server.client() as client:
                    reported.append(
                        {row[2][1] for row in client.execute_command("CLUSTER", "SLOTS")}
                    )
            return all(ports == {*free_ports} for ports in reported)

        wait_for("the nodes to announce their ports", announced)
        settings = secured(
            free_ports[0], "t-cluster", redis_ca_file=authority.ca, redis_cluster=True
        )
        with opened(settings) as store:
            ingest_works(store)
            for slot in range(8):
                store.write_users(
                    f"u{slot}",
                    Source("clicks", slot),
                    store.fences(Source("clicks", slot), [f"u{slot}"])[f"u{slot}"],
                    at(90),
                    UserEffects(),
                )
            assert len(store._redis.map().primaries) == 3  # type: ignore[attr-defined]
        reader = url("worker", free_ports[1], scheme="rediss")
        with opened(msgspec.structs.replace(settings, redis_url=reader)) as store:
            worker_reads(store)
        wrong = url("ingest", free_ports[2], WRONG, scheme="rediss")
        assert "refuses the user" in refusal(msgspec.structs.replace(settings, redis_url=wrong))
        assert "not trusted" in refusal(
            msgspec.structs.replace(settings, redis_ca_file=authority.foreign_ca)
        )
        for server in nodes.servers:
            with server.client() as client:
                assert client.execute_command("ACL LOG") is not None
