"""Who the Faust agents are at Kafka: the same settings as for every other client, in Faust's form."""

from __future__ import annotations

from typing import Any

import faust

from eddyline.kafka import security
from eddyline.settings.kafka import uses_sasl
from eddyline.settings.loader import Settings


def broker_credentials(settings: Settings) -> Any:
    """Faust's setting `broker_credentials`, None for a Kafka that asks for nothing. Raises SettingsError."""
    context = security.tls_context(settings)
    if uses_sasl(settings):
        return faust.SASLCredentials(
            username=settings.kafka_sasl_username,
            password=settings.kafka_sasl_password,
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return context
