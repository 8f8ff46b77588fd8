"""The data sets by name: a catalogue of items, users and their history.

A data set is either real ("movielens") or made from a seed ("generated"). Both are a `Dataset`, so
that nothing after `load` depends on which one it is.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.datasets import movielens, synthetic
from sandbox.datasets.dataset import Dataset, OnProgress

NAMES = ("movielens", "generated")


def load(name: str, data_dir: Path, on_progress: OnProgress) -> Dataset:
    """The data set of this name: "movielens", or "generated" with its default seed and size.

    data_dir: downloaded files are kept in its folder `data/`; the generated data set needs none
    Raises DatasetUnavailable if it cannot be downloaded, ValueError for another name.
    """
    if name == "movielens":
        return movielens.load(data_dir, on_progress)
    if name == "generated":
        return synthetic.generate(on_progress=on_progress)
    raise ValueError(f"there is no data set {name!r}; expected one of {', '.join(NAMES)}")
