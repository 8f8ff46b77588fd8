"""The model reads JSON as the documents say, and so as ingest does."""

from __future__ import annotations

import pytest

from eddyline.errors import Rejected
from eddyline.schema import events
from tests.model import reading
from tests.model.reading import Plausible, Raw, Refused

MS = 1_000_000
CLICK = b'{"user_id": "ana", "item_id": "f", "new": "%s"}'
MERGE = b'{"user_id": "ana", "merge_into": "bo", "weight": ["%s", ""]}'


def ends(value: bytes) -> tuple[str, str]:
    """What ingest and the model make of a record of `clicks`: the reason, or nothing."""
    ours = theirs = ""
    try:
        events.decode_user_event(value, appended_ms=MS, far_future_ms_max=0, id_form="nfc")
    except Rejected as rejected:
        ours = rejected.reason
    try:
        raw = Raw("clicks", 0, 0, MS, b"ana", value)
        reading.user_event(raw, 0, Plausible(0, frozenset()))
    except Refused as refused:
        theirs = refused.args[0]
    return ours, theirs


@pytest.mark.parametrize("record", [CLICK, MERGE])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (rb"\ud800", "malformed_json"),
        (rb"\udC00x", "malformed_json"),
        (rb"\ud83d\u0041", "malformed_json"),
        (rb"\ud83d\ude00", ""),
        (rb"\\ud800", ""),
        (rb"\\\ud800", "malformed_json"),
        (rb"\u00e4\n", ""),
    ],
)
def test_half_a_surrogate_pair_is_no_json_in_a_field_that_nobody_reads(
    record: bytes, text: bytes, reason: str
) -> None:
    assert ends(record % text) == (reason, reason)
