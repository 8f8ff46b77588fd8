"""Every setting: `Settings` joins the sections, `load` reads them.

Sources, a later one wins: the default in the section → the TOML file (`EDDYLINE_CONFIG`, else
`eddyline.toml` in the working directory if it exists) → the environment (`EDDYLINE_<NAME>` in
capitals). `KAFKA_BOOTSTRAP_SERVERS` and `REDIS_URL` rank below their `EDDYLINE_` forms. An unknown
key or a bad value raises SettingsError, which names the key, the value and the source.
`docs/configuration.md` is generated: `eddyline settings --markdown`.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Meta

from eddyline import addresses
from eddyline.errors import SettingsError
from eddyline.schema.id_form import in_form
from eddyline.settings import answers, ingest, kafka, worker
from eddyline.settings.answers import AnswerSettings
from eddyline.settings.field import descriptions, within
from eddyline.settings.index import IndexSettings
from eddyline.settings.ingest import IngestSettings
from eddyline.settings.judge import JudgeSettings
from eddyline.settings.kafka import KafkaSettings
from eddyline.settings.observability import ObservabilitySettings
from eddyline.settings.redis import RedisSettings
from eddyline.settings.worker import WorkerSettings

PREFIX = "EDDYLINE_"
ALIASES = {"KAFKA_BOOTSTRAP_SERVERS": "kafka_bootstrap_servers", "REDIS_URL": "redis_url"}
# Variables with the prefix that steer the set-up or the reading of settings.
NOT_SETTINGS = {"EDDYLINE_CONFIG"}
SECRETS = {
    "redis_url",
    "redis_sentinel_password",
    "kafka_sasl_password",
    "kafka_key_password",
    "registry_password",
}
_SOURCES = ("clicks", "items", "users")
WEIGHED_KINDS = ("view", "click", "like", "cart", "purchase")

_SECTIONS = (
    KafkaSettings,
    RedisSettings,
    IngestSettings,
    WorkerSettings,
    AnswerSettings,
    IndexSettings,
    JudgeSettings,
    ObservabilitySettings,
)

if TYPE_CHECKING:

    class _AllSections(
        KafkaSettings,
        RedisSettings,
        IngestSettings,
        WorkerSettings,
        AnswerSettings,
        IndexSettings,
        JudgeSettings,
        ObservabilitySettings,
        frozen=True,
        kw_only=True,
    ):
        pass

else:
    # A msgspec struct inherits from one struct only: the fields are copied from the sections.
    _AllSections = msgspec.defstruct(
        "_AllSections",
        [
            (field.name, hints[field.name], field.default)
            for section in _SECTIONS
            for hints in [get_type_hints(section, include_extras=True)]
            for field in msgspec.structs.fields(section)
        ],
        frozen=True,
        kw_only=True,
    )


class Settings(_AllSections, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, checked. A duration is in the unit that ends its name."""

    namespace: Annotated[str, Meta(pattern=r"^[a-z0-9-]*\Z", max_length=40)] = ""
    """Prefix of every topic, Redis key, consumer group and transactional id: several Eddylines
    share one Kafka and Redis."""
    data_dir: Annotated[str, Meta(min_length=1)] = ".eddyline"
    """Where the local servers, the demo and the bundles keep their files."""
    bundle_dir: str = ""
    """Folder of the generation bundles. Empty: `generations` in `data_dir`."""
    backoff_ms_max: Annotated[int, within(10, 60_000)] = 2_000
    """The longest pause between two attempts to reach a server that is away."""

    def __repr__(self) -> str:
        """All settings, the secret ones hidden: logs and tracebacks may show it."""
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """(name, value) of every setting, the secret ones hidden."""
        values = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [
            (name, "(hidden)" if value and name in SECRETS else value) for name, value in values
        ]

    @property
    def bundles(self) -> Path:
        """The folder of the generation bundles."""
        return Path(self.bundle_dir) if self.bundle_dir else Path(self.data_dir) / "generations"

    @property
    def kind_weights(self) -> dict[str, float]:
        """How much each kind of event counts; a dislike counts nothing, it excludes."""
        weights = {kind: getattr(self, f"weight_{kind}") for kind in WEIGHED_KINDS}
        return weights | {"dislike": 0.0}

    @property
    def filter_text_names(self) -> frozenset[str]:
        """Names of the attributes whose texts requests may filter on."""
        names = (in_form(name, self.id_form) for name in worker.names_of(self.filter_texts))
        return frozenset(names) - {""}

    @property
    def recall_path_names(self) -> list[str]:
        """The names of the setting `recall_paths`, in their order."""
        return worker.names_of(self.recall_paths)

    @property
    def kept_co_visit_items(self) -> int:
        """With how many older items ingest counts a click in co-visitation rows; 0: no rows."""
        return self.co_visit_items if self._keeps(worker.OF_CO_VISITS) else 0

    @property
    def keeps_event_sums(self) -> bool:
        """Whether ingest keeps the popularity that later events decay."""
        return self._keeps(worker.OF_EVENT_SUMS)

    def _keeps(self, paths: frozenset[str]) -> bool:
        """Whether ingest keeps the state of these recall paths."""
        return self.path_state == "all" or not paths.isdisjoint(self.recall_path_names)

    @property
    def fusion_weight_of(self) -> dict[str, float]:
        """Path -> weight, for the paths that `fusion_weights` names. Raises SettingsError."""
        return worker.weights_of(self.fusion_weights)

    @property
    def answer_limit_of(self) -> dict[str, int]:
        """Attribute -> most items of each value, of `answer_limits`. Raises SettingsError."""
        limits = answers.limits_of(self.answer_limits)
        return {in_form(name, self.id_form): most for name, most in limits.items()}

    @property
    def seen_kinds(self) -> dict[str, float]:
        """Kind -> seconds, for the kinds that `seen_policy` names. Raises SettingsError."""
        return worker.seen_kinds_of(self.seen_policy)

    @property
    def snapshots(self) -> Path:
        """Folder of the query workers' snapshots."""
        return Path(self.data_dir) / "snapshots"

    @property
    def key_prefix(self) -> str:
        """The beginning of every key in Redis: `<namespace>:`, or nothing."""
        return f"{self.namespace}:" if self.namespace else ""

    def has_own_topic(self, name: str) -> bool:
        """Whether `clicks`, `items` or `users` is read from another system's topic."""
        return name in _SOURCES and bool(getattr(self, f"{name}_topic"))

    def prefixed(self, name: str) -> str:
        """A topic, group or transactional id inside the namespace; own topics keep their name."""
        if self.has_own_topic(name):
            return str(getattr(self, f"{name}_topic"))
        return f"{self.namespace}.{name}" if self.namespace else name


