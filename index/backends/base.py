"""The port of an ANN library: an index is built once from given vectors, then only searched.

The live index (`index.live`) adds freshness, deletes and exact scores. A backend only names
candidates by label, in any order. So a library that cannot add to a built index (Annoy) is live
too, and one with rounded scores (product quantization) answers with exact ones.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from index.arrays import Ints, Vector


class AnnIndex(Protocol):
    """An immutable approximate index. Thread rule: any thread may search.

    name: backend name, as in the setting `index_main`; size: number of vectors
    memory_bytes: its memory, its own copy of the vectors included
    """

    name: str
    size: int
    memory_bytes: int

    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """Labels of about the `fetch` (<= size) best vectors; None if it cannot find that many.

        query:   float32 (d,)
        breadth: search at least as widely as for this many candidates (ef, nprobe, search_k);
                 a larger breadth finds more
        """


class AnnBackend(Protocol):
    """Builds indexes of one kind. Thread rule: any thread; the rebuild thread calls `build`.

    name: as in the setting `index_main`; settings: parameters of building and searching
    """

    name: str
    settings: Mapping[str, int]

    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """Train and fill an index; None if `stop` was set meanwhile.

        labels:  int64 (n,), n >= 1, unique; vectors: float32 (n, d), unit norm, same order
        Trains less if n is too small for the settings.
        """
