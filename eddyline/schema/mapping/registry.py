"""Records with a schema id: five bytes, then Avro, Protobuf or JSON, by a registry's public API.

A schema never changes under its id, so a map stays a function of the record. A registry that is
away makes the partition wait, as Kafka and Redis do; it is asked once for each id.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from typing_extensions import override

from eddyline.errors import EddylineError, Rejected, SettingsError, Unavailable
from eddyline.schema.mapping import avro

HEADER_BYTES = 5
# A larger answer is no schema.
SCHEMA_BYTES_MAX = 4 * 1024 * 1024
_PAUSE_S = 1.0
# Asks for a FileDescriptorProto in base64 instead of the text of a Protobuf schema.
_SERIALIZED = "?format=serialized"
# What a damaged schema raises.
_SCHEMA_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
# References of a schema, and theirs.
REFERENCES_MAX = 100


class RegistryUnavailable(Unavailable):
    """The schema registry does not answer, or refuses us. The partition waits."""


class Access(NamedTuple):
    """How the registry is reached, see the settings `registry_…`."""

    url: str = ""
    user: str = ""
    password: str = ""
    ca_file: str = ""
    timeout_ms: int = 5_000


class _Settings(Protocol):
    """What of the settings says how the registry is reached."""

    @property
    def registry_url(self) -> str:
        """Its address."""

    @property
    def registry_user(self) -> str:
        """The name to log in with."""

    @property
    def registry_password(self) -> str:
        """The password."""

    @property
    def registry_ca_file(self) -> str:
        """Who may sign its certificate."""

    @property
    def registry_timeout_ms(self) -> int:
        """How long a request may take."""


def access(settings: _Settings) -> Access:
    """The access of the settings."""
    return Access(
        settings.registry_url,
        settings.registry_user,
        settings.registry_password,
        settings.registry_ca_file,
        settings.registry_timeout_ms,
    )


def _serialized(text: str) -> bytes:
    """Raises ValueError for a text that is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(
            "the registry answers `?format=serialized` with something else than a descriptor"
        ) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the password elsewhere."""

    @override
    def redirect_request(self, *unused: object) -> None:
        return None


class Registry:
    """Decodes values by the schemas of a registry. Thread rule: any thread."""

    def __init__(self, access: Access, json_decoder: Callable[[bytes], Any]) -> None:
        """json_decoder: of values with a JSON Schema. Raises SettingsError for a bad CA file."""
        self._access = access
        self._json = json_decoder
        self._readers: dict[int, Callable[[bytes], Any]] = {}
        self._away: tuple[float, str] | None = None
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if access.url.startswith("https:"):
            try:
                tls = ssl.create_default_context(cafile=access.ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise SettingsError(f"registry_ca_file = {access.ca_file!r}: {error}") from None
            handlers.append(urllib.request.HTTPSHandler(context=tls))
        self._opener = urllib.request.build_opener(*handlers)

    def decoded(self, value: bytes) -> Any:
        """The value that follows the schema id. Raises Rejected, RegistryUnavailable."""
        if len(value) < HEADER_BYTES or value[0] != 0:
            detail = "the record does not begin with a schema id: a zero byte and four bytes"
            raise Rejected("no_schema_id", "", detail)
        schema_id = int.from_bytes(value[1:HEADER_BYTES], "big")
        reader = self._readers.get(schema_id)
        if reader is None:
            reader = self._readers[schema_id] = self._reader(schema_id)
        return reader(value)

    def _reader(self, schema_id: int) -> Callable[[bytes], Any]:
        found = self._get(f"schemas/ids/{schema_id}")
        if found is None:
            detail = f"the registry at {self._access.url} has no schema {schema_id}"
            raise Rejected("unknown_schema", "", detail)
        kind = found.get("schemaType", "AVRO")
        if kind == "JSON":
            return lambda value: self._json(value[HEADER_BYTES:])
        if kind not in ("AVRO", "PROTOBUF"):
            raise Rejected("unsupported_schema", "", f"schema {schema_id} is of the type {kind}")
        try:
            if kind == "PROTOBUF":
                return self._protobuf(schema_id)
            references: dict[str, str] = {}
            self._add_references(found, references)
            parsed = {name: avro.parsed(text) for name, text in references.items()}
            compiled = avro.compile_schema(avro.parsed(found["schema"]), parsed)
        except _SCHEMA_ERRORS as error:
            raise Rejected("bad_schema", "", f"schema {schema_id}: {error}"[:160]) from None
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"schema {schema_id} is of the type {kind}, but {error.name} is not installed: pip "
                "install 'eddyline[ingest]', or the extra archive or trainer for these processes"
            ) from None
        return lambda value: avro.decode(compiled, value, HEADER_BYTES)

    def _protobuf(self, schema_id: int) -> Callable[[bytes], Any]:
        from eddyline.schema.mapping import protobuf

        found = self._get(f"schemas/ids/{schema_id}{_SERIALIZED}") or {}
        references: dict[str, str] = {}
        self._add_references(found, references, _SERIALIZED)
        files = [_serialized(text) for text in (*references.values(), found["schema"])]
        messages = protobuf.compile_schema(files[-1], files[:-1])
        return lambda value: protobuf.decode(messages, value, HEADER_BYTES)

    def _add_references(self, found: dict[str, Any], into: dict[str, str], form: str = "") -> None:
        """The schemas that this one refers to, those that they refer to first.

        form: the query of the requests
        """
        for one in found.get("references") or ():
            if one["name"] in into:
                continue
            if len(into) >= REFERENCES_MAX:
                raise ValueError(f"more than {REFERENCES_MAX} references")
            subject = urllib.parse.quote(str(one["subject"]), safe="")
            other = self._get(f"subjects/{subject}/versions/{int(one['version'])}{form}")
            if other is None:
                raise ValueError(f"there is no {one['subject']} of version {one['version']}")
            self._add_references(other, into, form)
            into[one["name"]] = other["schema"]

    def _get(self, path: str) -> dict[str, Any] | None:
        """The answer to a GET; None for 404. Raises RegistryUnavailable.

        A registry that is away is not asked again within `_PAUSE_S`: batches of other partitions
        wait behind the request.
        """
        if self._away is not None and time.monotonic() - self._away[0] < _PAUSE_S:
            raise RegistryUnavailable(self._away[1])
        try:
            found = self._request(path)
        except RegistryUnavailable as error:
            self._away = (time.monotonic(), str(error))
            raise
        self._away = None
        return found

    def _request(self, path: str) -> dict[str, Any] | None:
        access = self._access
        where = f"schema registry at {access.url}"
        request = urllib.request.Request(
            f"{access.url.rstrip('/')}/{path}",
            headers={"Accept": "application/vnd.schemaregistry.v1+json, application/json"},
        )
        if access.user:
            login = base64.b64encode(f"{access.user}:{access.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        try:
            with self._opener.open(request, timeout=access.timeout_ms / 1000) as answer:
                text = answer.read(SCHEMA_BYTES_MAX + 1)
            if len(text) > SCHEMA_BYTES_MAX:
                raise RegistryUnavailable(
                    f"{where}: {path} has more than {SCHEMA_BYTES_MAX:,} bytes"
                )
            found = json.loads(text)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise RegistryUnavailable(
                f"{where}: {path}: {error.code} {error.reason}; 401 and 403 are about "
                "registry_user and registry_password"
            ) from None
        except (OSError, ValueError, EddylineError) as error:
            if isinstance(error, EddylineError):
                raise
            raise RegistryUnavailable(f"{where}: {path}: {error}") from None
        if not isinstance(found, dict):
            raise RegistryUnavailable(f"{where}: {path}: the answer is no object")
        return found
