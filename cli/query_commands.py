"""The options of the commands that ask a query worker; `cli.main` adds them."""

# Imports inside the functions: every command starts fast and loads only what it needs.

from __future__ import annotations

from typing import Annotated

import typer

from eddyline.settings.loader import load

AsJson = Annotated[bool, typer.Option("--json", help="The whole answer as JSON.")]
Session = Annotated[
    list[str] | None, typer.Option(help="An item of this visit, newest first; may be repeated.")
]
Address = Annotated[
    str, typer.Option(help="The query worker's address; default: the one that runs here.")
]


def query(
    user: Annotated[str, typer.Argument(help="The user's id; none for a guest.")] = "",
    session: Session = None,
    k: Annotated[int, typer.Option("--k", "-k", help="How many items.")] = 10,
    after: Annotated[str, typer.Option(help="Wait for this click, partition/offset.")] = "",
    wait_ms: Annotated[int, typer.Option(help="How long to wait for the click.")] = 1_000,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Show a user's items, the recall path of each, and how fresh the answer is."""
    from cli.commands import query as commands_query

    commands_query.query(
        load(),
        user,
        k=k,
        session=session or [],
        after=after,
        wait_ms=wait_ms,
        address=address,
        as_json=as_json,
    )


def explain(
    user: Annotated[str, typer.Argument(help='The user\'s id; "" for a guest.')],
    items: Annotated[list[str], typer.Argument(help="Ids of items.")],
    k: Annotated[int, typer.Option("--k", "-k", help="How many items the answer has.")] = 10,
    session: Session = None,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Show why items are, or are not, in a user's answer."""
    from cli.commands import query as commands_query

    commands_query.explain(
        load(), user, items, k=k, session=session or [], address=address, as_json=as_json
    )


def similar(
    items: Annotated[list[str], typer.Argument(help="Ids of one or several items.")],
    k: Annotated[int, typer.Option("--k", "-k", help="How many items.")] = 10,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Show the items nearest to an item, or to the middle of several."""
    from cli.commands import query as commands_query

    commands_query.similar(load(), items, k=k, address=address, as_json=as_json)


def stats(address: Address = "", as_json: AsJson = False) -> None:
    """Show the worker's state, how far ingest is behind Kafka, and the judge's rates."""
    from cli.commands import query as commands_query

    commands_query.stats(load(), address=address, as_json=as_json)
