"""Settings: sources and their order, errors that name key, value and source, limits, secrets."""

from contextlib import ExitStack
from pathlib import Path
from typing import get_args, get_type_hints
from unittest.mock import Mock

import msgspec
import pytest
from msgspec import Meta

from cli.commands import settings as commands_settings
from eddyline.errors import SettingsError
from eddyline.settings.loader import SECRETS, Settings, data_folder, describe, load
from eddyline.settings.worker import OF_CO_VISITS, OF_EVENT_SUMS, RECALL_PATHS
from eddyline.stores.memory import MemoryStore
from serving.recall import registry
from serving.recall.base import RecallContext

HINTS = get_type_hints(Settings, include_extras=True)
LIMITS = {
    name: next((m for m in get_args(hint) if isinstance(m, Meta)), Meta())
    for name, hint in HINTS.items()
}


def env(**settings: object) -> dict[str, str]:
    return {f"EDDYLINE_{name.upper()}": str(value) for name, value in settings.items()}


def refused(environ: dict[str, str], folder: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        load(environ, folder=folder)
    return str(caught.value)


def test_defaults_are_valid_and_need_no_source(tmp_path: Path) -> None:
    assert load({}, folder=tmp_path) == Settings()
    for name, _, default, _ in describe():
        msgspec.convert(default, HINTS[name])


def test_a_later_source_wins(tmp_path: Path) -> None:
    (tmp_path / "eddyline.toml").write_text(
        'k_max = 5\nredis_url = "redis://file/0"\nnamespace = "file"\n', encoding="utf-8"
    )
    environ = {"REDIS_URL": "redis://alias/0", **env(k_max=7)}
    settings = load(environ, folder=tmp_path)
    assert (settings.k_max, settings.redis_url, settings.namespace) == (
        7,
        "redis://alias/0",
        "file",
    )
    assert (
        load({**environ, **env(redis_url="redis://own/0")}, folder=tmp_path).redis_url
        == "redis://own/0"
    )


def test_aliases_are_read_and_an_empty_one_is_no_value(tmp_path: Path) -> None:
    settings = load({"KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2", "REDIS_URL": ""}, folder=tmp_path)
    assert (settings.kafka_bootstrap_servers, settings.redis_url) == ("a:1,b:2", "")


def test_the_toml_file_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("k_max = 9  # für alle\n", encoding="utf-8")
    assert load({"EDDYLINE_CONFIG": str(path)}, folder=tmp_path).k_max == 9


def test_a_named_toml_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    sentence = refused({"EDDYLINE_CONFIG": str(tmp_path / "none.toml")}, tmp_path)
    assert "EDDYLINE_CONFIG" in sentence and "none.toml" in sentence


@pytest.mark.parametrize("content", [b"k_max = ", b"\xff\xfe", b"k_max 5"])
def test_a_toml_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "eddyline.toml").write_bytes(content)
    assert "eddyline.toml" in refused({}, tmp_path)


def test_an_unknown_key_names_itself_and_its_source(tmp_path: Path) -> None:
    sentence = refused(env(k_maxx=5), tmp_path)
    assert "EDDYLINE_K_MAXX" in sentence and "'k_maxx'" in sentence
    (tmp_path / "eddyline.toml").write_text("colour = 1\n", encoding="utf-8")
    sentence = refused({}, tmp_path)
    assert "eddyline.toml" in sentence and "'colour'" in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_max", "many"),
        ("k_max", "1.5"),
        ("k_max", ""),
        ("log_level", "loud"),
        ("namespace", "A b"),
        ("namespace", "a\n"),
        ("data_dir", ""),
    ],
)
def test_a_bad_value_names_key_value_and_source(name: str, value: str, tmp_path: Path) -> None:
    sentence = refused(env(**{name: value}), tmp_path)
    assert f"EDDYLINE_{name.upper()}" in sentence and f"{name} = {value!r}" in sentence


def test_toml_values_keep_their_types(tmp_path: Path) -> None:
    (tmp_path / "eddyline.toml").write_text('k_max = "5"\n', encoding="utf-8")
    assert "k_max = '5'" in refused({}, tmp_path)
    (tmp_path / "eddyline.toml").write_text("k_max = true\n", encoding="utf-8")
    assert "k_max = True" in refused({}, tmp_path)


