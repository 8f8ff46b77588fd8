"""`eddyline <verb>`: the commands and their options; each command is a file in `cli.commands`.

Exit codes: 0 done · 1 failed · 2 a wrong command line or setting · 3 an operator has to decide:
Kafka is not the log that the fences in Redis belong to (`eddyline accept-log` resolves it), or
Kafka or Redis refuses us.
"""

# Imports inside the functions: every command starts fast and loads only what it needs.

from __future__ import annotations

import os
import runpy
import sys
from typing import Annotated

import typer
from rich.console import Console

from cli import file_commands, query_commands
from cli.items_group import items_app
from cli.map_group import map_app
from cli.rules_group import rules_app
from eddyline import __version__
from eddyline.errors import EddylineError
from eddyline.settings.loader import Settings, data_folder, load

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Live retrieval for recommenders: a click changes the very next answer.",
)

User = Annotated[str, typer.Argument(help="The user's id.")]
ItemId = Annotated[str, typer.Argument(help="The item's id.")]


def main() -> None:
    """Run the command line; prints Eddyline's own errors as one sentence, without traceback."""
    try:
        app()
    except EddylineError as error:
        from eddyline.process.lifecycle import exit_code

        _fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        f"eddyline: {message}"
    )
    sys.exit(code)


def _settings() -> Settings:
    from eddyline.process.discovery import resolve

    return resolve(load())


@app.command()
def version() -> None:
    """Print the version."""
    Console().print(__version__, highlight=False)


@app.command()
def up(
    foreground: Annotated[bool, typer.Option(help="Stay in this terminal.")] = False,
    processes: Annotated[
        str, typer.Option("--with", help="Run these, too: ingest,worker,archive,judge.")
    ] = "",
) -> None:
    """Start a local Kafka and Valkey in the background; their data is in `data_dir`."""
    from cli.commands import servers

    settings = load()
    data_folder(settings)
    names = [name for one in processes.split(",") if (name := one.strip())]
    servers.up(settings, foreground=foreground, processes=names)


@app.command()
def down() -> None:
    """Stop the local Kafka and Valkey, and what runs with them; the data stays."""
    from cli.commands import servers

    servers.down(load())


@app.command()
def demo(
    data: Annotated[str, typer.Option(envvar="DATA", help="movielens or generated.")] = "movielens",
    once: Annotated[
        bool, typer.Option(envvar="ONCE", help="Exit after the demo, 0 if every step passed.")
    ] = False,
    cdc: Annotated[
        bool, typer.Option(envvar="CDC", help="Items from PostgreSQL, by Debezium (extra cdc).")
    ] = False,
) -> None:
    """Show how a click changes an answer, on real Kafka and Redis; runs until Ctrl-C."""
    from cli.demo.scenario import run

    settings = load()
    data_folder(settings)
    sys.exit(run(settings, data=data, once=once, cdc=cdc))


@app.command()
def ingest() -> None:
    """Run an ingest process (as `python -m streams`)."""
    runpy.run_module("streams", run_name="__main__", alter_sys=True)


@app.command()
def worker() -> None:
    """Run a query worker (as `python -m serving`)."""
    runpy.run_module("serving", run_name="__main__", alter_sys=True)


@app.command()
def coordinator() -> None:
    """Run a coordinator of shards (as `python -m serving.coordinator`)."""
    runpy.run_module("serving.coordinator", run_name="__main__", alter_sys=True)


@app.command()
def judge(
    from_beginning: Annotated[
        bool, typer.Option(help="Without a checkpoint, score all events that Kafka has.")
    ] = False,
) -> None:
    """Score live events by what each recall path would have said (`python -m evaluation.judge`)."""
    if from_beginning:
        os.environ["EDDYLINE_JUDGE_FROM"] = "beginning"
    runpy.run_module("evaluation.judge", run_name="__main__", alter_sys=True)


archive_app = typer.Typer(help="Accepted events in Parquet files.")
app.add_typer(archive_app, name="archive")


@archive_app.callback(invoke_without_command=True)
def archive(context: typer.Context) -> None:
    """Run the archive process (as `python -m streams.archive`), or a command on its files."""
    if context.invoked_subcommand is None:
        runpy.run_module("streams.archive", run_name="__main__", alter_sys=True)


@archive_app.command("forget")
def archive_forget(user: User) -> None:
    """Erase this user's events from every file of the archive."""
    from cli.commands import archive as commands_archive

    commands_archive.forget(_settings(), user)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context) -> None:
    """Train and activate a generation (as `python -m embeddings.training`, with its options)."""
    sys.argv = ["eddyline train", *context.args]
    runpy.run_module("embeddings.training", run_name="__main__")


