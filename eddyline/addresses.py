"""Hosts and `host:port` as text; an IPv6 address is in brackets where a port follows."""

from __future__ import annotations

from ipaddress import IPv6Address

_PORT_MAX = 65_535


def bare_host(text: str) -> str:
    """A host without brackets: a name, an IPv4 address, or an IPv6 one with or without a scope.

    Raises ValueError, which says what the host must be.

    >>> bare_host("[fe80::1%eth0]"), bare_host("::"), bare_host("worker-1")
    ('fe80::1%eth0', '::', 'worker-1')
    """
    bracketed = text.startswith("[") and text.endswith("]")
    host = text[1:-1] if bracketed else text
    if bracketed or ":" in host:
        try:
            IPv6Address(host)
        except ValueError:
            expected = "must be a host alone, without a port: a name or an IP address"
            raise ValueError(f"{expected}, as ::1") from None
    elif not host or any(c in host for c in "[]/,") or host.split() != [host]:
        raise ValueError("must be a host: a name or an IP address, as 127.0.0.1 or ::1")
    return host


def joined(host: str, port: int) -> str:
    """`host:port`; the host may be in brackets already.

    >>> joined("::1", 5), joined("[::1]", 5), joined("here", 5)
    ('[::1]:5', '[::1]:5', 'here:5')
    """
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split(address: str, default_port: int = 0) -> tuple[str, int]:
    """(host without brackets, port). Raises ValueError if it is not `host:port`.

    default_port: of an address without one; 0: it must have one

    >>> split("[::1]:50051"), split("::1", 9092), split("kafka:9092")
    (('::1', 50051), ('::1', 9092), ('kafka', 9092))
    """
    host, colon, port = address.rpartition(":")
    # Two colons without brackets are an IPv6 address, and no port.
    if not colon or address.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = address, str(default_port)
    try:
        number = int(port) if port.isascii() and port.isdigit() else 0
        if 1 <= number <= _PORT_MAX:
            return bare_host(host), number
    except ValueError:
        pass
    raise ValueError(f"{address!r} is not host:port, an IPv6 address as [::1]:port")
