from serving.proto import retrieval_pb2 as _retrieval_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Target(_message.Message):
    __slots__ = ("generation", "shard", "shards")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    generation: str
    shard: int
    shards: int
    def __init__(self, generation: _Optional[str] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ...) -> None: ...

class VectorsRequest(_message.Message):
    __slots__ = ("target", "item_ids")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    target: Target
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., item_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class VectorsResponse(_message.Message):
    __slots__ = ("found", "vectors", "offsets")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedScalarFieldContainer[int]
    vectors: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, found: _Optional[_Iterable[int]] = ..., vectors: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class TermsRequest(_message.Message):
    __slots__ = ("target", "item_ids", "attributes")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    target: Target
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    attributes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., item_ids: _Optional[_Iterable[str]] = ..., attributes: _Optional[_Iterable[str]] = ...) -> None: ...

class TermsResponse(_message.Message):
    __slots__ = ("items", "attributes", "texts")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[int]
    attributes: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, items: _Optional[_Iterable[int]] = ..., attributes: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class CandidatesRequest(_message.Message):
    __slots__ = ("target", "nearest", "named", "newest", "keyed", "filters", "exclude")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    KEYED_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    target: Target
    nearest: Nearest
    named: Named
    newest: Newest
    keyed: Keyed
    filters: _retrieval_pb2.Filters
    exclude: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., nearest: _Optional[_Union[Nearest, _Mapping]] = ..., named: _Optional[_Union[Named, _Mapping]] = ..., newest: _Optional[_Union[Newest, _Mapping]] = ..., keyed: _Optional[_Union[Keyed, _Mapping]] = ..., filters: _Optional[_Union[_retrieval_pb2.Filters, _Mapping]] = ..., exclude: _Optional[_Iterable[str]] = ...) -> None: ...

class Nearest(_message.Message):
    __slots__ = ("vector", "k", "made_of", "made_of_offsets")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    MADE_OF_FIELD_NUMBER: _ClassVar[int]
    MADE_OF_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    vector: bytes
    k: int
    made_of: _containers.RepeatedScalarFieldContainer[str]
    made_of_offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, vector: _Optional[bytes] = ..., k: _Optional[int] = ..., made_of: _Optional[_Iterable[str]] = ..., made_of_offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Named(_message.Message):
    __slots__ = ("item_ids",)
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Keyed(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, keys: _Optional[_Iterable[int]] = ...) -> None: ...

class Newest(_message.Message):
    __slots__ = ("k",)
    K_FIELD_NUMBER: _ClassVar[int]
    k: int
    def __init__(self, k: _Optional[int] = ...) -> None: ...

class CandidatesResponse(_message.Message):
    __slots__ = ("item_ids", "scores", "at_ms", "written_us", "offsets", "watermarks", "live", "behind", "stale", "unknown_attributes")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_US_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    WATERMARKS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedScalarFieldContainer[float]
    at_ms: _containers.RepeatedScalarFieldContainer[int]
    written_us: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    watermarks: _containers.RepeatedCompositeFieldContainer[_retrieval_pb2.IndexWatermark]
    live: int
    behind: str
    stale: bool
    unknown_attributes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_ids: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[float]] = ..., at_ms: _Optional[_Iterable[int]] = ..., written_us: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., watermarks: _Optional[_Iterable[_Union[_retrieval_pb2.IndexWatermark, _Mapping]]] = ..., live: _Optional[int] = ..., behind: _Optional[str] = ..., stale: bool = ..., unknown_attributes: _Optional[_Iterable[str]] = ...) -> None: ...
