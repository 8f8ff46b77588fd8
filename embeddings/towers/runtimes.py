"""Which runtime reads which kind of model.

A new kind is a file and a line here (run time), and a file and a line in
`embeddings.models.registry` (training).
"""

from __future__ import annotations

from collections.abc import Mapping

from eddyline.errors import BundleError
from embeddings.towers.base import ModelRuntime
from embeddings.towers.two_tower import TwoTowerRuntime

_ALL: tuple[ModelRuntime, ...] = (TwoTowerRuntime(),)
RUNTIMES: Mapping[str, ModelRuntime] = {runtime.kind: runtime for runtime in _ALL}


def runtime(kind: str, version: int) -> ModelRuntime:
    """The runtime of a kind of model.

    Raises BundleError if this release does not know the kind or the version of its arrays.
    """
    found = RUNTIMES.get(kind)
    if found is None:
        raise BundleError(
            f"model kind {kind!r} is unknown, this release reads {', '.join(sorted(RUNTIMES))}; "
            "upgrade Eddyline or activate a generation of a known kind"
        )
    if not 1 <= version <= found.version:
        raise BundleError(
            f"model {kind} has version {version}, this release reads 1 to {found.version}; "
            "upgrade Eddyline or train a new generation"
        )
    return found
