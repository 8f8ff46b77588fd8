"""A worker with other recall paths, on real servers: from clicks to what was visited after them."""

from __future__ import annotations

import uuid

import msgspec

from eddyline.kafka.producers import now_ms
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import is_ready


def test_what_others_visited_next_is_recalled_fused_and_explained(live) -> None:
    child, address = live.deployment.worker_child(
        is_ready,
        "fused",
        clicks_partitions="4",
        items_partitions="2",
        recall_paths="next,co_visits_both,towers",
        fusion="rrf",
        fusion_weights="next=3",
        seen_items="keep",
    )
    live.supervisor.start(child)
    tag, client = uuid.uuid4().hex[:8], live.client(address)
    some = next(item for item in live.dataset.items if item.available)
    before, first, after = (f"{name}-{tag}" for name in ("before", "first", "after"))
    for item_id in (before, first, after):
        live.item(msgspec.structs.replace(some, item_id=item_id, at_ms=now_ms()))
    for n in range(3):
        for item_id in (before, first, after):
            live.click(f"walker-{tag}-{n}", item_id)
    visitor = f"visitor-{tag}"
    token = live.click(visitor, first)
    answers: list[pb.RetrieveResponse] = []

    def found() -> pb.RetrievedItem | None:
        answers.append(client.retrieve(visitor, 30, after=token, wait_ms=2_000))
        assert len(answers[-1].items) == 30 and not answers[-1].missing
        top = answers[-1].items[0]
        return top if (top.item_id, top.path) == (after, "next") else None

    try:
        top = live.wait_for("the row of the first item", found)
    except AssertionError:
        raise AssertionError(f"the last of {len(answers)} answers: {answers[-1:]}") from None
    shares = {path.path: path.share for path in top.paths}
    assert shares["next"] == 3 / 61 and shares.keys() >= {"next", "co_visits_both"}
    of_both = {
        item.item_id
        for item in answers[-1].items
        if any(path.path == "co_visits_both" for path in item.paths)
    }
    assert {before, after} <= of_both
    [one] = client.explain(visitor, [after], 5).items
    assert one.in_answer and one.rank == 1 and one.fused_score == sum(p.share for p in one.paths)
    # The rows of a guest's session are read, too.
    guest = client.retrieve("", 3, session=[first])
    assert guest.items[0].item_id == after and not guest.missing
