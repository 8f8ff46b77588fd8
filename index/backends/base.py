"""The port of a main index: it is trained and built once from the vectors of a moment, then only searched.

Freshness, deletes and exact scores are the live index's (`index.live`): a main only has to name candidates,
by label, in any order. So an index that can only be built, as AnnoyBackend's, is live as well, and one with rounded
scores, as product quantization, answers with exact ones.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from index.arrays import Ints, Vector
from index.port import AnnIndex


class AnnBackend(Protocol):
    """How one kind of main index is built. Thread rule: any thread; `build` runs on the rebuild thread.

    name:     as in the setting `index_main`
    settings: what it is built and searched with
    """

    @property
    def name(self) -> str:
        """As in the setting `index_main`."""

    @property
    def settings(self) -> Mapping[str, int]:
        """What it is built and searched with."""

    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """Train and fill one.

        labels:  int64 (n,), n >= 1, unique; vectors: float32 (n, d), unit norm, in the same order
        Returns None where `stop` was set meanwhile. Where n is too small to train what is set, less is
        trained. The `AnnIndex` keeps one rule more than `search` says: a larger `breadth` is a wider search and
        finds more, be it called ef, nprobe or search_k.
        """
