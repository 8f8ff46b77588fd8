from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class After(_message.Message):
    __slots__ = ("partition", "offset", "wait_ms")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    partition: int
    offset: int
    wait_ms: int
    def __init__(self, partition: _Optional[int] = ..., offset: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("user_id", "k", "after", "with_cards", "filters", "popularity_beta", "scene", "arm", "session", "limits", "diversity", "cursor")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WITH_CARDS_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    POPULARITY_BETA_FIELD_NUMBER: _ClassVar[int]
    SCENE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    k: int
    after: After
    with_cards: bool
    filters: Filters
    popularity_beta: float
    scene: str
    arm: str
    session: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    limits: _containers.RepeatedCompositeFieldContainer[AttributeLimit]
    diversity: float
    cursor: str
    def __init__(self, user_id: _Optional[str] = ..., k: _Optional[int] = ..., after: _Optional[_Union[After, _Mapping]] = ..., with_cards: bool = ..., filters: _Optional[_Union[Filters, _Mapping]] = ..., popularity_beta: _Optional[float] = ..., scene: _Optional[str] = ..., arm: _Optional[str] = ..., session: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ..., limits: _Optional[_Iterable[_Union[AttributeLimit, _Mapping]]] = ..., diversity: _Optional[float] = ..., cursor: _Optional[str] = ...) -> None: ...

class AttributeLimit(_message.Message):
    __slots__ = ("attribute", "most")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    most: int
    def __init__(self, attribute: _Optional[str] = ..., most: _Optional[int] = ...) -> None: ...

class RetrieveBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class RetrieveBatchResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[BatchedAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[BatchedAnswer, _Mapping]]] = ...) -> None: ...

