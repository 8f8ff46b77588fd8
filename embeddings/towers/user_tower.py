"""The user tower's forward pass in numpy: a history and a profile become a unit vector.

The tower is one causal attention layer. Only its newest position is computed (the query is the
newest item):

    s_h  = X · (x₀ · query_h + query_bias_h) + bias_h    scores per head and item, X newest first
    c    = Σ_h softmax(s_h) · X · value_h
    z    = √d·x₀ + c + Σ weight · profile[row]
    f    = unit(z + relu(z · w1 + b1) · w2 + b2)

The tokens X are output vectors of the item tower. Keys and values therefore depend on the item
alone, and a new item works at once. `query_h` is W_q·W_kᵀ and `value_h` is W_v·W_o of the trained
layer, multiplied at export: for one query this is cheaper than the keys and values of 20 items. An
empty history is replaced by one learned token, `start`. `bias` is the relative-position bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from embeddings.towers.base import UserEncoder
from embeddings.towers.features import FeatureSpace
from embeddings.towers.numerics import NORM_MIN, Floats, blocks, row_products, unit

# Added to the score of an empty position: its exp() is 0 in float32.
_ABSENT = np.float32(-1e9)


class UserTower(UserEncoder):
    """Maps histories and profiles to vectors. Thread rule: any thread; immutable.

    arrays: float32 `query` (d, heads·d), `query_bias` (heads·d,), `bias` (heads, history_max),
            `value` (heads·d, d), `start` (d,), `profile` (space.rows, d),
            `w1` (d, h), `b1` (h,), `w2` (h, d), `b2` (d,)
    """

    ARRAYS = ("query", "query_bias", "bias", "value", "start", "profile", "w1", "b1", "w2", "b2")

    def __init__(self, space: FeatureSpace, arrays: Mapping[str, Floats]):
        self.space = space
        self.arrays = {name: arrays[name] for name in self.ARRAYS}
        self.heads, self.history_max = (int(n) for n in arrays["bias"].shape)
        self.dimension = int(arrays["start"].shape[0])
        self._scale = np.float32(np.sqrt(self.dimension))
        self._start = np.ascontiguousarray(arrays["start"]).reshape(1, -1)
        # (history_max + 1, heads, history_max), by history length: bias, plus the mask of empty
        # positions. An empty history has the token `start` at position 0.
        seen = np.maximum(np.arange(self.history_max + 1), 1)[:, None] > np.arange(self.history_max)
        self._bias_of = arrays["bias"] + np.where(seen, np.float32(0.0), _ABSENT)[:, None, :]

    @override
    def encode(
        self,
        table: Floats,
        histories: Sequence[Sequence[int]],
        profiles: Sequence[Mapping[str, object]],
    ) -> Floats:
        n, length = len(histories), self.history_max
        out = np.empty((n, self.dimension), np.float32)
        flat: list[int] = []
        nothing = [0] * length
        for history in histories:
            flat += history[:length]
            flat += nothing[len(history) :]
        rows = np.array(flat, np.int64).reshape(n, length)
        sizes = np.array([min(len(history), length) for history in histories], np.int64)
        for start, stop in blocks(n):
            # An empty position holds the table's first row: its weight is exactly 0.
            tokens = table.take(rows[start:stop], axis=0)
            tokens[sizes[start:stop] == 0, 0] = self._start
            extra = np.zeros((stop - start, self.dimension), np.float32)
            for at, profile in enumerate(profiles[start:stop]):
                if profile:
                    self._add_profile(extra[at], profile)
            out[start:stop] = self._block(tokens, self._bias_of[sizes[start:stop]], extra)
        return out

    @override
    def encode_one(self, history: Floats, profile: Mapping[str, object]) -> Floats:
        a = self.arrays
        tokens = history[: self.history_max] if len(history) else self._start
        newest = tokens[0]
        queries = (newest.dot(a["query"]) + a["query_bias"]).reshape(self.heads, self.dimension)
        scores = queries.dot(tokens.T) + a["bias"][:, : len(tokens)]
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= np.add.reduce(weights, axis=1, keepdims=True)
        z = newest * self._scale + weights.dot(tokens).reshape(-1).dot(a["value"])
        if profile:
            self._add_profile(z, profile)
        hidden = z.dot(a["w1"]) + a["b1"]
        z += np.maximum(hidden, 0.0, out=hidden).dot(a["w2"]) + a["b2"]
        norm = np.sqrt(z.dot(z))
        result: Floats = unit(z[None, :])[0] if norm < NORM_MIN else z / norm
        return result

    @override
    def combine(self, forward: Floats, embedding: Floats | None) -> Floats:
        return query_vector(forward, embedding)

    def _block(self, tokens: Floats, bias: Floats, extra: Floats) -> Floats:
        """f of one block of histories, float32 (n, d).

        tokens: float32 (n, history_max, d)
        bias:   float32 (n, heads, history_max)
        extra:  float32 (n, d)
        """
        a, n = self.arrays, len(tokens)
        newest = tokens[:, 0]
        query = row_products(newest, a["query"]) + a["query_bias"]
        weights = np.matmul(query.reshape(n, self.heads, self.dimension), tokens.transpose(0, 2, 1))
        weights += bias
        weights -= weights.max(axis=2, keepdims=True)
        np.exp(weights, out=weights)
        weights /= np.add.reduce(weights, axis=2, keepdims=True)
        attended = np.matmul(weights, tokens).reshape(n, self.heads * self.dimension)
        z = newest * self._scale + extra + row_products(attended, a["value"])
        hidden = row_products(z, a["w1"]) + a["b1"]
        return unit(z + row_products(np.maximum(hidden, 0.0, out=hidden), a["w2"]) + a["b2"])

    def _add_profile(self, z: Floats, profile: Mapping[str, object]) -> None:
        rows, _ = self.space.of_profile(profile)  # all weights of a profile are 1
        for row in rows:
            z += self.arrays["profile"][row]


def query_vector(forward: Floats, embedding: Floats | None) -> Floats:
    """unit(f + e): the vector that items are scored against by inner product.

    forward, embedding: float32 (d,) or (n, d); an embedding of None means zeros

    >>> query_vector(np.array([1, 0], np.float32), np.array([0, 1], np.float32)).round(3).tolist()
    [0.7070000171661377, 0.7070000171661377]
    """
    if embedding is None:
        return forward
    total = forward + embedding
    return unit(total) if total.ndim == 2 else unit(total[None, :])[0]
