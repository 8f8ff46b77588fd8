"""Converts between protobuf messages and the classes of this package; checks request limits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from eddyline.errors import Rejected
from eddyline.schema.answers import LABEL_BYTES_MAX
from eddyline.schema.events import ID_BYTES_MAX, KINDS, LISTS, Item, id_in_form, quote
from eddyline.schema.id_form import in_form
from eddyline.schema.partitioning import partition_of
from eddyline.schema.user_history import Entry
from eddyline.settings.answers import LIMITS_MAX, MOST_MAX
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import UserState
from index.filters import Filter
from index.port import IndexReader, IndexStats
from serving.answer.retriever import Answer, NearestQuery, Query
from serving.answer.user_reader import AfterToken
from serving.proto import retrieval_pb2 as pb
from serving.rpc.filter_messages import BadQuery, check_count, check_text_names, filter_of
from serving.rules import cursor
from serving.rules.cursor import Cursor, CursorRejected
from serving.rules.limits import Limit
from serving.worker.replica import TailState

# gRPC's clients refuse a response above 4 MiB unless they are told otherwise.
ANSWER_BYTES_MAX = 4_000_000
# Fewer items than these always fit without cards: an item with the longest id and generation has
# less than 600 bytes, and 400 more for the paths that returned it, and 800 for its rules.
ITEMS_THAT_FIT = 2_000
# Inner products of unit vectors end at 1; beyond this, popularity alone decides.
BETA_MAX = 10.0
# Items whose middle a search of similar ones begins at.
SIMILAR_TO_MAX = 100
# Items of one explanation.
EXPLAINED_MAX = 20
# As many as a user's list has by default.
SESSION_EVENTS_MAX = 100
_KINDS = {kind: number for number, kind in enumerate(KINDS)}


def query_of(request: pb.RetrieveRequest, settings: Settings) -> Query:
    """The request, checked. Raises BadQuery."""
    user_id = request.user_id
    guest = not user_id and len(request.session) > 0
    if not guest:
        size = len(request.user_id.encode())
        if not 1 <= size <= ID_BYTES_MAX:
            named = f"{quote(request.user_id)} has {size} bytes"
            raise BadQuery(f"user_id: {named}, allowed are 1 … {ID_BYTES_MAX}")
        try:
            user_id = id_in_form("user_id", user_id, settings.id_form)
        except Rejected as error:
            raise BadQuery(f"user_id: {error.detail}") from None
    elif request.HasField("after"):
        raise BadQuery("after: it names a click of a user, and user_id is empty")
    _check_k(request.k, settings)
    after = _after_of(request, user_id, settings) if request.HasField("after") else None
    filters = _filters(request, settings)
    beta = settings.popularity_beta
    if request.HasField("popularity_beta"):
        beta = request.popularity_beta
        if not 0 <= beta <= BETA_MAX:
            raise BadQuery(f"popularity_beta: {beta}, allowed are 0 … {BETA_MAX:g}")
    session = _session_of(request.session, settings) if request.session else ()
    return Query(
        user_id,
        request.k,
        after,
        request.with_cards,
        filters,
        beta,
        session,
        _label_of("scene", request.scene),
        _label_of("arm", request.arm),
        _limits_of(request, settings),
        _diversity_of(request),
        _cursor_of(request, user_id, settings),
    )


def batched_of(request: pb.RetrieveRequest, settings: Settings) -> Query:
    """The request of a batch, checked. Raises BadQuery."""
    if request.after.wait_ms:
        wait_ms = request.after.wait_ms
        raise BadQuery(f"after.wait_ms: {wait_ms}, must be 0: no answer of a batch waits")
    return query_of(request, settings)


def _limits_of(request: pb.RetrieveRequest, settings: Settings) -> Sequence[Limit] | None:
    if not request.limits:
        return None
    if len(request.limits) > LIMITS_MAX:
        raise BadQuery(f"limits: {len(request.limits)} values, allowed are 0 … {LIMITS_MAX}")
    found: dict[str, int] = {}
    for one in request.limits:
        check_count("limits.attribute", [one.attribute], 1, 1)
        name = in_form(one.attribute, settings.id_form)
        if name in found:
            raise BadQuery(f"limits: {quote(name)} is given twice")
        if not 0 <= one.most <= MOST_MAX:
            raise BadQuery(f"limits.most: {one.most}, allowed are 0 … {MOST_MAX}")
        found[name] = one.most
    check_text_names("limits", set(found) - set(LISTS), settings.filter_text_names)
    return [Limit(name, most) for name, most in found.items() if most]


def _diversity_of(request: pb.RetrieveRequest) -> float | None:
    if not request.HasField("diversity"):
        return None
    if not 0 <= request.diversity <= 1:
        raise BadQuery(f"diversity: {request.diversity}, allowed are 0 … 1")
    return request.diversity


def _cursor_of(request: pb.RetrieveRequest, user_id: str, settings: Settings) -> Cursor | None:
    if not request.HasField("cursor"):
        return None
    try:
        return cursor.decode(request.cursor, user_id, settings.cursor_s_max)
    except CursorRejected as error:
        raise BadQuery(f"cursor: {error}") from None


def _label_of(name: str, text: str) -> str:
    size = len(text.encode())
    if size > LABEL_BYTES_MAX:
        raise BadQuery(f"{name}: {quote(text)} has {size} bytes, allowed are 0 … {LABEL_BYTES_MAX}")
    return text


def _session_of(session: Sequence[pb.SessionEvent], settings: Settings) -> list[Entry]:
    if len(session) > SESSION_EVENTS_MAX:
        raise BadQuery(f"session: {len(session)} events, allowed are 0 … {SESSION_EVENTS_MAX}")
    entries = []
    for event in session:
        _check_item_id("session.item_id", event.item_id)
        kind = _KINDS.get(event.kind or "click")
        if kind is None:
            raise BadQuery(
                f"session.kind: {quote(event.kind)}, allowed are {', '.join(_KINDS)} or empty"
            )
        # Times are of stored events; nothing asks for those of a session.
        entries.append(Entry(in_form(event.item_id, settings.id_form), 0, kind))
    return entries


def _item_ids_of(item_ids: Sequence[str], most: int, settings: Settings) -> list[str]:
    """The ids, checked and in their form. Raises BadQuery."""
    if not 1 <= len(item_ids) <= most:
        raise BadQuery(f"item_ids: {len(item_ids)} ids, allowed are 1 … {most}")
    known = dict[str, None]()
    for item_id in item_ids:
        _check_item_id("item_ids", item_id)
        own = in_form(item_id, settings.id_form)
        if own in known:
            raise BadQuery(f"item_ids: {quote(item_id)} is given twice")
        known[own] = None
    return [*known]


def _check_item_id(field: str, item_id: str) -> None:
    size = len(item_id.encode())
    if not 1 <= size <= ID_BYTES_MAX:
        named = f"{quote(item_id)} has {size} bytes"
        raise BadQuery(f"{field}: {named}, allowed are 1 … {ID_BYTES_MAX}")


def similar_of(request: pb.SimilarItemsRequest, settings: Settings) -> NearestQuery:
    """The request, checked. Raises BadQuery."""
    item_ids = _item_ids_of(request.item_ids, SIMILAR_TO_MAX, settings)
    _check_k(request.k, settings)
    return NearestQuery(
        request.k,
        item_ids=item_ids,
        with_cards=request.with_cards,
        filters=_filters(request, settings),
    )


def explained_of(request: pb.ExplainRequest, settings: Settings) -> tuple[Query, list[str]]:
    """The request and the items to explain, checked. Raises BadQuery."""
    item_ids = _item_ids_of(request.item_ids, EXPLAINED_MAX, settings)
    if request.impression_id:
        check_count("impression_id", [request.impression_id], 1, 1)
    return query_of(request.request, settings), item_ids


def vector_of(request: pb.SearchByVectorRequest, settings: Settings) -> NearestQuery:
    """The request, checked but for what its generation decides. Raises BadQuery."""
    if not request.generation:
        raise BadQuery("generation: it is empty; name the one whose space the vector is of")
    vector = np.array(request.vector, np.float32)
    if not np.isfinite(vector).all():
        raise BadQuery("vector: it holds NaN or infinity")
    if not vector.any():
        raise BadQuery(f"vector: {len(vector)} numbers, and all are 0")
    _check_k(request.k, settings)
    return NearestQuery(
        request.k,
        vector=vector,
        generation=request.generation,
        with_cards=request.with_cards,
        filters=_filters(request, settings),
    )


def _filters(
    request: pb.RetrieveRequest | pb.SimilarItemsRequest | pb.SearchByVectorRequest,
    settings: Settings,
) -> Filter | None:
    return filter_of(request.filters, settings.id_form) if request.HasField("filters") else None


def _check_k(k: int, settings: Settings) -> None:
    if not 1 <= k <= settings.k_max:
        raise BadQuery(f"k: {k}, allowed are 1 … {settings.k_max}")


def _after_of(request: pb.RetrieveRequest, user_id: str, settings: Settings) -> AfterToken:
    """The token, checked. user_id: of the request, in its form"""
    after = request.after
    own = partition_of(user_id, settings.clicks_partitions)
    if after.partition != own:
        user = quote(request.user_id)
        why = f"after.partition: {after.partition}, but clicks of {user} lie in {own}"
        if user_id != request.user_id:
            why += ": send them under the id in Unicode NFC without outer blanks to wait for them"
        raise BadQuery(why)
    if after.offset < 0:
        raise BadQuery(f"after.offset: {after.offset}, must be at least 0")
    if not 0 <= after.wait_ms <= settings.wait_ms_max:
        raise BadQuery(f"after.wait_ms: {after.wait_ms}, allowed are 0 … {settings.wait_ms_max}")
    return AfterToken(after.partition, after.offset, after.wait_ms)


def response_of(
    answer: Answer, generation: str, index: IndexReader, behind: str
) -> pb.RetrieveResponse:
    """The answer's message; behind: why the index may lag behind Kafka, "" if it does not.

    The last cards are left out if the message would exceed `ANSWER_BYTES_MAX` with them. Raises
    BadQuery if it does without any.
    """
    now_us = time.time_ns() // 1000
    response = pb.RetrieveResponse(
        freshness=freshness_of(answer, generation, index),
        paths=[
            pb.PathSummary(
                path=one.path,
                candidates=len(one.candidates.hits),
                taken=one.taken,
                why=one.candidates.why,
                marginal=one.marginal,
                took_us=one.took_us,
            )
            for one in answer.paths
        ],
        missing=[*answer.missing, f"kafka: {behind}"] if behind else answer.missing,
        short_because=answer.short_because,
        next_cursor=answer.next_cursor,
        generation_changed=answer.generation_changed,
        rules_version=answer.rules_version,
        filled=answer.filled,
        arm=answer.arm,
    )
    for rank, (hit, path, path_rank, sources, fused_score, rules) in enumerate(answer.items, 1):
        item = response.items.add(
            item_id=hit.item_id,
            score=hit.score,
            rank=rank,
            path=path,
            path_rank=path_rank,
            generation=generation,
            age_ms=max(0, now_us - hit.written_us) // 1000,
            fused_score=fused_score,
        )
        for name, its_rank, its_score, share in sources:
            item.paths.add(path=name, rank=its_rank, score=its_score, share=share)
        for kind, of_rule in rules:
            item.rules.add(kind=kind, name=of_rule)
    if len(response.items) > ITEMS_THAT_FIT and response.ByteSize() > ANSWER_BYTES_MAX:
        raise BadQuery(
            f"k: {len(response.items):,} items take {response.ByteSize():,} bytes, an answer has "
            f"at most {ANSWER_BYTES_MAX:,}: ask for fewer"
        )
    left_out = _add_cards(response, answer.cards) if answer.cards else 0
    if left_out:
        response.missing.append(
            f"worker: {left_out} cards are left out, or the answer would exceed "
            f"{ANSWER_BYTES_MAX:,} bytes"
        )
    return response


def _add_cards(response: pb.RetrieveResponse, cards: Mapping[str, Item]) -> int:
    """Add cards, best item first, while there is room. Returns how many found none."""
    # Room for the sentence about those that are left out.
    room, left_out = ANSWER_BYTES_MAX - 200 - response.ByteSize(), 0
    for item in response.items:
        card = cards.get(item.item_id)
        if card is None:
            continue
        made = pb.Card(title=card.title, categories=card.categories)
        # Its tag and length, and the growing lengths around it.
        room -= made.ByteSize() + 12
        if room < 0:
            left_out += 1
        else:
            item.card.CopyFrom(made)
    return left_out


def freshness_of(answer: Answer, generation: str, index: IndexReader) -> pb.Freshness:
    """How fresh an answer is. index: that it was made from"""
    stamps = answer.stamps
    freshness = pb.Freshness(
        generation=generation,
        user=None if answer.user is None else _user_of(answer.user, answer.user_partition),
        index=watermarks_of(index),
        worker=pb.WorkerStamps(
            received_us=stamps.received_us,
            user_read_us=stamps.user_read_us,
            embedded_us=stamps.embedded_us,
            searched_us=stamps.searched_us,
            answered_us=stamps.answered_us,
        ),
    )
    if answer.after is not None:
        status = answer.after
        freshness.after.CopyFrom(
            pb.AfterStatus(applied=status.applied, waited_ms=status.waited_ms, why=status.why)
        )
    return freshness


def _user_of(user: UserState, partition: int) -> pb.UserWatermark:
    history = user.history
    return pb.UserWatermark(
        known=history.offset >= 0,
        partition=partition,
        offset=history.offset,
        at_ms=history.at_ms,
        produced_us=history.produced_us,
        appended_ms=history.appended_ms,
        read_us=history.read_us,
        applied_us=user.applied_us,
        fence_offset=-1 if user.fence is None else user.fence.offset,
    )


def watermarks_of(index: IndexReader) -> list[pb.IndexWatermark]:
    """The index's watermarks, by partition."""
    return [
        pb.IndexWatermark(partition=p, offset=w.offset, at_ms=w.at_ms, written_us=w.written_us)
        for p, w in sorted(index.watermarks().items())
    ]


def sizes_of(stats: IndexStats, dimension: int) -> pb.IndexSizes:
    """The sizes and counters of the index."""
    return pb.IndexSizes(
        live=stats.live,
        tombstones=stats.tombstones,
        main=stats.main,
        fresh=stats.fresh,
        stale=stats.stale,
        rows=stats.rows,
        applied=stats.applied,
        ignored=stats.ignored,
        rejected=stats.rejected,
        rebuilding=stats.rebuilding,
        rebuilds=stats.rebuilds,
        rebuilds_failed=stats.rebuilds_failed,
        rebuild_s=stats.rebuild_s,
        rebuild_error=stats.rebuild_error,
        dimension=dimension,
        refused=stats.refused,
        main_name=stats.main_name,
        main_bytes=stats.main_bytes,
        breadth=stats.breadth,
        recall=None if stats.recall is None else pb.RecallStatus(**stats.recall._asdict()),
    )


def tail_of(state: TailState) -> pb.TailStatus:
    """The progress of the tail."""
    return pb.TailStatus(
        caught_up=state.caught_up,
        lag_records=state.lag_records,
        records=state.records,
        undecodable=state.undecodable,
        rejected=state.rejected,
        away_since_ms=state.away_since_ms,
    )
