"""The generation that most files evaluate."""

from __future__ import annotations

import pytest

from embeddings.bundle.bundle import Bundle
from tests.unit.evaluation.small import make_bundle, make_items


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"), make_items())
