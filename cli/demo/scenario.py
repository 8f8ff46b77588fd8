"""`make demo`: a user's ten films before and after a click; a new item appears and is deleted."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

import msgspec
from kafka import KafkaProducer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.demo.bring_up import RunningDemo, bring_up
from cli.demo.database import changes
from cli.demo.trace import trace
from eddyline.errors import EddylineError
from eddyline.kafka import producers
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.process import discovery
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from eddyline.stores.redis_url import without_password
from sandbox import processes
from sandbox.servers.postgres import Postgres
from serving.proto.retrieval_pb2 import RetrieveResponse
from serving.rpc.client import Client

ANA = "ana"
NEW_ITEM = "eddyline-premiere"
# A change that is not visible after this time has failed.
VISIBLE_S_MAX = 10.0
FIRST_CLICKS = 5


class ScenarioFailed(EddylineError):
    """An answer did not change as expected."""


def run(settings: Settings, *, data: str, once: bool, cdc: bool = False) -> int:
    """Run the demo; returns the exit code. Runs until Ctrl-C unless `once`.

    cdc: the items are rows of a table in PostgreSQL, which Debezium reads
    """
    console, started = Console(highlight=False), time.monotonic()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        with bring_up(settings, data, console, cdc=cdc) as system:
            scenario = Scenario(system, console, started)
            try:
                result = scenario.run()
            finally:
                scenario.close()
            if once:
                console.print(msgspec.json.encode(result).decode(), soft_wrap=True, markup=False)
                return 0
            _print_what_next(system, settings, console)
            while not stop.wait(1.0):
                system.deployment.supervisor.check()
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 0 if not once else 130
    except ScenarioFailed as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    return 0


class Scenario:
    """The steps of the demo.

    Each raises ScenarioFailed if an answer does not change as expected.
    """

    def __init__(self, system: RunningDemo, console: Console, started: float) -> None:
        self.system = system
        self.settings = system.deployment.settings
        self.console = console
        self.started = started
        self.client = Client(system.address)
        self.producer: KafkaProducer = producers.make_producer(self.settings)
        self.titles = {item.item_id: item for item in system.dataset.items}

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self.producer.close(timeout=5)

    def run(self) -> dict[str, object]:
        """Run every step; returns the figures of the demo's last line."""
        first = self.first_answer()
        click_ms = self.click(first)
        database = self.system.database
        item_ms, delete_ms = self.change_a_row(database) if database else self.add_and_delete_item()
        versions = {server.name: server.version for server in self.system.servers}
        return {
            "click_visible_ms": round(click_ms, 1),
            "item_visible_ms": round(item_ms, 1),
            "delete_visible_ms": round(delete_ms, 1),
            "kafka": versions["kafka"],
            "redis": versions["redis"],
            "data": self.system.dataset.name,
        }

    def first_answer(self) -> RetrieveResponse:
        """The answer for a new user after five clicks in one category."""
        sent_to(producers.send_forget(self.producer, self.settings, ANA), self.settings)
        check = self.system.deployment.supervisor.check
        processes.wait_until_applied(self.settings, timeout_s=VISIBLE_S_MAX, check=check)
        token = (0, 0)
        taste, liked = self._taste()
        for item_id in liked:
            token = self._send_click(item_id)
        answer = self.client.retrieve(ANA, 10, after=token, wait_ms=2_000, with_cards=True)
        took = " · ".join(f"{name} {s:.1f}" for name, s in self.system.took_s.items() if s >= 0.05)
        self.console.print(f"\n[dim]{time.monotonic() - self.started:.1f} s so far: {took}[/]")
        films = escape(", ".join(map(self._title, liked)))
        self.console.print(f"\nAna has clicked {FIRST_CLICKS} times, all {taste}: {films}.")
        self._expect(len(answer.items) == 10, f"ten items for Ana, not {len(answer.items)}")
        self._expect(
            not set(liked) & {i.item_id for i in answer.items}, "no film that Ana has seen"
        )
        self.console.print(self._table(answer, None))
        return answer

    def click(self, first: RetrieveResponse) -> float:
        """Click the film least like earlier ones; milliseconds until the answer has the click."""
        known = Counter(c for item_id in self._taste()[1] for c in self.titles[item_id].categories)
        chosen = min(
            (i.item_id for i in first.items),
            key=lambda item_id: sum(known[c] for c in self.titles[item_id].categories),
        )
        self.console.print(f"\nAna clicks [bold]{escape(self._title(chosen))}[/].")
        token = self._send_click(chosen)
        answer = self.client.retrieve(ANA, 10, after=token, wait_ms=2_000, with_cards=True)
        click_trace = trace(answer)
        ids = [i.item_id for i in answer.items]
        self._expect(answer.freshness.after.applied, "the click is in the answer")
        self._expect(len(ids) == 10 and chosen not in ids, "ten items without the clicked one")
        self._expect(ids != [i.item_id for i in first.items], "the list has changed")
        self.console.print(self._table(answer, first))
        self.console.print(f"[bold green]{click_trace}[/]")
        self.console.print(
            "[dim]kafka: producer → ingest · ingest: → applied in Redis · wait: → read by the "
            "worker · tower: the user's vector · search: the index · answer: → here[/]"
        )
        return click_trace.total_ms

    def add_and_delete_item(self) -> tuple[float, float]:
        """(milliseconds until a new item is found, until it is gone after its delete)."""
        like = self.titles[self._taste()[1][0]]
        item = msgspec.structs.replace(
            like, item_id=NEW_ITEM, title=f"{like.title} II", at_ms=now_ms()
        )
        began = time.monotonic()
        sent_to(producers.send_item(self.producer, self.settings, item), self.settings)
        rank = self._wait_for_item(found=True)
        found_ms = (time.monotonic() - began) * 1_000
        self.console.print(
            f"\nA new item, [bold]{escape(item.title)}[/], that nobody has clicked yet: "
            f"[bold green]found in {found_ms:.0f} ms[/], number {rank} of {len(self.titles):,} for "
            "Ana"
        )
        began = time.monotonic()
        sent_to(producers.send_delete(self.producer, self.settings, NEW_ITEM), self.settings)
        self._wait_for_item(found=False)
        gone_ms = (time.monotonic() - began) * 1_000
        self.console.print(f"Deleted: [bold green]gone in {gone_ms:.0f} ms[/]")
        return found_ms, gone_ms

    def change_a_row(self, database: Postgres) -> tuple[float, float]:
        """As `add_and_delete_item`, by statements in PostgreSQL; milliseconds from the commit."""
        like = self.titles[self._taste()[1][0]]
        title = f"{like.title} II"
        self.console.print(f"\nA new row in PostgreSQL, [bold]{escape(title)}[/]:")
        database.sql(changes(like, NEW_ITEM, title)[-1][1])  # of an earlier demo that was stopped
        self._wait_for_item(found=False)
        took_ms = []
        for what, statement, found in changes(like, NEW_ITEM, title):
            commit_ms = database.commit_ms(statement)
            self._wait_for_item(found=found)
            took_ms.append(time.time_ns() / 1e6 - commit_ms)
            seen = "found" if found else "gone"
            self.console.print(
                f"  {what}: [bold green]{seen} {took_ms[-1]:.0f} ms[/] after the commit"
            )
        return took_ms[0], took_ms[-1]

    def _wait_for_item(self, *, found: bool) -> int:
        """Query all items until the towers recall the new item, or no path does.

        Returns the item's rank, or 0.
        """
        began = time.monotonic()
        while time.monotonic() - began < VISIBLE_S_MAX:
            answer = self.client.retrieve(ANA, len(self.titles) + 1, timeout_s=5)
            # An item that arrives between two paths of one answer is first recalled by the last
            # path.
            paths = ("towers",) if found else ("towers", "popular", "newest")
            ranks = [i.rank for i in answer.items if i.item_id == NEW_ITEM and i.path in paths]
            if bool(ranks) == found:
                return (ranks or [0])[0]
        what = "not found" if found else "still there"
        raise ScenarioFailed(f"the new item is {what} after {VISIBLE_S_MAX:.0f} s")

    def _send_click(self, item_id: str) -> tuple[int, int]:
        click = Click(user_id=ANA, item_id=item_id, at_ms=now_ms(), kind="like")
        return sent_to(producers.send_click(self.producer, self.settings, click), self.settings)

    def _taste(self) -> tuple[str, list[str]]:
        """(a category, its five most clicked items).

        Of the eight most common categories the last one.
        """
        counts = Counter(c for item in self.system.dataset.items for c in item.categories)
        category = [c for c, _ in counts.most_common(8)][-1]
        of_it = {i.item_id for i in self.system.dataset.items if category in i.categories}
        liked = (
            c for c in self.system.dataset.clicks if c.item_id in of_it and c.kind != "dislike"
        )
        clicked = Counter(c.item_id for c in liked)
        return category, [item_id for item_id, _ in clicked.most_common(FIRST_CLICKS)]

    def _title(self, item_id: str) -> str:
        return self.titles[item_id].title if item_id in self.titles else item_id

    def _table(self, answer: RetrieveResponse, before: RetrieveResponse | None) -> Table:
        ranks = {i.item_id: i.rank for i in before.items} if before else {}
        table = Table(
            "#", "film", "was" if before else "", "path", "score", show_edge=False, pad_edge=False
        )
        for item in answer.items:
            moved = ""
            if before:
                moved = _moved(ranks.get(item.item_id), item.rank)
            row = (escape(self._title(item.item_id)), moved, item.path, f"{item.score:.3f}")
            table.add_row(str(item.rank), *row)
        return table

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise ScenarioFailed(f"expected: {what}")


def _moved(before: int | None, after: int) -> str:
    if before is None:
        return "[green]new[/]"
    if after == before:
        return ""
    return f"▲{before - after}" if after < before else f"▼{after - before}"


def _print_what_next(system: RunningDemo, settings: Settings, console: Console) -> None:
    live = system.deployment.settings
    servers = f"Kafka {live.kafka_bootstrap_servers} · Redis {without_password(live.redis_url)}"
    logs = system.deployment.supervisor.log_dir
    console.print(f"\n{servers} · worker {system.address} · logs in {logs}", soft_wrap=True)
    local = discovery.running(settings)
    same = local is not None and local.namespace == live.namespace
    prefix = "" if same else f"EDDYLINE_NAMESPACE={live.namespace} "
    item_id = system.dataset.items[0].item_id
    console.print("To continue in another terminal of this folder:")
    for command in (f"click {ANA} {item_id}", f"query {ANA}", "stats"):
        console.print(f"  {prefix}.venv/bin/eddyline {command}", soft_wrap=True)
    console.print("Ctrl-C stops it all.")
