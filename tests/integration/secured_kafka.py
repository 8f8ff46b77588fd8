"""A real Kafka that asks who one is: one listener each for TLS, mTLS, SASL and SASL over TLS, and
rights.

    PLAINTEXT  no credentials; for the broker itself and for set-up
    TLS        anybody who trusts the broker's certificate
    MTLS       the owner of a certificate of our authority; its common name is the user
    LOGIN      PLAIN and SCRAM-SHA-512, unencrypted
    LOGINTLS   SCRAM-SHA-512 over TLS

Who is nobody (PLAINTEXT, TLS) may do everything; named users may do what `allow` gives them, and no
more.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trustme
from cryptography.hazmat.primitives import serialization
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)

from eddyline.settings.loader import Settings
from sandbox.servers import free_ports, kafka_broker, kafka_jars
from sandbox.servers.supervisor import Child, Supervisor

LISTENERS = {
    "PLAINTEXT": "PLAINTEXT",
    "TLS": "SSL",
    "MTLS": "SSL",
    "LOGIN": "SASL_PLAINTEXT",
    "LOGINTLS": "SASL_SSL",
}
# Nothing else may hold these words, so that a search for them in logs finds what should not be
# there.
PASSWORDS = {
    "ingest": "Zwiebelfisch-7",
    "worker": "Hochzeit-2",
    "archive": "Spiess-4",
    "judge": "Fisch-8",
    "operator": "Jungfrau-6",
    "stranger": "Hurenkind-9",
}
PLAIN_PASSWORDS = {"operator": "Schusterjunge-3"}
WRONG_PASSWORD = "Fliegenkopf-5"
KEY_PASSWORD = "Leiche-11"
SECRETS = (*PASSWORDS.values(), *PLAIN_PASSWORDS.values(), WRONG_PASSWORD, KEY_PASSWORD)


@dataclass
class SecuredKafka:
    """The running broker, its addresses by listener, and the files of certificates."""

    folder: Path
    ports: Mapping[str, int]
    authority: trustme.CA = field(default_factory=trustme.CA)
    foreign: trustme.CA = field(default_factory=trustme.CA)

    def address(self, listener: str, host: str = "127.0.0.1") -> str:
        return f"{host}:{self.ports[listener]}"

    def ca(self, *, foreign: bool = False) -> str:
        path = self.folder / ("foreign-ca.pem" if foreign else "ca.pem")
        (self.foreign if foreign else self.authority).cert_pem.write_to_path(path)
        return str(path)

    def client(self, name: str, *, foreign: bool = False, password: str = "") -> dict[str, str]:
        """The settings of a client's certificate; a password encrypts its key."""
        issuer = self.foreign if foreign else self.authority
        issued = issuer.issue_cert(f"{name}@example.org", common_name=name)
        stem = self.folder / f"{name}{'-foreign' * foreign}{'-locked' * bool(password)}"
        cert, key = stem.with_suffix(".cert.pem"), stem.with_suffix(".key.pem")
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        key.write_bytes(_pkcs8(issued, password))
        made = {"kafka_cert_file": str(cert), "kafka_key_file": str(key)}
        return made | ({"kafka_key_password": password} if password else {})

    def settings(self, settings: Settings, listener: str, **more: str) -> Settings:
        """The settings on this listener."""
        values = {"kafka_security_protocol": LISTENERS[listener], **more}
        if "SSL" in LISTENERS[listener] and "kafka_ca_file" not in values:
            values["kafka_ca_file"] = self.ca()
        return msgspec.structs.replace(
            settings, kafka_bootstrap_servers=self.address(listener), **values
        )

    def scram(self, user: str = "operator", password: str = "") -> dict[str, str]:
        return {
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": user,
            "kafka_sasl_password": password or PASSWORDS[user],
        }

    def allow(self, user: str, *rights: tuple[str, str, str]) -> None:
        """Give rights: (TOPIC, GROUP or TRANSACTIONAL_ID; a name, or its beginning and `*`; an
        operation).
        """
        admin = KafkaAdminClient(bootstrap_servers=self.address("PLAINTEXT"))
        try:
            for kind, name, operation in rights:
                pattern = (
                    ACLResourcePatternType.PREFIXED
                    if name.endswith("*")
                    else ACLResourcePatternType.LITERAL
                )
                resource = ResourcePattern(ResourceType[kind], name.removesuffix("*"), pattern)
                granted = ACL(
                    f"User:{user}", "*", ACLOperation[operation], ACLPermissionType.ALLOW, resource
                )
                done: Any = admin.create_acls([granted])
                assert not done["failed"], done
        finally:
            admin.close()


