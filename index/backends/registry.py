"""The main index that the setting `index_main` names; its library is imported here and no earlier."""

from __future__ import annotations

from typing import get_args

from eddyline.errors import SettingsError
from eddyline.settings.index import MainName
from index.backends.base import AnnBackend

NAMES: tuple[str, ...] = get_args(MainName)


def make_backend(
    name: str, *, m: int = 16, ef_construction: int = 200, ef: int = 200
) -> AnnBackend:
    """How the main index of this name is built.

    m, ef_construction: of the graphs; ef: how many candidates a search asks for, of all of them
    Raises SettingsError where its library is not installed, naming the extra, and for any other name.
    """
    try:
        if name == "hnswlib":
            from index.backends.hnswlib import HnswBackend

            return HnswBackend(m=m, ef_construction=ef_construction, ef=ef)
        if name == "annoy":
            from index.backends.annoy import AnnoyBackend

            return AnnoyBackend()
        if name in NAMES:
            from index.backends import faiss as faiss_

            if name == "faiss-hnsw":
                return faiss_.FaissHnsw(m=m, ef_construction=ef_construction, ef=ef)
            if name == "faiss-ivf":
                return faiss_.FaissIvf(breadth=ef)
            return faiss_.FaissIvfPq(breadth=ef) if name == "faiss-ivfpq" else faiss_.FaissFlat()
    except ModuleNotFoundError as error:
        extra = "worker" if name == "hnswlib" else name.partition("-")[0]
        if error.name not in ("hnswlib", "annoy", "faiss"):
            raise
        raise SettingsError(
            f"index_main is {name!r}, but {error.name} is not installed: pip install 'eddyline[{extra}]'"
        ) from None
    raise SettingsError(f"index_main is {name!r}; there are {', '.join(NAMES)}")