def load(environ: Mapping[str, str] | None = None, *, folder: Path | None = None) -> Settings:
    """The settings of this process. Raises SettingsError, which names key, value and source.

    environ: default: the environment of the process
    folder:  holds `eddyline.toml`; default: the working directory
    """
    environ = os.environ if environ is None else environ
    values: dict[str, tuple[Any, str]] = {}
    for key, value, source in (*_from_file(environ, folder or Path()), *_from_environment(environ)):
        values[key] = (value, source)
    hints = get_type_hints(Settings, include_extras=True)
    checked: dict[str, Any] = {}
    for key, (value, source) in values.items():
        if key not in hints:
            raise SettingsError(
                f"{source}: there is no setting {key!r}; the settings are in docs/configuration.md"
            )
        try:
            checked[key] = msgspec.convert(
                value, hints[key], strict=not source.startswith("environment")
            )
        except msgspec.ValidationError as error:
            shown = "(hidden)" if key in SECRETS else repr(value)
            raise SettingsError(f"{source}: {key} = {shown}: {error}") from None
    made = Settings(**checked)
    kafka.check(made)
    ingest.check(made)
    worker.check(made)
    answers.check(made)
    _check_erasures(made)
    _check_hosts(made)
    _check_maps(made)
    return made


def _check_hosts(settings: Settings) -> None:
    for name in ("worker_host", "coordinator_host", "metrics_host"):
        try:
            addresses.bare_host(getattr(settings, name))
        except ValueError as error:
            raise SettingsError(f"{name} = {getattr(settings, name)!r}: {error}") from None


def _check_maps(settings: Settings) -> None:
    """Raise SettingsError for a map that cannot be used."""
    named = {topic: name for topic in _SOURCES if (name := getattr(settings, f"{topic}_map"))}
    if named:
        from eddyline.schema.mapping import mapper, registry

        access = registry.access(settings) if settings.registry_url else None
        for topic, name in named.items():
            mapper.of(name, topic, access)


def _check_erasures(settings: Settings) -> None:
    """Raise SettingsError if Kafka keeps records of users for longer than their erasures are kept.

    A Redis that is emptied late, or a new archive, would read them after the user was forgotten.
    """
    for name in ("clicks_retention_h", "dead_letters_retention_h", "answers_retention_h"):
        days = -(-getattr(settings, name) // 24)
        if settings.forgotten_kept_d < days:
            raise SettingsError(
                f"forgotten_kept_d = {settings.forgotten_kept_d}: must be at least {days}, because "
                f"{name} = {getattr(settings, name)} keeps records of forgotten users for so long"
            )


def data_folder(settings: Settings) -> Path:
    """The data folder; makes it. Raises SettingsError if it cannot be written to."""
    folder = Path(settings.data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(
            f"data_dir = {settings.data_dir!r}: cannot be written to: {error.strerror}"
        ) from None
    return folder


def describe() -> Iterator[tuple[str, str, Any, str]]:
    """(name, type with its limits, default, what it does) of every setting, by section."""
    hints = get_type_hints(Settings, include_extras=True)
    texts: dict[str, str] = {}
    for section in (*_SECTIONS, Settings):
        texts |= descriptions(section)
    for info in msgspec.structs.fields(Settings):
        base, *metas = get_args(hints[info.name]) or (hints[info.name],)
        if isinstance(base, str):  # the values of a Literal
            base, metas = hints[info.name], []
        values = " | ".join(value or "empty" for value in get_args(base))
        limits = [f", {m.ge} … {m.le}" for m in metas if m.ge is not None]
        kind = (values or base.__name__) + "".join(limits)
        yield info.name, kind, info.default, texts[info.name]


def _from_file(environ: Mapping[str, str], folder: Path) -> Iterator[tuple[str, Any, str]]:
    named = environ.get("EDDYLINE_CONFIG")
    path = Path(named) if named else folder / "eddyline.toml"
    if not named and not path.exists():
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"EDDYLINE_CONFIG = {named!r}: cannot be read: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    for key, value in table.items():
        yield key, value, str(path)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, key in ALIASES.items():
        if environ.get(name):
            yield key, environ[name], f"environment variable {name}"
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            yield name.removeprefix(PREFIX).lower(), environ[name], f"environment variable {name}"
