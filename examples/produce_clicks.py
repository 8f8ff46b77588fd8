"""Emit clicks from any Python service: `python examples/produce_clicks.py USER ITEM [ITEM …]`."""

import json
import os
import sys
import time
import uuid

from kafka import KafkaProducer

topic = os.environ.get("CLICKS_TOPIC", "clicks")
producer = KafkaProducer(
    bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"], acks="all", enable_idempotence=True
)
user, *items = sys.argv[1:]
for item in items:
    click = {
        "event_id": uuid.uuid4().hex,
        "user_id": user,
        "item_id": item,
        "at_ms": time.time_ns() // 10**6,
    }
    sent = producer.send(topic, json.dumps(click).encode(), key=user.encode())  # keyed by the user
    at = sent.get(timeout=10)
    print(f"{item}: {at.topic}/{at.partition}/{at.offset}")
producer.close(timeout=10)
