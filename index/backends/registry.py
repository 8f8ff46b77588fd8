"""The ANN backends by name; a library is imported when its backend is made."""

from __future__ import annotations

from typing import get_args

from eddyline.errors import SettingsError
from eddyline.settings.index import BackendName
from index.backends.base import AnnBackend

NAMES: tuple[str, ...] = get_args(BackendName)


def make_backend(
    name: str, *, m: int = 16, ef_construction: int = 200, ef: int = 200
) -> AnnBackend:
    """The backend of this name.

    m, ef_construction: of the graph kinds; ef: candidates that a search requests, of all kinds
    Raises SettingsError for an unknown name, and, naming the extra, if the library is missing.
    """
    try:
        if name == "hnswlib":
            from index.backends.hnswlib import HnswBackend

            return HnswBackend(m=m, ef_construction=ef_construction, ef=ef)
        if name == "annoy":
            from index.backends.annoy import AnnoyBackend

            return AnnoyBackend()
        if name in NAMES:
            from index.backends import faiss

            if name == "faiss-hnsw":
                return faiss.FaissHnsw(m=m, ef_construction=ef_construction, ef=ef)
            if name == "faiss-ivf":
                return faiss.FaissIvf(breadth=ef)
            return faiss.FaissIvfPq(breadth=ef) if name == "faiss-ivfpq" else faiss.FaissFlat()
    except ModuleNotFoundError as error:
        if error.name not in ("hnswlib", "annoy", "faiss"):
            raise
        extra = "worker" if name == "hnswlib" else error.name
        raise SettingsError(
            f"index_main is {name!r}, but {error.name} is not installed: "
            f"pip install 'eddyline[{extra}]'"
        ) from None
    raise SettingsError(f"index_main is {name!r}; there are {', '.join(NAMES)}")
