"""Converts explanations to their protobuf message."""

from __future__ import annotations

import time
from collections.abc import Sequence

from index.port import IndexReader
from serving.answer.explain import Explanation
from serving.answer.retriever import Answer
from serving.proto import retrieval_pb2 as pb
from serving.rpc.converters import freshness_of


def explanation_of(
    found: Sequence[Explanation], state: Answer, generation: str, index: IndexReader, behind: str
) -> pb.ExplainResponse:
    """The explanations' message; state, behind: see `Retriever.explain`, `response_of`."""
    now_us = time.time_ns() // 1000
    response = pb.ExplainResponse(
        freshness=freshness_of(state, generation, index),
        missing=[*state.missing, f"kafka: {behind}"] if behind else state.missing,
    )
    for one in found:
        item = response.items.add(
            item_id=one.item_id,
            in_answer=one.in_answer,
            rank=one.rank,
            why=one.why,
            live=one.hit is not None,
            age_ms=max(0, now_us - one.hit.written_us) // 1000 if one.hit else 0,
            fused_score=one.fused_score,
        )
        for kind, name in one.rules:
            item.rules.add(kind=kind, name=name)
        for path, rank, hit, why, share in one.paths:
            item.paths.add(
                path=path,
                rank=rank,
                returned=hit is not None,
                score=hit.score if hit else 0.0,
                why=why,
                share=share,
            )
    return response
