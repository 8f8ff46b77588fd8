"""Who the Faust agents are at Kafka: the same settings as for every other client, in Faust's form."""

from __future__ import annotations

from typing import Any

import faust

from eddyline import kafka_security
from eddyline.settings import Settings


def broker_credentials(settings: Settings) -> Any:
    """Faust's setting `broker_credentials`, None for a Kafka that asks for nothing. Raises SettingsError."""
    context = kafka_security.tls_context(settings)
    if kafka_security.uses_sasl(settings):
        return faust.SASLCredentials(
            username=settings.kafka_sasl_username,
            password=settings.kafka_sasl_password,
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return context