def test_secrets_are_hidden_wherever_settings_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SECRETS <= set(HINTS)
    secret = "redis://:hunter2@host:1/0"
    settings = load({"REDIS_URL": secret}, folder=tmp_path)
    assert settings.redis_url == secret
    commands_settings.show(settings)
    assert "hunter2" not in repr(settings) + str(settings) + capsys.readouterr().out
    (tmp_path / "eddyline.toml").write_text("redis_url = ['hunter2']\n", encoding="utf-8")
    sentence = refused({}, tmp_path)
    assert "redis_url" in sentence and "hunter2" not in sentence


RETENTIONS = ["clicks_retention_h", "dead_letters_retention_h", "answers_retention_h"]
NUMBERS = [
    name for name, limits in LIMITS.items() if limits.ge is not None or limits.le is not None
]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_limit_of_a_number(name: str, tmp_path: Path) -> None:
    low, high = LIMITS[name].ge, LIMITS[name].le
    assert low is not None and high is not None, "every number has both limits"
    step = 1 if isinstance(low, int) and isinstance(high, int) else (high - low) / 100
    # The window and the chunk have a bound between them, too, and so have erasures and logs.
    other = (
        {"chunk_records_max": 1}
        if name == "dedupe_window_events"
        else {"dedupe_window_events": 10_000}
    )
    if name == "forgotten_kept_d":
        other |= dict.fromkeys(RETENTIONS, 24)
    else:
        other |= {"forgotten_kept_d": 36_500}
    for inside in (low, low + step, high - step, high):
        assert getattr(load(env(**other, **{name: inside}), folder=tmp_path), name) == inside
    for outside in (low - step, high + step, high * 1_000, -(10**30), 10**30):
        assert str(outside) in refused(env(**{name: outside}), tmp_path)


def test_the_limit_of_the_namespace(tmp_path: Path) -> None:
    for length in (39, 40):
        assert load(env(namespace="n" * length), folder=tmp_path).namespace == "n" * length
    for length in (41, 10_000):
        assert "namespace" in refused(env(namespace="n" * length), tmp_path)


def test_every_number_is_limited() -> None:
    numbers = [n for n, hint in HINTS.items() if (get_args(hint) or (hint,))[0] in (int, float)]
    assert numbers == NUMBERS


def test_derived_values() -> None:
    assert Settings(data_dir="d").bundles == Path("d/generations")
    assert Settings(data_dir="d", bundle_dir="/b").bundles == Path("/b")
    assert (Settings().prefixed("clicks"), Settings(namespace="n").prefixed("clicks")) == (
        "clicks",
        "n.clicks",
    )


@pytest.mark.parametrize(
    ("window", "fits"), [(511, False), (512, True), (513, True), (100_000, True)]
)
def test_the_window_is_twice_the_chunk_at_least(window: int, fits: bool) -> None:
    environ = {"EDDYLINE_CHUNK_RECORDS_MAX": "256", "EDDYLINE_DEDUPE_WINDOW_EVENTS": str(window)}
    if fits:
        assert load(environ).dedupe_window_events == window
    else:
        with pytest.raises(SettingsError, match="dedupe_window_events = 511"):
            load(environ)


@pytest.mark.parametrize("name", RETENTIONS)
@pytest.mark.parametrize(("hours", "fits"), [(47, True), (48, True), (49, False), (87_600, False)])
def test_erasures_are_kept_as_long_as_the_logs(name: str, hours: int, fits: bool) -> None:
    environ = {f"EDDYLINE_{other.upper()}": "1" for other in RETENTIONS}
    environ |= {"EDDYLINE_FORGOTTEN_KEPT_D": "2", f"EDDYLINE_{name.upper()}": str(hours)}
    if fits:
        assert load(environ).forgotten_kept_d == 2
    else:
        with pytest.raises(SettingsError, match=f"forgotten_kept_d = 2: .*{name} = {hours}"):
            load(environ)


