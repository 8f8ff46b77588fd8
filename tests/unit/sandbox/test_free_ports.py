"""Ports are kept; a port in use is replaced."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sandbox.servers import free_ports


def test_a_port_is_kept_and_lies_below_those_of_outgoing_connections(tmp_path: Path) -> None:
    first = free_ports.choose_ports(tmp_path, ("kafka", "redis"))
    assert free_ports.choose_ports(tmp_path, ("kafka", "redis")) == first
    assert len(set(first.values())) == 2
    assert all(1_024 < port < 32_768 for port in first.values())


def test_a_taken_port_is_replaced_and_the_other_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_ports, "RELEASE_S", 0.1)
    first = free_ports.choose_ports(tmp_path, ("kafka", "redis"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", first["kafka"]))
        other.listen()
        second = free_ports.choose_ports(tmp_path, ("kafka", "redis"))
    assert second["kafka"] != first["kafka"] and second["redis"] == first["redis"]
    assert free_ports.choose_ports(tmp_path, ("kafka",)) == {"kafka": second["kafka"]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"kafka": "many"}'])
def test_a_torn_file_of_ports_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ports.json").write_bytes(content)
    chosen = free_ports.choose_ports(tmp_path, ("kafka",))
    assert free_ports.choose_ports(tmp_path, ("kafka",)) == chosen
