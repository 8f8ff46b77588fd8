"""Settings of logs and metrics."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class ObservabilitySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Logs, and where metrics are served; each process has a port of its own."""

    metrics_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address that metrics are served at."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe log line written."""
    log_format: Literal["console", "json"] = "console"
    """Log lines for people or for machines."""