class BatchedAnswer(_message.Message):
    __slots__ = ("response", "code", "detail")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    response: RetrieveResponse
    code: int
    detail: str
    def __init__(self, response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., code: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("item_id", "kind")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    kind: str
    def __init__(self, item_id: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class SimilarItemsRequest(_message.Message):
    __slots__ = ("item_ids", "k", "filters", "with_cards")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    WITH_CARDS_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    k: int
    filters: Filters
    with_cards: bool
    def __init__(self, item_ids: _Optional[_Iterable[str]] = ..., k: _Optional[int] = ..., filters: _Optional[_Union[Filters, _Mapping]] = ..., with_cards: bool = ...) -> None: ...

class SearchByVectorRequest(_message.Message):
    __slots__ = ("vector", "generation", "k", "filters", "with_cards")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    WITH_CARDS_FIELD_NUMBER: _ClassVar[int]
    vector: _containers.RepeatedScalarFieldContainer[float]
    generation: str
    k: int
    filters: Filters
    with_cards: bool
    def __init__(self, vector: _Optional[_Iterable[float]] = ..., generation: _Optional[str] = ..., k: _Optional[int] = ..., filters: _Optional[_Union[Filters, _Mapping]] = ..., with_cards: bool = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request", "item_ids", "impression_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    IMPRESSION_ID_FIELD_NUMBER: _ClassVar[int]
    request: RetrieveRequest
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    impression_id: str
    def __init__(self, request: _Optional[_Union[RetrieveRequest, _Mapping]] = ..., item_ids: _Optional[_Iterable[str]] = ..., impression_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("items", "freshness", "missing", "shards")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ExplainedItem]
    freshness: Freshness
    missing: _containers.RepeatedScalarFieldContainer[str]
    shards: Shards
    def __init__(self, items: _Optional[_Iterable[_Union[ExplainedItem, _Mapping]]] = ..., freshness: _Optional[_Union[Freshness, _Mapping]] = ..., missing: _Optional[_Iterable[str]] = ..., shards: _Optional[_Union[Shards, _Mapping]] = ...) -> None: ...

class ExplainedItem(_message.Message):
    __slots__ = ("item_id", "in_answer", "rank", "why", "live", "age_ms", "paths", "fused_score", "rules")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    IN_ANSWER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    FUSED_SCORE_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    in_answer: bool
    rank: int
    why: str
    live: bool
    age_ms: int
    paths: _containers.RepeatedCompositeFieldContainer[ExplainedPath]
    fused_score: float
    rules: _containers.RepeatedCompositeFieldContainer[ItemRule]
    def __init__(self, item_id: _Optional[str] = ..., in_answer: bool = ..., rank: _Optional[int] = ..., why: _Optional[str] = ..., live: bool = ..., age_ms: _Optional[int] = ..., paths: _Optional[_Iterable[_Union[ExplainedPath, _Mapping]]] = ..., fused_score: _Optional[float] = ..., rules: _Optional[_Iterable[_Union[ItemRule, _Mapping]]] = ...) -> None: ...

class ExplainedPath(_message.Message):
    __slots__ = ("path", "rank", "returned", "score", "why", "share")
    PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    path: str
    rank: int
    returned: bool
    score: float
    why: str
    share: float
    def __init__(self, path: _Optional[str] = ..., rank: _Optional[int] = ..., returned: bool = ..., score: _Optional[float] = ..., why: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class Filters(_message.Message):
    __slots__ = ("categories", "tags", "tags_all", "ranges", "allow", "deny", "texts", "categories_none", "tags_none", "texts_none")
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TAGS_ALL_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    DENY_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_NONE_FIELD_NUMBER: _ClassVar[int]
    TAGS_NONE_FIELD_NUMBER: _ClassVar[int]
    TEXTS_NONE_FIELD_NUMBER: _ClassVar[int]
    categories: _containers.RepeatedScalarFieldContainer[str]
    tags: _containers.RepeatedScalarFieldContainer[str]
    tags_all: _containers.RepeatedScalarFieldContainer[str]
    ranges: _containers.RepeatedCompositeFieldContainer[Range]
    allow: _containers.RepeatedScalarFieldContainer[str]
    deny: _containers.RepeatedScalarFieldContainer[str]
    texts: _containers.RepeatedCompositeFieldContainer[Texts]
    categories_none: _containers.RepeatedScalarFieldContainer[str]
    tags_none: _containers.RepeatedScalarFieldContainer[str]
    texts_none: _containers.RepeatedCompositeFieldContainer[Texts]
    def __init__(self, categories: _Optional[_Iterable[str]] = ..., tags: _Optional[_Iterable[str]] = ..., tags_all: _Optional[_Iterable[str]] = ..., ranges: _Optional[_Iterable[_Union[Range, _Mapping]]] = ..., allow: _Optional[_Iterable[str]] = ..., deny: _Optional[_Iterable[str]] = ..., texts: _Optional[_Iterable[_Union[Texts, _Mapping]]] = ..., categories_none: _Optional[_Iterable[str]] = ..., tags_none: _Optional[_Iterable[str]] = ..., texts_none: _Optional[_Iterable[_Union[Texts, _Mapping]]] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("attribute", "values")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, attribute: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("attribute", "min", "max")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    min: float
    max: float
    def __init__(self, attribute: _Optional[str] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("items", "freshness", "paths", "missing", "short_because", "shards", "impression_id", "next_cursor", "generation_changed", "rules_version", "filled", "arm")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SHORT_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    IMPRESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    GENERATION_CHANGED_FIELD_NUMBER: _ClassVar[int]
    RULES_VERSION_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[RetrievedItem]
    freshness: Freshness
    paths: _containers.RepeatedCompositeFieldContainer[PathSummary]
    missing: _containers.RepeatedScalarFieldContainer[str]
    short_because: str
    shards: Shards
    impression_id: str
    next_cursor: str
    generation_changed: bool
    rules_version: str
    filled: _containers.RepeatedScalarFieldContainer[str]
    arm: str
    def __init__(self, items: _Optional[_Iterable[_Union[RetrievedItem, _Mapping]]] = ..., freshness: _Optional[_Union[Freshness, _Mapping]] = ..., paths: _Optional[_Iterable[_Union[PathSummary, _Mapping]]] = ..., missing: _Optional[_Iterable[str]] = ..., short_because: _Optional[str] = ..., shards: _Optional[_Union[Shards, _Mapping]] = ..., impression_id: _Optional[str] = ..., next_cursor: _Optional[str] = ..., generation_changed: bool = ..., rules_version: _Optional[str] = ..., filled: _Optional[_Iterable[str]] = ..., arm: _Optional[str] = ...) -> None: ...

class Shards(_message.Message):
    __slots__ = ("count", "asked", "answered", "missing")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    count: int
    asked: int
    answered: int
    missing: _containers.RepeatedCompositeFieldContainer[MissingShard]
    def __init__(self, count: _Optional[int] = ..., asked: _Optional[int] = ..., answered: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[MissingShard, _Mapping]]] = ...) -> None: ...

class MissingShard(_message.Message):
    __slots__ = ("shard", "address", "reason", "detail")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    shard: int
    address: str
    reason: str
    detail: str
    def __init__(self, shard: _Optional[int] = ..., address: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class RetrievedItem(_message.Message):
    __slots__ = ("item_id", "score", "rank", "path", "path_rank", "generation", "age_ms", "card", "paths", "fused_score", "rules")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PATH_RANK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    FUSED_SCORE_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    score: float
    rank: int
    path: str
    path_rank: int
    generation: str
    age_ms: int
    card: Card
    paths: _containers.RepeatedCompositeFieldContainer[ItemPath]
    fused_score: float
    rules: _containers.RepeatedCompositeFieldContainer[ItemRule]
    def __init__(self, item_id: _Optional[str] = ..., score: _Optional[float] = ..., rank: _Optional[int] = ..., path: _Optional[str] = ..., path_rank: _Optional[int] = ..., generation: _Optional[str] = ..., age_ms: _Optional[int] = ..., card: _Optional[_Union[Card, _Mapping]] = ..., paths: _Optional[_Iterable[_Union[ItemPath, _Mapping]]] = ..., fused_score: _Optional[float] = ..., rules: _Optional[_Iterable[_Union[ItemRule, _Mapping]]] = ...) -> None: ...

class ItemRule(_message.Message):
    __slots__ = ("kind", "name")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ItemPath(_message.Message):
    __slots__ = ("path", "rank", "score", "share")
    PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    path: str
    rank: int
    score: float
    share: float
    def __init__(self, path: _Optional[str] = ..., rank: _Optional[int] = ..., score: _Optional[float] = ..., share: _Optional[float] = ...) -> None: ...

class Card(_message.Message):
    __slots__ = ("title", "categories")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    title: str
    categories: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, title: _Optional[str] = ..., categories: _Optional[_Iterable[str]] = ...) -> None: ...

class PathSummary(_message.Message):
    __slots__ = ("path", "candidates", "taken", "why", "marginal", "took_us")
    PATH_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    MARGINAL_FIELD_NUMBER: _ClassVar[int]
    TOOK_US_FIELD_NUMBER: _ClassVar[int]
    path: str
    candidates: int
    taken: int
    why: str
    marginal: int
    took_us: int
    def __init__(self, path: _Optional[str] = ..., candidates: _Optional[int] = ..., taken: _Optional[int] = ..., why: _Optional[str] = ..., marginal: _Optional[int] = ..., took_us: _Optional[int] = ...) -> None: ...

class Freshness(_message.Message):
    __slots__ = ("generation", "user", "index", "worker", "after")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    generation: str
    user: UserWatermark
    index: _containers.RepeatedCompositeFieldContainer[IndexWatermark]
    worker: WorkerStamps
    after: AfterStatus
    def __init__(self, generation: _Optional[str] = ..., user: _Optional[_Union[UserWatermark, _Mapping]] = ..., index: _Optional[_Iterable[_Union[IndexWatermark, _Mapping]]] = ..., worker: _Optional[_Union[WorkerStamps, _Mapping]] = ..., after: _Optional[_Union[AfterStatus, _Mapping]] = ...) -> None: ...

class UserWatermark(_message.Message):
    __slots__ = ("known", "partition", "offset", "at_ms", "produced_us", "appended_ms", "read_us", "applied_us", "fence_offset")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    PRODUCED_US_FIELD_NUMBER: _ClassVar[int]
    APPENDED_MS_FIELD_NUMBER: _ClassVar[int]
    READ_US_FIELD_NUMBER: _ClassVar[int]
    APPLIED_US_FIELD_NUMBER: _ClassVar[int]
    FENCE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    known: bool
    partition: int
    offset: int
    at_ms: int
    produced_us: int
    appended_ms: int
    read_us: int
    applied_us: int
    fence_offset: int
    def __init__(self, known: bool = ..., partition: _Optional[int] = ..., offset: _Optional[int] = ..., at_ms: _Optional[int] = ..., produced_us: _Optional[int] = ..., appended_ms: _Optional[int] = ..., read_us: _Optional[int] = ..., applied_us: _Optional[int] = ..., fence_offset: _Optional[int] = ...) -> None: ...

class IndexWatermark(_message.Message):
    __slots__ = ("partition", "offset", "at_ms", "written_us")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_US_FIELD_NUMBER: _ClassVar[int]
    partition: int
    offset: int
    at_ms: int
    written_us: int
    def __init__(self, partition: _Optional[int] = ..., offset: _Optional[int] = ..., at_ms: _Optional[int] = ..., written_us: _Optional[int] = ...) -> None: ...

class WorkerStamps(_message.Message):
    __slots__ = ("received_us", "user_read_us", "embedded_us", "searched_us", "answered_us")
    RECEIVED_US_FIELD_NUMBER: _ClassVar[int]
    USER_READ_US_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_US_FIELD_NUMBER: _ClassVar[int]
    SEARCHED_US_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_US_FIELD_NUMBER: _ClassVar[int]
    received_us: int
    user_read_us: int
    embedded_us: int
    searched_us: int
    answered_us: int
    def __init__(self, received_us: _Optional[int] = ..., user_read_us: _Optional[int] = ..., embedded_us: _Optional[int] = ..., searched_us: _Optional[int] = ..., answered_us: _Optional[int] = ...) -> None: ...

class AfterStatus(_message.Message):
    __slots__ = ("applied", "waited_ms", "why")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    waited_ms: int
    why: str
    def __init__(self, applied: bool = ..., waited_ms: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("generation", "ready", "started_ms", "queries", "queries_failed", "index", "watermarks", "tail", "popular", "missing", "shard", "shards", "held", "rules_version", "rule_items")
    class RuleItemsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FAILED_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WATERMARKS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    POPULAR_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    RULES_VERSION_FIELD_NUMBER: _ClassVar[int]
    RULE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    generation: str
    ready: bool
    started_ms: int
    queries: int
    queries_failed: int
    index: IndexSizes
    watermarks: _containers.RepeatedCompositeFieldContainer[IndexWatermark]
    tail: TailStatus
    popular: PopularStatus
    missing: _containers.RepeatedScalarFieldContainer[str]
    shard: int
    shards: int
    held: _containers.RepeatedCompositeFieldContainer[ShardStatus]
    rules_version: str
    rule_items: _containers.ScalarMap[str, int]
    def __init__(self, generation: _Optional[str] = ..., ready: bool = ..., started_ms: _Optional[int] = ..., queries: _Optional[int] = ..., queries_failed: _Optional[int] = ..., index: _Optional[_Union[IndexSizes, _Mapping]] = ..., watermarks: _Optional[_Iterable[_Union[IndexWatermark, _Mapping]]] = ..., tail: _Optional[_Union[TailStatus, _Mapping]] = ..., popular: _Optional[_Union[PopularStatus, _Mapping]] = ..., missing: _Optional[_Iterable[str]] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ..., held: _Optional[_Iterable[_Union[ShardStatus, _Mapping]]] = ..., rules_version: _Optional[str] = ..., rule_items: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("shard", "address", "answers", "reason", "detail", "generation", "live", "lag_records", "misses")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    LAG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    shard: int
    address: str
    answers: bool
    reason: str
    detail: str
    generation: str
    live: int
    lag_records: int
    misses: int
    def __init__(self, shard: _Optional[int] = ..., address: _Optional[str] = ..., answers: bool = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., generation: _Optional[str] = ..., live: _Optional[int] = ..., lag_records: _Optional[int] = ..., misses: _Optional[int] = ...) -> None: ...

class IndexSizes(_message.Message):
    __slots__ = ("live", "tombstones", "main", "fresh", "stale", "rows", "applied", "ignored", "rejected", "rebuilding", "rebuilds", "rebuilds_failed", "rebuild_s", "rebuild_error", "dimension", "refused", "main_name", "main_bytes", "breadth", "recall")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    TOMBSTONES_FIELD_NUMBER: _ClassVar[int]
    MAIN_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    IGNORED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    REBUILDING_FIELD_NUMBER: _ClassVar[int]
    REBUILDS_FIELD_NUMBER: _ClassVar[int]
    REBUILDS_FAILED_FIELD_NUMBER: _ClassVar[int]
    REBUILD_S_FIELD_NUMBER: _ClassVar[int]
    REBUILD_ERROR_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    MAIN_NAME_FIELD_NUMBER: _ClassVar[int]
    MAIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    BREADTH_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    live: int
    tombstones: int
    main: int
    fresh: int
    stale: int
    rows: int
    applied: int
    ignored: int
    rejected: int
    rebuilding: bool
    rebuilds: int
    rebuilds_failed: int
    rebuild_s: float
    rebuild_error: str
    dimension: int
    refused: int
    main_name: str
    main_bytes: int
    breadth: int
    recall: RecallStatus
    def __init__(self, live: _Optional[int] = ..., tombstones: _Optional[int] = ..., main: _Optional[int] = ..., fresh: _Optional[int] = ..., stale: _Optional[int] = ..., rows: _Optional[int] = ..., applied: _Optional[int] = ..., ignored: _Optional[int] = ..., rejected: _Optional[int] = ..., rebuilding: bool = ..., rebuilds: _Optional[int] = ..., rebuilds_failed: _Optional[int] = ..., rebuild_s: _Optional[float] = ..., rebuild_error: _Optional[str] = ..., dimension: _Optional[int] = ..., refused: _Optional[int] = ..., main_name: _Optional[str] = ..., main_bytes: _Optional[int] = ..., breadth: _Optional[int] = ..., recall: _Optional[_Union[RecallStatus, _Mapping]] = ...) -> None: ...

class RecallStatus(_message.Message):
    __slots__ = ("step", "samples", "estimate", "low", "high", "shadowed", "skipped", "raised", "lowered")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    SHADOWED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    RAISED_FIELD_NUMBER: _ClassVar[int]
    LOWERED_FIELD_NUMBER: _ClassVar[int]
    step: str
    samples: int
    estimate: float
    low: float
    high: float
    shadowed: int
    skipped: int
    raised: int
    lowered: int
    def __init__(self, step: _Optional[str] = ..., samples: _Optional[int] = ..., estimate: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., shadowed: _Optional[int] = ..., skipped: _Optional[int] = ..., raised: _Optional[int] = ..., lowered: _Optional[int] = ...) -> None: ...

class TailStatus(_message.Message):
    __slots__ = ("caught_up", "lag_records", "records", "undecodable", "rejected", "away_since_ms")
    CAUGHT_UP_FIELD_NUMBER: _ClassVar[int]
    LAG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    UNDECODABLE_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    AWAY_SINCE_MS_FIELD_NUMBER: _ClassVar[int]
    caught_up: bool
    lag_records: int
    records: int
    undecodable: int
    rejected: int
    away_since_ms: int
    def __init__(self, caught_up: bool = ..., lag_records: _Optional[int] = ..., records: _Optional[int] = ..., undecodable: _Optional[int] = ..., rejected: _Optional[int] = ..., away_since_ms: _Optional[int] = ...) -> None: ...

class PopularStatus(_message.Message):
    __slots__ = ("items", "age_ms")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    items: int
    age_ms: int
    def __init__(self, items: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...
