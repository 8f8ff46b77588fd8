"""Settings of logs and metrics."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from eddyline.settings.field import about


class ObservabilitySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Logs, and where metrics are served; each process has a port of its own."""

    metrics_host: Annotated[str, about("Address that metrics are served at.", min_length=1)] = (
        "127.0.0.1"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], about("The least severe log line written.")
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"], about("Log lines for people or for machines.")
    ] = "console"
