"""`eddyline import --dry-run`: what is shown, which map is used, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from eddyline.errors import EddylineError, SettingsError

RATINGS = (
    "userId,movieId,rating,timestamp\n1,10,5.0,964982703\n2,20,1.0,964982704\n,3,1.0,964982704\n"
)


def run(*words: str, error: type[EddylineError] | None = None) -> tuple[str, str]:
    """(what was printed, the error)"""
    result = CliRunner().invoke(app, ["import", *words])
    if error is None:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output, ""
    assert isinstance(result.exception, error), (result.output, result.exception)
    return result.output, str(result.exception)


def file(folder: Path, text: str, name: str = "ratings.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_dry_run_shows_columns_events_and_refusals_with_rows(tmp_path: Path) -> None:
    path = file(tmp_path, RATINGS + "too,few\n")
    printed, _ = run(str(path), "--dry-run")
    assert "→ clicks (csv, 3 rows, separated by ',', header, utf-8)" in printed
    for column, what in (("userId", "user_id"), ("rating", "kind"), ("timestamp", "at_ms")):
        assert any(
            line.startswith(column) and line.rstrip().endswith(what)
            for line in printed.splitlines()
        )
    assert '"user_id": "1", "item_id": "10", "at_ms": 964982703000, "kind": "like"' in printed
    assert "rows: 3; 2 events, 0 ignored, 2 refused" in printed
    assert "1 × missing_field: user_id (row 3, …)" in printed
    assert "1 × missing_columns (line 5, …): too,few" in printed
    kept = (tmp_path / "ratings.csv.map.toml").read_text(encoding="utf-8")
    assert 'user_id = "userId"' in kept


def test_brackets_in_cells_are_shown_as_they_are(tmp_path: Path) -> None:
    path = file(tmp_path, "userId,movieId,timestamp,note\n[bold]1,[/],964982703,[x]\n")
    printed, _ = run(str(path), "--dry-run")
    assert '"user_id": "[bold]1", "item_id": "[/]"' in printed
    assert any(line.split() == ["note", "[x]", "nothing"] for line in printed.splitlines())


def test_the_map_beside_a_file_is_used_and_never_overwritten(tmp_path: Path) -> None:
    path = file(tmp_path, RATINGS)
    beside = tmp_path / "ratings.csv.map.toml"
    own = '[clicks]\n[clicks.fields]\nuser_id = "movieId"\nitem_id = "userId"\n'
    beside.write_text(own, encoding="utf-8")
    printed, _ = run(str(path), "--dry-run")
    assert '"user_id": "10", "item_id": "1"' in printed
    assert "no column is a time: all events happen now" in printed
    assert beside.read_text(encoding="utf-8") == own


def test_a_map_with_several_tables_is_used_by_the_columns(tmp_path: Path) -> None:
    movies = file(tmp_path, "movieId,title\n10,Heat\n", "movies.csv")
    ratings = file(tmp_path, RATINGS)
    both = file(
        tmp_path,
        '[clicks.fields]\nuser_id = "userId"\nitem_id = "movieId"\n'
        '[items.fields]\nitem_id = "movieId"\ntitle = "title"\n',
        "map.toml",
    )
    printed, _ = run(str(ratings), str(movies), "--map", str(both), "--dry-run")
    assert "movies.csv → items" in printed and "ratings.csv → clicks" in printed
    assert printed.index("→ items") < printed.index("→ clicks")
    assert "ratings.csv → items" not in printed
    assert not list(tmp_path.glob("*.csv.map.toml"))


def test_what_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    path = file(tmp_path, RATINGS)
    _, message = run(str(tmp_path / "none.csv"), "--dry-run", error=EddylineError)
    assert "No such file" in message
    _, message = run(str(path), "--topic", "films", error=SettingsError)
    assert "expected one of clicks, items, users" in message
    _, message = run(str(path), "--map", str(tmp_path / "none"), error=SettingsError)
    assert "No such file" in message
    wrong = file(tmp_path, '[clicks.fields]\nuser_id = "x"\nitem_id = "y"\n', "map.toml")
    _, message = run(str(path), "--map", str(wrong), "--dry-run", error=EddylineError)
    assert "no row becomes an event" in message


def test_two_files_of_one_name_have_no_files_of_refused_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [str(file(tmp_path / name, RATINGS)) for name in ("a", "b")]
    refused = ("--refused", str(tmp_path / "bad"))
    _, message = run(*paths, *refused, "--dry-run", error=SettingsError)
    assert "two files have one name" in message
    run(paths[0], *refused, "--dry-run")


def test_nothing_is_sent_without_a_yes(tmp_path: Path) -> None:
    path = file(tmp_path, RATINGS)
    result = CliRunner().invoke(app, ["import", str(path)], input="n\n")
    assert result.exit_code == 1 and "Import this?" in result.output


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.text(alphabet='user,itm_d1"\n;|\t{}[]:é. ', max_size=80),
        st.lists(
            st.lists(st.sampled_from(["user", "item", "id", "1", "x", "", '"', "NaN"]), min_size=1)
        ).map(lambda lines: "\n".join(",".join(cells) for cells in lines)),
    )
)
@pytest.mark.timeout(600)
def test_any_file_is_shown_or_refused_by_one_sentence(tmp_path: Path, text: str) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    path = file(tmp_path, text)
    result = CliRunner().invoke(app, ["import", str(path), "--dry-run"])
    assert result.exit_code == 0 or isinstance(result.exception, EddylineError), (
        text,
        result.exception,
    )