def test_every_process_of_a_worker_has_a_port_for_its_metrics() -> None:
    for port, processes in ((65_535, 1), (65_532, 4), (0, 64)):
        made = load(env(worker_metrics_port=port, worker_processes=processes))
        assert made.worker_metrics_port == port
    for port, processes in ((65_535, 2), (65_533, 4), (65_533, 64)):
        with pytest.raises(SettingsError, match=f"worker_metrics_port = {port}"):
            load(env(worker_metrics_port=port, worker_processes=processes))


def test_a_data_folder_that_cannot_be_written_to_is_said_by_name(tmp_path: Path) -> None:
    made = load({"EDDYLINE_DATA_DIR": str(tmp_path / "a" / "b")})
    assert data_folder(made) == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"data_dir = .*file.*cannot be written"):
        data_folder(load({"EDDYLINE_DATA_DIR": str(tmp_path / "file")}))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("recall_paths", "", "there is no path ''"),
        ("recall_paths", "towers,", "there is no path ''"),
        ("recall_paths", "towers,tower", "there is no path 'tower', the paths are towers, "),
        ("recall_paths", "towers, newest,towers", "'towers' is named twice"),
        ("fusion", "best", "Invalid enum value 'best'"),
        ("fusion_weights", "towers", "'towers' is not name=weight"),
        ("fusion_weights", "towers=0", "'towers=0' is not name=weight with a weight above 0"),
        ("fusion_weights", "towers=nan", "'towers=nan' is not"),
        ("fusion_weights", "towers=1000.1", "and at most 1,000"),
        ("fusion_weights", "towers=1,towers=2", "'towers' is named twice"),
        ("fusion_weights", "towers=1,other=2", "'other' is not in recall_paths = 'towers,popular"),
        ("path_candidates", "0", "path_candidates = '0'"),
        ("path_candidates", "1001", "path_candidates = '1001'"),
        ("path_budget_ms", "0", "path_budget_ms = '0'"),
        ("path_budget_ms", "60001", "path_budget_ms = '60001'"),
    ],
)
def test_paths_that_cannot_be_used_are_refused(name: str, value: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(env(**{name: value}))
    assert sentence in str(refused.value) and f"{name} = {value!r}" in str(refused.value)


def test_paths_in_their_order_and_their_weights() -> None:
    made = load(env(recall_paths=" newest, towers ", fusion="rrf", fusion_weights="newest=1e3"))
    assert made.recall_path_names == ["newest", "towers"]
    assert made.fusion_weight_of == {"newest": 1_000.0}
    assert load(env()).recall_path_names == ["towers", "popular", "newest"]
    assert (load(env()).fusion, load(env()).fusion_weight_of) == ("cascade", {})
    for name, most in (("path_candidates", 1_000), ("path_budget_ms", 60_000)):
        for value in (1, most):
            assert getattr(load(env(**{name: str(value)})), name) == value


def test_ingest_keeps_the_state_of_the_paths_that_are_used() -> None:
    def kept(**values: str) -> tuple[int, bool]:
        made = load(env(co_visit_items="7", **values))
        return made.kept_co_visit_items, made.keeps_event_sums

    assert kept() == (0, False)
    assert kept(path_state="all") == (7, True)
    assert kept(recall_paths="towers,next") == kept(recall_paths="co_visits") == (7, False)
    assert kept(recall_paths="co_visits_both,towers") == (7, True)
    assert kept(recall_paths="popular_fast") == kept(recall_paths="popular_slow") == (0, True)
    assert load(env(path_state="all", co_visit_items="0")).kept_co_visit_items == 0
    with pytest.raises(SettingsError, match="path_state"):
        load(env(path_state="some"))


@pytest.mark.parametrize("name", RECALL_PATHS)
def test_the_state_that_a_path_reads_is_named_in_the_settings(name: str) -> None:
    popularity = Mock()
    context = RecallContext(Settings(), MemoryStore(), Mock(), popularity, ExitStack())
    path = registry.PATHS[name](context)
    assert bool(path.reads) == (name in OF_CO_VISITS)
    assert popularity.follow.called == (name in OF_EVENT_SUMS)


def test_every_path_of_the_registry_can_be_named() -> None:
    assert set(RECALL_PATHS) == set(registry.PATHS)
    assert load(env(recall_paths=",".join(RECALL_PATHS))).recall_path_names == [*RECALL_PATHS]