@contextlib.contextmanager
def secured_kafka(folder: Path) -> Iterator[SecuredKafka]:
    """Run the broker for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name.lower() for name in LISTENERS]
    chosen = free_ports.choose_ports(folder / "run", (*names, "controller"))
    broker = SecuredKafka(folder, {name: chosen[name.lower()] for name in LISTENERS})
    properties = folder / "server.properties"
    properties.write_text(_properties(broker, chosen["controller"]), encoding="utf-8")
    program, _ = kafka_broker.java()
    classpath = ":".join(map(str, kafka_jars.fetch()))
    command = [str(program), *kafka_broker.JVM_FLAGS, *kafka_broker.LOG_FLAGS, "-cp", classpath]
    users = [
        f"SCRAM-SHA-512=[name={name},password={password}]" for name, password in PASSWORDS.items()
    ]
    subprocess.run(
        [
            *command,
            "kafka.tools.StorageTool",
            "format",
            "-t",
            kafka_broker.new_cluster_id(),
            "-c",
            str(properties),
            *(part for user in users for part in ("--add-scram", user)),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=kafka_broker.FORMAT_TIMEOUT_S,
    )
    with Supervisor(folder / "logs") as supervisor:
        argv = [*command, "kafka.Kafka", str(properties)]
        port = broker.ports["PLAINTEXT"]
        supervisor.start(
            Child(
                name="kafka",
                argv=argv,
                ready=lambda: kafka_broker.answers(port),
                cwd=folder,
                ready_timeout_s=60,
            )
        )
        yield broker


def _properties(broker: SecuredKafka, controller: int) -> str:
    """The local Kafka's own configuration; of two lines with one key the last counts."""
    server = broker.authority.issue_cert("127.0.0.1")
    keys, trusted = broker.folder / "server.pem", broker.ca()
    keys.write_bytes(_pkcs8(server) + b"".join(part.bytes() for part in server.cert_chain_pems))
    login = "org.apache.kafka.common.security"
    known = " ".join(f'user_{name}="{password}"' for name, password in PLAIN_PASSWORDS.items())
    plain = f"{login}.plain.PlainLoginModule required {known};"
    scram = f"{login}.scram.ScramLoginModule required;"
    more = {
        "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in broker.ports.items())
        + f",CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": ",".join(
            f"{name}://127.0.0.1:{port}" for name, port in broker.ports.items()
        ),
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,"
        + ",".join(f"{name}:{protocol}" for name, protocol in LISTENERS.items()),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keys),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": trusted,
        "ssl.principal.mapping.rules": "RULE:^.*CN=([a-z]+).*$/$1/,DEFAULT",
        "listener.name.mtls.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "listener.name.login.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "listener.name.logintls.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.login.plain.sasl.jaas.config": plain,
        "listener.name.login.scram-sha-512.sasl.jaas.config": scram,
        "listener.name.logintls.scram-sha-512.sasl.jaas.config": scram,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    own = kafka_broker.server_properties("log", broker.ports["PLAINTEXT"], controller)
    return own + "".join(f"{key}={value}\n" for key, value in more.items())


def _pkcs8(issued: trustme.LeafCert, password: str = "") -> bytes:
    """The private key in the only PEM form that Kafka reads."""
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    how = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
