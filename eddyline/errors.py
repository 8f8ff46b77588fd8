"""Every error that Eddyline raises on purpose.

EddylineError
├── SettingsError       a setting is unknown or bad; names the key, the value and its source
├── Rejected            a record is invalid; it goes to dead-letters with its reason
├── VectorRejected      a vector is of the wrong length, not finite or not of unit norm
├── BundleError         a generation's bundle is missing, incomplete or of another shape
├── LogReplaced         a topic is another one than at the start; a restart reads the new one
├── GenerationEnded     a generation is used longer than it lasts; a restart loads the active one
├── LogMismatch         Kafka is not the log that the fences in Redis were written for
├── Unavailable         a server does not answer; the caller waits with back-off and tries again
│   ├── StoreUnavailable
│   ├── KafkaUnavailable
│   ├── ArchiveUnavailable  the archive's files cannot be read or written (`eddyline.archive`)
│   └── NoGeneration    nothing has been trained yet (`eddyline.generations`)
├── KafkaRefused        Kafka answers, but refuses the login, the protocol or the operation
├── StoreRefused        Redis answers, but must not be used as it is set up
├── BatchUnreadable     a batch in Kafka cannot be decoded (`eddyline.kafka.unreadable`)
├── FenceMoved          a fenced write was refused: the fence is not the one that was read
├── LocalServerError    a local Kafka or Valkey cannot be installed or started
├── DatasetUnavailable  the demo's data cannot be fetched (`sandbox.datasets.dataset`)
├── ScenarioFailed      an answer of the demo did not change as expected (`cli.demo.scenario`)
├── PartitionLost       another process writes for this partition now (`streams.ports`)
└── CallFailed          a query worker did not answer; has gRPC's code (`serving.rpc.client`)
"""

from __future__ import annotations


class EddylineError(Exception):
    """The root of all errors that Eddyline raises on purpose."""


class SettingsError(EddylineError):
    """A setting is unknown or has a bad value. The message names key, value and source."""


class Rejected(EddylineError):
    """A record is rejected; records are never repaired.

    reason: a short stable code ("malformed_json", "bad_field", "far_future", …)
    field:  the field at fault, "" for the whole record
    detail: one sentence with the offending value, shortened
    """

    def __init__(self, reason: str, field: str, detail: str) -> None:
        """Keep the three parts; `str()` is `reason: field: detail`."""
        super().__init__(f"{reason}: {field or 'record'}: {detail}")
        self.reason = reason
        self.field = field
        self.detail = detail


class VectorRejected(EddylineError):
    """A vector has the wrong length, is not finite or is far from unit norm."""


class BundleError(EddylineError):
    """A generation's bundle is missing, incomplete, or does not fit its manifest."""


class GenerationEnded(EddylineError):
    """A process uses a generation that has ended. A restart loads the active one."""


class LogReplaced(EddylineError):
    """A topic was deleted and made anew under a running process. A restart reads the new one."""


class LogMismatch(EddylineError):
    """Kafka is not the log that the fences were written for. Never skipped silently."""


class Unavailable(EddylineError):
    """A server does not answer. Wait with back-off and try again."""


class StoreUnavailable(Unavailable):
    """Redis does not answer, or is still loading."""


class SlotUnavailable(StoreUnavailable):
    """One hash slot of a cluster cannot be used now: it is being moved, or has no node."""


class KafkaUnavailable(Unavailable):
    """Kafka does not answer."""


class KafkaRefused(EddylineError):
    """Kafka refuses us: wrong credentials, other TLS, a missing right. Waiting does not help.

    The message names the settings to look at, never a password.
    """


class StoreRefused(EddylineError):
    """Redis answers but must not be used: it may evict keys, or holds another layout."""


class FenceMoved(EddylineError):
    """A fenced write was refused as a whole: the fence is not the one that was read."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        """key: the fence's key; expected, found: its value as written, "" for absent."""
        super().__init__(f"fence {key} is {found or 'absent'}, expected {expected or 'absent'}")
        self.key = key
        self.expected = expected
        self.found = found


class LocalServerError(EddylineError):
    """A local server cannot be installed or started. The message has the step and a remedy."""
