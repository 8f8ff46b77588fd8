"""`eddyline query` and `eddyline stats`: the query worker's answers as tables or as JSON."""

from __future__ import annotations

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from cli.commands import judge_rates
from eddyline import addresses
from eddyline.errors import EddylineError, SettingsError
from eddyline.kafka import topics
from eddyline.process.discovery import resolve
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from serving import running_workers
from serving.proto.retrieval_pb2 import IndexSizes, RetrieveResponse, ShardStatus
from serving.rpc.client import Client

console = Console(highlight=False, markup=False)


def query(
    settings: Settings,
    user: str,
    *,
    k: int,
    session: list[str],
    after: str,
    wait_ms: int,
    address: str,
    as_json: bool,
) -> None:
    """Print a user's items.

    session: items of this visit, newest first; with them the user may be ""
    after:   `partition/offset` of a click that the answer must include
    """
    token = _token(after) if after else None
    with Client(address or worker_address(settings)) as client:
        answer = client.retrieve(
            user, k, after=token, wait_ms=wait_ms if token else 0, with_cards=True, session=session
        )
    _show(answer, as_json)


def similar(settings: Settings, items: list[str], *, k: int, address: str, as_json: bool) -> None:
    """Print the items nearest to these."""
    with Client(address or worker_address(settings)) as client:
        answer = client.similar_items(items, k, with_cards=True)
    _show(answer, as_json)


def explain(
    settings: Settings,
    user: str,
    items: list[str],
    *,
    k: int,
    session: list[str],
    address: str,
    as_json: bool,
) -> None:
    """Print why items are, or are not, in a user's answer."""
    with Client(address or worker_address(settings)) as client:
        found = client.explain(user, items, k, session=session)
    if as_json:
        console.print(MessageToJson(found, preserving_proto_field_name=True), soft_wrap=True)
        return
    for item in found.items:
        console.print(f"{item.item_id}: {item.why}", soft_wrap=True)
        for path in item.paths:
            rank = f"number {path.rank}" if path.rank else "not among the first"
            where = f"{rank}, score {path.score:.3f}" if path.returned else "not returned"
            console.print(
                f"  {path.path}: {where}" + (f" ({path.why})" if path.why else ""), soft_wrap=True
            )
    for line in found.missing:
        console.print(f"missing: {line}", soft_wrap=True)


def _show(answer: RetrieveResponse, as_json: bool) -> None:
    if as_json:
        console.print(MessageToJson(answer, preserving_proto_field_name=True), soft_wrap=True)
        return
    console.print(answer_table(answer))
    for line in remarks(answer):
        console.print(line, soft_wrap=True)


def stats(settings: Settings, *, address: str, as_json: bool) -> None:
    """Print the worker's state, how far ingest is behind Kafka, and the judge's rates."""
    with Client(address or worker_address(settings)) as client:
        worker = client.stats()
    if as_json:
        console.print(MessageToJson(worker, preserving_proto_field_name=True), soft_wrap=True)
        return
    table = Table("what", "value", show_edge=False, pad_edge=False)
    for what, value in (
        ("generation", worker.generation),
        ("queries", f"{worker.queries:,} ({worker.queries_failed:,} failed)"),
        ("items in the index", f"{worker.index.live:,} live, {worker.index.main:,} in the graph"),
        ("rebuilds", f"{worker.index.rebuilds:,} ({worker.index.rebuilds_failed:,} failed)"),
        ("recall", recall_of(worker.index)),
        ("item records read", f"{worker.tail.records:,}, {worker.tail.lag_records:,} behind"),
        ("popular list", f"{worker.popular.items:,} items, {worker.popular.age_ms:,} ms old"),
        ("missing", ", ".join(worker.missing) or "nothing"),
        *((f"shard {shard.shard}", shard_line(shard)) for shard in worker.held),
    ):
        table.add_row(what, value)
    console.print(table)
    lag = _lag_table(resolve(settings))
    if lag.row_count:
        console.print(lag)
    else:
        space = resolve(settings).namespace or "(none)"
        console.print(
            f"there are no topics in the namespace {space}; EDDYLINE_NAMESPACE names another one"
        )
    judge_rates.show(settings, console)