@app.command()
def click(
    user: User,
    item: ItemId,
    kind: Annotated[
        str, typer.Option(help="click, view, like, cart, purchase or dislike.")
    ] = "click",
    weight: Annotated[float, typer.Option(help="Its weight.")] = 1.0,
    event_id: Annotated[str, typer.Option(help="Default: a new one.")] = "",
    impression_id: Annotated[str, typer.Option(help="Of the answer that led to it.")] = "",
) -> None:
    """Send one click; prints the token that `eddyline query --after` takes."""
    from cli.commands import send

    send.click(
        _settings(),
        user,
        item,
        kind=kind,
        weight=weight,
        event_id=event_id,
        impression_id=impression_id,
    )


@app.command()
def item(
    item_id: ItemId,
    title: Annotated[str, typer.Option(help="Its title.")] = "",
    category: Annotated[list[str] | None, typer.Option(help="A category; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="name=value; may be repeated.")
    ] = None,
    unavailable: Annotated[bool, typer.Option(help="Keep it, but in no answer.")] = False,
    delete: Annotated[bool, typer.Option(help="Delete it.")] = False,
) -> None:
    """Add, replace or delete one item."""
    from cli.commands import send

    if delete:
        send.delete_item(_settings(), item_id)
        return
    send.item(
        _settings(),
        item_id,
        title=title,
        categories=category or [],
        tags=tag or [],
        attributes=attribute or [],
        available=not unavailable,
    )


app.command()(file_commands.replay)
app.command("import")(file_commands.import_)
app.command()(file_commands.export)
app.command()(file_commands.evaluate)
app.command()(file_commands.init)


app.command()(query_commands.query)
app.command()(query_commands.explain)
app.command()(query_commands.similar)
app.command()(query_commands.stats)


@app.command()
def merge(
    visitor: Annotated[str, typer.Argument(help="The visitor's id; forgotten afterwards.")],
    user: Annotated[str, typer.Argument(help="The user that the visitor is.")],
    wait_s: Annotated[float, typer.Option(min=0, max=600, help="How long ingest may take.")] = 30,
) -> None:
    """Move a visitor's history into a user's history, exactly once."""
    from cli.commands import merge as commands_merge

    commands_merge.merge(_settings(), visitor, user, wait_s=wait_s)


@app.command()
def plan(
    users: Annotated[str, typer.Option(help="How many users: 300, 2.5k, 10M.")],
    items: Annotated[str, typer.Option(help="How many items.")],
    history: Annotated[int, typer.Option(min=0, help="Events of a user.")] = 50,
    dimension: Annotated[int, typer.Option(min=1, help="Length of the vectors.")] = 64,
    item_bytes: Annotated[int, typer.Option(min=0, help="An item as JSON.")] = 300,
    clicks_a_day: Annotated[str, typer.Option(help="By default one for each user.")] = "0",
    forgotten_a_day: Annotated[str, typer.Option(help="Merged visitors included.")] = "0",
    visitors_a_day: Annotated[
        str, typer.Option(help="Who click once and do not come back; besides the users.")
    ] = "0",
    deleted_a_day: Annotated[str, typer.Option(help="Items deleted each day.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, in bytes.")] = False,
) -> None:
    """Say how much memory Redis and a query worker need; a running Redis measures it."""
    from cli.commands import capacity as planning

    sizes = planning.Sizes(
        users=planning.amount(users),
        items=planning.amount(items),
        history=history,
        dimension=dimension,
        item_json=item_bytes,
        clicks_a_day=planning.amount(clicks_a_day),
        forgotten_a_day=planning.amount(forgotten_a_day),
        visitors_a_day=planning.amount(visitors_a_day),
        deleted_a_day=planning.amount(deleted_a_day),
    )
    settings = load()  # needs no Kafka
    planning.show(settings if settings.redis_url else _settings(), sizes, as_json=as_json)


topics_app = typer.Typer(
    no_args_is_help=True, help="Topics: whether they keep what Eddyline needs, and make them."
)
app.add_typer(topics_app, name="topics")


@topics_app.command("check")
def topics_check() -> None:
    """Name what would lose or distort data, and the command that mends it; exit 1 if anything."""
    from cli.commands import topics

    topics.check(_settings())


@topics_app.command("create")
def topics_create() -> None:
    """Create the topics that are missing; give empty ones the partitions of the settings."""
    from cli.commands import topics

    topics.create(_settings())


generations_app = typer.Typer(
    no_args_is_help=True, help="Generations: list them, activate one, end the old ones."
)
app.add_typer(generations_app, name="generations")


@generations_app.command("list")
def generations_list() -> None:
    """Show the generations: active, kept, ended."""
    from cli.commands import generations

    generations.show_list(_settings())


@generations_app.command("activate")
def generations_activate(
    generation: Annotated[str, typer.Argument(help="The id of a published generation.")],
) -> None:
    """Activate a published generation: a rollback. Ingest and workers load it at their start."""
    from cli.commands import generations

    generations.activate(_settings(), generation)


@generations_app.command("end")
def generations_end() -> None:
    """End outdated generations, and remove those whose time is over, as every training does."""
    from cli.commands import generations

    generations.end(_settings())


app.add_typer(map_app, name="map")
app.add_typer(items_app, name="items")
app.add_typer(rules_app, name="rules")


letters_app = typer.Typer(
    no_args_is_help=True, help="Refused records: list them, and replay them exactly once."
)
app.add_typer(letters_app, name="dead-letters")


@letters_app.command("list")
def letters_list(
    reason: Annotated[str, typer.Option(help="Only this reason.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest.")] = 20,
) -> None:
    """Show the newest refused records, and the count of each reason."""
    from cli.commands import dead_letters

    dead_letters.show_list(_settings(), reason=reason, limit=limit)


@letters_app.command("show")
def letters_show(
    at: Annotated[str, typer.Argument(help="The refused record: topic/partition/offset.")],
    whole: Annotated[bool, typer.Option("--all", help="All bytes of a long value.")] = False,
) -> None:
    """Show one refused record with its bytes."""
    from cli.commands import dead_letters

    dead_letters.show_one(_settings(), at, whole=whole)


@letters_app.command("replay")
def letters_replay(
    at: Annotated[str, typer.Argument(help="The refused record: topic/partition/offset.")] = "",
    reason: Annotated[str, typer.Option(help="All of this reason, the oldest first.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at most.")] = 1_000,
) -> None:
    """Send refused records to their topics again, each at most once."""
    from cli.commands import dead_letters

    dead_letters.replay(_settings(), at, reason=reason, limit=limit)


@letters_app.command("skip")
def letters_skip(
    batches: Annotated[
        list[str], typer.Argument(help="topic/partition/offset of a batch that cannot be read.")
    ],
    to: Annotated[
        int | None, typer.Option(min=0, help="Its last offset, if its head is damaged.")
    ] = None,
) -> None:
    """Give up batches that no process can read, so that their partitions go on behind them."""
    from cli.commands import dead_letters

    dead_letters.skip(_settings(), batches, to=to)


@app.command()
def refill(
    skip_lost: Annotated[
        bool, typer.Option("--skip-lost", help="Skip offsets that the archive lacks.")
    ] = False,
) -> None:
    """Apply clicks that Kafka's retention removed before ingest had them, from the archive."""
    from cli.commands import refill as commands_refill

    commands_refill.refill(_settings(), skip_lost=skip_lost)


@app.command()
def repartition(
    namespace: Annotated[str, typer.Argument(help="The namespace to copy into; a new one.")],
    clicks: Annotated[int, typer.Option(min=1, help="Partitions of clicks and users there.")],
    items: Annotated[int, typer.Option(min=1, help="Partitions of items there.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until stopped.")] = False,
    skip_lost: Annotated[
        bool, typer.Option("--skip-lost", help="Copy without clicks that nothing has any more.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Copy all topics into a namespace with other numbers of partitions, exactly once."""
    from cli.commands import repartition as commands_repartition

    commands_repartition.repartition(
        _settings(), namespace, clicks, items, follow=follow, skip_lost=skip_lost, yes=yes
    )


@app.command()
def resync(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete the items and profiles that Kafka's compacted topics no longer have."""
    from cli.commands import resync as commands_resync

    settings = _settings()
    if not yes:
        typer.confirm(
            "Items and profiles that the topics no longer have are deleted everywhere, and their "
            "users are forgotten. Is no ingest running?",
            abort=True,
        )
    commands_resync.resync(settings)


@app.command("accept-log")
def accept_log(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    skip_lost: Annotated[
        bool, typer.Option("--skip-lost", help="Also skip clicks that retention removed unapplied.")
    ] = False,
) -> None:
    """Go on with Kafka's present logs, after Kafka was recreated or lost records."""
    from cli.commands import accept_log as commands_accept_log

    settings = _settings()
    if not yes:
        typer.confirm("Fences of logs that are gone are dropped. Is no ingest running?", abort=True)
    commands_accept_log.accept_log(settings, skip_lost=skip_lost)


@app.command()
def settings(
    markdown: Annotated[bool, typer.Option(help="The page docs/configuration.md.")] = False,
) -> None:
    """Print every setting and its value; secrets are hidden."""
    from cli.commands.settings import show

    show(load(), markdown=markdown)
