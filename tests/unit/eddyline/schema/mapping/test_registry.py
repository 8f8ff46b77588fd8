"""Records with a schema id, by a registry that answers as the public API says."""

from __future__ import annotations

import base64
import json
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import trustme
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected, SettingsError, Unavailable
from eddyline.kafka.topics import CLICKS
from eddyline.schema import validation
from eddyline.schema.mapping import avro, envelopes, registry, values
from eddyline.schema.mapping.registry import Access, Registry, RegistryUnavailable
from eddyline.settings.loader import Settings, load
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from streams.clicks.handler import ClickHandler
from streams.fences import PartitionFences
from tests.applying import batch_of

GOLDEN = Path(__file__).parents[4] / "golden" / "feeds" / "avro.jsonl"
LOG = LogId("cluster-a", "topic-1")
MS = 1_772_355_600_123


def golden() -> dict[str, dict[str, Any]]:
    """Values as fastavro writes them."""
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    return {one["name"]: one for one in map(json.loads, lines)}


class Double:
    """A registry. schemas: id -> answer; subjects: (name, version) -> answer; seen: paths

    serialized: id or (name, version) -> the FileDescriptorProto of a Protobuf schema
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[tuple[str, int], dict[str, Any]] = {}
        self.serialized: dict[Any, bytes] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.status = 200
        self.body: bytes | None = None
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                double.seen.append((self.path, self.headers.get("Authorization")))
                found = double.answer(self.path.strip("/").split("/"))
                status = double.status if found or double.status != 200 else 404
                body = double.body or json.dumps(found or {"error_code": 40403}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/schemas/ids/1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *unused: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, parts: list[str]) -> dict[str, Any] | None:
        parts[-1], _, query = parts[-1].partition("?")
        found = self.text(parts)
        number = int(parts[2]) if parts[0] == "schemas" else (parts[1], int(parts[3]))
        if found is not None and query == "format=serialized" and number in self.serialized:
            found = found | {"schema": base64.b64encode(self.serialized[number]).decode()}
        return found

    def text(self, parts: list[str]) -> dict[str, Any] | None:
        if parts[:2] == ["schemas", "ids"]:
            return self.schemas.get(int(parts[2]))
        if parts[0] == "subjects":
            return self.subjects.get((parts[1], int(parts[3])))
        return None

    def add(self, number: int, schema: Any, **more: Any) -> None:
        self.schemas[number] = {"schema": json.dumps(schema)} | more

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def double() -> Iterator[Double]:
    made = Double()
    yield made
    made.close()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PAUSE_S", 0.0)


def client(double: Double, **more: Any) -> Registry:
    return Registry(Access(**{"url": double.url} | more), envelopes.decoded)


def framed(number: int, payload: bytes) -> bytes:
    return b"\0" + number.to_bytes(4, "big") + payload


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Rejected) as found:
        call()
    return found.value.reason


@pytest.mark.parametrize("name", list(golden()))
def test_avro_is_read_as_its_writer_meant_it(name: str) -> None:
    one = golden()[name]
    data = bytes.fromhex(one["hex"])
    reader = avro.compile_schema(one["schema"])
    assert avro.decode(reader, data) == one["value"]
    assert avro.decode(reader, b"head" + data, 4) == one["value"]
    for cut in range(len(data)):
        assert refusal(lambda: avro.decode(reader, data[:cut])) == "malformed_avro"
    assert refusal(lambda: avro.decode(reader, data + b"\0")) == "malformed_avro"


@given(st.binary(max_size=60), st.sampled_from(sorted(golden())))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_value_or_a_reason(data: bytes, name: str) -> None:
    reader = avro.compile_schema(golden()[name]["schema"])
    try:
        avro.decode(reader, data)
    except Rejected as rejected:
        assert rejected.reason == "malformed_avro"


def zigzag(number: int) -> bytes:
    number, found = number << 1, b""
    while number >= 0x80:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


@pytest.mark.parametrize("count", [avro.ELEMENTS_MAX - 1, avro.ELEMENTS_MAX, avro.ELEMENTS_MAX + 1])
def test_elements_that_take_no_bytes_are_limited(count: int) -> None:
    reader = avro.compile_schema({"type": "array", "items": "null"})
    data = zigzag(count) + b"\0"
    if count > avro.ELEMENTS_MAX:
        assert refusal(lambda: avro.decode(reader, data)) == "malformed_avro"
    else:
        assert len(avro.decode(reader, data)) == count


@pytest.mark.parametrize(
    "schema", [5, "other", {"type": "record", "name": "R"}, {"type": "enum", "name": "E"}, None]
)
def test_what_is_no_schema_is_refused(double: Double, schema: Any) -> None:
    double.add(1, schema)
    assert refusal(lambda: client(double).decoded(framed(1, b""))) == "bad_schema"


@pytest.mark.parametrize("depth", [avro.DEPTH_MAX - 1, avro.DEPTH_MAX, avro.DEPTH_MAX + 1])
def test_the_nesting_of_a_schema_is_limited(depth: int) -> None:
    schema: Any = "int"
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    if depth > avro.DEPTH_MAX:
        with pytest.raises(ValueError, match="at most 64 levels"):
            avro.compile_schema(schema)
    else:
        avro.compile_schema(schema)


def test_a_schema_is_asked_for_once_and_records_of_two_schemas_are_read(double: Double) -> None:
    old = {"type": "record", "name": "V", "fields": [{"name": "a", "type": "string"}]}
    new = old | {"fields": [*old["fields"], {"name": "b", "type": "int"}]}  # type: ignore[misc]
    double.add(7, old)
    double.add(8, new)
    read = client(double).decoded
    for _ in range(2):
        assert read(framed(7, b"\x02x")) == {"a": "x"}
        assert read(framed(8, b"\x02y\x04")) == {"a": "y", "b": 2}
    assert [path for path, _ in double.seen] == ["/schemas/ids/7", "/schemas/ids/8"]


def test_references_json_schemas_and_other_types(double: Double) -> None:
    double.subjects["shop%2Fprice", 3] = {
        "schema": json.dumps(
            {
                "type": "record",
                "name": "Price",
                "namespace": "s",
                "fields": [{"name": "cents", "type": "int"}],
            }
        )
    }
    schema = {"type": "record", "name": "V", "fields": [{"name": "p", "type": "s.Price"}]}
    double.add(1, schema, references=[{"name": "s.Price", "subject": "shop/price", "version": 3}])
    double.add(2, {"type": "object"}, schemaType="JSON")
    double.schemas[3] = {"schema": "x", "schemaType": "XML"}
    read = client(double).decoded
    assert read(framed(1, b"\x04")) == {"p": {"cents": 2}}
    assert read(framed(2, b'{"a":1}')) == {"a": 1}
    assert refusal(lambda: read(framed(2, b"{"))) == "malformed_json"
    assert refusal(lambda: read(framed(3, b""))) == "unsupported_schema"
    assert refusal(lambda: read(framed(4, b""))) == "unknown_schema"
    for value in (b"", b"\0\0\0\0", b"{}", b"\x01\0\0\0\x01"):
        assert refusal(lambda value=value: read(value)) == "no_schema_id"  # type: ignore[misc]


def shop_schema(double: Double) -> bytes:
    """Message 1 of the schema 1 is a click; its price is in a file of its own. Returns a record."""
    types = descriptor_pb2.FieldDescriptorProto
    price = descriptor_pb2.FileDescriptorProto(name="p.proto", package="s", syntax="proto3")
    message = price.message_type.add(name="Price")
    message.field.add(name="cents", number=1, type=types.TYPE_INT32, label=1)
    file = descriptor_pb2.FileDescriptorProto(name="c.proto", syntax="proto3")
    file.dependency.append("p.proto")
    file.message_type.add(name="Other")
    click = file.message_type.add(name="Click")
    for number, name in enumerate(("u", "i"), 1):
        click.field.add(name=name, number=number, type=types.TYPE_STRING, label=1)
    click.field.add(name="price", number=3, type=types.TYPE_MESSAGE, type_name=".s.Price", label=1)
    reference = {"name": "p.proto", "subject": "p", "version": 2}
    double.schemas[1] = {
        "schema": 'syntax = "proto3"; …',
        "schemaType": "PROTOBUF",
        "references": [reference],
    }
    double.subjects["p", 2] = {"schema": 'syntax = "proto3"; …', "schemaType": "PROTOBUF"}
    double.serialized = {1: file.SerializeToString(), ("p", 2): price.SerializeToString()}
    pool = descriptor_pool.DescriptorPool()
    pool.Add(price)
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("Click"))(u="u", i="a")
    made.price.cents = 24990
    return framed(1, b"\x02\x02" + bytes(made.SerializeToString()))


def test_protobuf_is_read_by_the_descriptor_that_the_registry_gives(double: Double) -> None:
    value = shop_schema(double)
    read = client(double).decoded
    for _ in range(2):
        assert read(value) == {"u": "u", "i": "a", "price": {"cents": 24990}}
    assert [path for path, _ in double.seen] == [
        "/schemas/ids/1",
        "/schemas/ids/1?format=serialized",
        "/subjects/p/versions/2?format=serialized",
    ]
    assert refusal(lambda: read(value[:-1])) == "malformed_protobuf"
    assert refusal(lambda: read(framed(1, b""))) == "malformed_protobuf"


def varint(number: int) -> bytes:
    return (
        bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number >= 0x80 else bytes([number])
    )


def protobuf_decimal(double: Double, size: int) -> bytes:
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="d.proto", syntax="proto3")
    field = file.message_type.add(name="Row").field.add(name="d", number=1, label=1)
    field.type, field.type_name = types.TYPE_MESSAGE, ".confluent.type.Decimal"
    double.schemas[1] = {"schema": "…", "schemaType": "PROTOBUF"}
    double.serialized[1] = file.SerializeToString()
    value = b"\x0a" + varint(size) + b"\x7f" * size
    return framed(1, b"\0\x0a" + varint(len(value)) + value)


def avro_decimal(double: Double, size: int) -> bytes:
    decimal = {"type": "bytes", "logicalType": "decimal", "precision": 9_999}
    double.add(1, {"type": "record", "name": "V", "fields": [{"name": "d", "type": decimal}]})
    return framed(1, varint(2 * size) + b"\x7f" * size)


@pytest.mark.parametrize("more", [-1, 0, 1, 2_000])
@pytest.mark.parametrize("write", [avro_decimal, protobuf_decimal])
def test_a_long_decimal_is_refused(
    double: Double, tmp_path: Path, write: Callable[[Double, int], bytes], more: int
) -> None:
    """Python writes no number of 4,300 digits as text, also not into the reason of a refusal."""
    value = write(double, values.DECIMAL_BYTES_MAX + more)
    file = tmp_path / "map.toml"
    file.write_text(
        '[clicks]\nencoding = "registry"\nfields = { user_id = "d", item_id = "d" }\n',
        encoding="utf-8",
    )
    named = Settings(clicks_map=str(file), registry_url=double.url, clicks_partitions=1)
    by_map = validation.map_of(named, "clicks")
    wanted = "malformed" if more > 0 else "bad_field"
    assert refusal(lambda: validation.user_events(named, record(1, value), by_map)).startswith(
        wanted
    )


def test_without_its_library_protobuf_names_the_extra(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = shop_schema(double)
    monkeypatch.delitem(sys.modules, "eddyline.schema.mapping.protobuf", raising=False)
    monkeypatch.delattr("eddyline.schema.mapping.protobuf", raising=False)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(SettingsError, match=r"google.protobuf is not installed.*eddyline\[ingest"):
        client(double).decoded(value)


def test_a_registry_that_serializes_no_protobuf_is_named(double: Double) -> None:
    value = shop_schema(double)
    double.serialized = {}
    with pytest.raises(Rejected, match="something else than a descriptor") as found:
        client(double).decoded(value)
    assert found.value.reason == "bad_schema"
    double.schemas[2] = {"schema": "x", "schemaType": "PROTOBUF"}
    double.serialized[2] = b"\xff"
    assert refusal(lambda: client(double).decoded(framed(2, b"\0"))) == "bad_schema"


def test_the_login_is_sent_and_follows_no_redirect(double: Double, no_pause: None) -> None:
    double.add(1, "string")
    read = client(double, user="key", password="secret:1").decoded
    double.status = 302
    with pytest.raises(RegistryUnavailable, match="302"):
        read(framed(1, b"\x02x"))
    double.status = 200
    assert read(framed(1, b"\x02x")) == "x"
    login = "Basic " + base64.b64encode(b"key:secret:1").decode()
    assert double.seen == [("/schemas/ids/1", login)] * 2


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_registry_that_refuses_or_fails_is_waited_for(
    double: Double, no_pause: None, status: int
) -> None:
    double.add(1, "string")
    double.status = status
    read = client(double, user="u", password="secret").decoded
    with pytest.raises(RegistryUnavailable, match=str(status)) as found:
        read(framed(1, b"\x02x"))
    assert "secret" not in str(found.value)
    double.status = 200
    assert read(framed(1, b"\x02x")) == "x"


@pytest.mark.parametrize("body", [b"nope", b"[]", b"1", b"\xff"])
def test_an_answer_that_is_none_is_waited_for(double: Double, body: bytes) -> None:
    double.add(1, "string")
    double.body = body
    with pytest.raises(RegistryUnavailable):
        client(double).decoded(framed(1, b"\x02x"))


def test_a_registry_that_is_away_is_not_asked_by_every_batch(double: Double) -> None:
    double.status = 500
    read = client(double).decoded
    for _ in range(3):
        with pytest.raises(RegistryUnavailable):
            read(framed(1, b""))
    assert len(double.seen) == 1


def test_tls_trusts_the_authority_of_the_settings_alone(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    files = {}
    for name, one in (("own", authority), ("other", other)):
        files[name] = str(tmp_path / f"{name}.pem")
        one.cert_pem.write_to_path(files[name])
    double = Double(context)
    try:
        double.add(1, "string")
        url = f"https://127.0.0.1:{double.port}"
        assert client(double, url=url, ca_file=files["own"]).decoded(framed(1, b"\x02x")) == "x"
        with pytest.raises(RegistryUnavailable, match="certificate verify failed"):
            client(double, url=url, ca_file=files["other"]).decoded(framed(1, b"\x02x"))
    finally:
        double.close()
    with pytest.raises(SettingsError, match="registry_ca_file = '/nope'"):
        client(double, url=url, ca_file="/nope")


def record(offset: int, value: bytes | None, key: bytes | None = None) -> Any:
    fields = {"topic": "shop", "partition": 0, "timestamp": 1_800_000_000_000, "headers": ()}
    return SimpleNamespace(offset=offset, value=value, key=key, **fields)


def test_debezium_by_avro_is_debezium(double: Double, tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    file.write_text('[items]\npreset = "debezium"\nencoding = "registry"\n', encoding="utf-8")
    found = golden()
    for number, name in enumerate(("debezium-insert", "debezium-key"), 1):
        double.add(number, found[name]["schema"])
    environment = {"EDDYLINE_ITEMS_MAP": str(file), "EDDYLINE_REGISTRY_URL": double.url}
    named = msgspec.structs.replace(load(environment, folder=tmp_path), items_partitions=1)
    key = framed(2, bytes.fromhex(found["debezium-key"]["hex"]))
    insert = framed(1, bytes.fromhex(found["debezium-insert"]["hex"]))
    [(item_id, item, _)] = validation.item_changes(named, record(1, insert, key))
    assert item is not None and (item_id, item.title, item.at_ms) == (
        "10",
        "Chair ü",
        1795907691204,
    )
    assert item.attributes == {"price": 79.5, "seen": 1_772_355_600_123, "day": 1_772_323_200_000}
    delete = framed(1, bytes.fromhex(found["debezium-delete"]["hex"]))
    for value in (delete, None):
        assert validation.item_changes(named, record(2, value, key)) == [("10", None, True)]
    with pytest.raises(SettingsError, match="encoding = 'registry' needs the setting registry_url"):
        load({"EDDYLINE_ITEMS_MAP": str(file)}, folder=tmp_path)


def avro_click(double: Double) -> bytes:
    fields = [{"name": name, "type": "string"} for name in "ui"]
    double.add(1, {"type": "record", "name": "V", "fields": fields})
    return framed(1, b"\x02u\x02a")


@pytest.mark.parametrize("click", [avro_click, shop_schema])
def test_the_partition_waits_for_the_registry_and_loses_nothing(
    double: Double, tmp_path: Path, no_pause: None, click: Callable[[Double], bytes]
) -> None:
    file = tmp_path / "map.toml"
    file.write_text(
        '[clicks]\nencoding = "registry"\nfields = { user_id = "u", item_id = "i" }\n',
        encoding="utf-8",
    )
    value = click(double)
    named = Settings(clicks_map=str(file), registry_url=double.url, clicks_partitions=1)
    store = MemoryStore()
    fences = PartitionFences(named, store, CLICKS, {CLICKS: LOG})
    letters = Mock()
    handler = ClickHandler(named, store, fences, letters, Mock(), [])
    log = [record(5, value)]
    double.status = 503
    fences.open({0: (0, 100)})
    [result] = handler.apply([batch_of(log)])
    assert isinstance(result, Unavailable) and not letters.put.called
    double.status = 200
    handler.open(0)
    assert fences.open({0: (0, 100)}) == {0: 0}
    assert handler.apply_one(batch_of(log)).applied == 1
    assert [e.item_id for e in store.read_user("u0", 0, "u", "").history.entries] == ["a"]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_answers_of_a_registry_are_limited(
    double: Double, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    double.add(1, "string")
    size = len(json.dumps(double.schemas[1]))
    monkeypatch.setattr(registry, "SCHEMA_BYTES_MAX", size - more)
    if more > 0:
        with pytest.raises(RegistryUnavailable, match="has more than"):
            client(double).decoded(framed(1, b"\x02x"))
    else:
        assert client(double).decoded(framed(1, b"\x02x")) == "x"


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_references_of_a_schema_are_limited(
    double: Double, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    monkeypatch.setattr(registry, "REFERENCES_MAX", 3)
    references = [{"name": f"n{n}", "subject": f"s{n}", "version": 1} for n in range(3 + more)]
    for one in references:
        double.subjects[str(one["subject"]), 1] = {"schema": json.dumps("string")}
    double.add(1, "string", references=references)
    if more > 0:
        assert refusal(lambda: client(double).decoded(framed(1, b"\x02x"))) == "bad_schema"
    else:
        assert client(double).decoded(framed(1, b"\x02x")) == "x"