def recall_of(index: IndexSizes) -> str:
    """The recall guard's estimate, in one line."""
    if not index.HasField("recall"):
        return "not watched"
    recall = index.recall
    estimate = "not enough compared yet"
    if recall.samples:
        interval = f"{recall.low:.3f} … {recall.high:.3f}"
        estimate = f"{recall.estimate:.3f} ({interval}) of {recall.samples:,} queries"
    return f"{estimate}, {recall.step}, {index.breadth:,} candidates"


def shard_line(shard: ShardStatus) -> str:
    """A shard's state by its coordinator, in one line."""
    state = "answers" if shard.answers else f"{shard.reason}: {shard.detail}"
    counts = f"{shard.live:,} items, {shard.lag_records:,} behind, {shard.misses:,} misses"
    return f"{shard.address}, {state}, {counts}"


def answer_table(answer: RetrieveResponse) -> Table:
    """The items of an answer, one per row."""
    table = Table("#", "item", "title", "path", "score", "age", show_edge=False, pad_edge=False)
    for item in answer.items:
        row = (item.item_id, item.card.title, f"{item.path} {item.path_rank}", f"{item.score:.3f}")
        table.add_row(str(item.rank), *row, _ago(item.age_ms))
    return table


def remarks(answer: RetrieveResponse) -> list[str]:
    """Lines about an answer: freshness, recall paths without candidates, what was missing."""
    user, fresh = answer.freshness.user, answer.freshness
    known = (
        f"last click clicks/{user.partition}/{user.offset}"
        if user.known
        else "no click of this user yet"
    )
    lines = [f"generation {fresh.generation}"]
    if fresh.HasField("user"):
        lines[0] += f" · {known} · fence {user.fence_offset}"
    if answer.impression_id:  # a worker of an older version gives none
        lines.append(f"impression {answer.impression_id}")
    lines += [f"{path.path}: {path.why}" for path in answer.paths if path.why]
    if answer.HasField("shards"):
        lines.append(f"shards: {answer.shards.answered} of {answer.shards.asked} answered")
    lines += [f"missing: {what}" for what in answer.missing]
    if answer.short_because:
        lines.append(f"fewer than requested: {answer.short_because}")
    if answer.freshness.after.why:
        lines.append(f"after: {answer.freshness.after.why}")
    return lines


def worker_address(settings: Settings) -> str:
    """The address of the worker or coordinator that was started last on this data folder.

    Without one, the address of the settings. Raises SettingsError if that has no port.
    """
    running = [worker for worker in running_workers.running(settings) if worker.answers]
    if running:
        return running[-1].address
    if settings.worker_port == 0:
        raise SettingsError(
            "no query worker runs here: start one with `eddyline worker`, or give --address"
        )
    return addresses.joined(settings.worker_host, settings.worker_port)


def _lag_table(settings: Settings) -> Table:
    table = Table("topic", "partition", "applied", "end", "behind", show_edge=False, pad_edge=False)
    store = RedisStore(settings)
    try:
        for name in topics.SOURCES:
            for partition, end in sorted(topics.end_offsets(settings, name).items()):
                slot = "i0" if name == topics.ITEMS else user_slot(partition)
                fence = store.fences(Source(name, partition), [slot])[slot]
                applied = fence.offset + 1 if fence else 0
                table.add_row(
                    name, str(partition), f"{applied:,}", f"{end:,}", f"{end - applied:,}"
                )
    except EddylineError as error:
        console.print(f"lag unknown: {error}")
    finally:
        store.close()
    return table


def _token(text: str) -> tuple[int, int]:
    partition, slash, offset = text.removeprefix("clicks/").partition("/")
    if not (slash and partition.isdigit() and offset.isdigit()):
        raise SettingsError(
            f"--after {text!r}: expected partition/offset, as `eddyline click` prints it"
        )
    return int(partition), int(offset)


def _ago(age_ms: int) -> str:
    for size, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")):
        if age_ms >= size:
            return f"{age_ms / size:.0f} {unit}"
    return f"{age_ms} ms"
