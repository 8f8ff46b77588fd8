"""Names of the array types that the index passes around."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


Kept = npt.NDArray[np.bool_] | None


Wide = npt.NDArray[np.float64]


Vector = npt.NDArray[np.float32]
