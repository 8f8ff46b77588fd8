"""The editorial rules that a process answers with: those of the file, read again as it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from eddyline.errors import SettingsError
from eddyline.process.periodic import Periodic
from serving.rules import editorial
from serving.rules.editorial import EditorialRules, Known, RulesRejected

log = logging.getLogger(__name__)

# How soon a changed file is noticed.
INTERVAL_S = 1.0
# A change of the file within the clock's resolution has another size or another file number.
_Stamp = tuple[int, int, int]


class CurrentRules:
    """The rules now. Thread rule: one thread takes, any thread calls.

    why: why the file's present content is not used; "" if it is
    """

    def __init__(self, rules: EditorialRules) -> None:
        self._rules = rules
        self.why = ""

    def __call__(self) -> EditorialRules:
        """The rules now."""
        return self._rules

    def take(self, rules: EditorialRules) -> None:
        """Use these rules from now on."""
        self._rules, self.why = rules, ""


class RulesWatch:
    """Reads the file of the rules as it changes. Thread rule: `start`, then `close`, once each.

    A file that cannot be used, or is gone, leaves the last rules in use.
    """

    def __init__(self, path: Path, known: Known) -> None:
        """Reads the file now. Raises SettingsError if it cannot be used."""
        self._path = path
        self._read: Callable[[], EditorialRules] = lambda: editorial.read(path, known)
        self._stamp = self._stamp_now()
        try:
            self.current = CurrentRules(self._read())
        except RulesRejected as error:
            raise SettingsError(f"rules_file = {str(path)!r}: {error}") from None
        self._looks = Periodic(
            "rules", self.look, INTERVAL_S, "the file of the editorial rules cannot be looked at"
        )

    def start(self) -> None:
        """Begin in the background."""
        self._looks.start()

    def close(self) -> None:
        """Stop looking."""
        self._looks.close()

    def look(self) -> None:
        """Read the file if it has changed."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        version = self.current().version
        try:
            rules = self._read()
        except RulesRejected as error:
            self.current.why = f"the rules of version {version!r} stay, {self._path}: {error}"
            log.warning("the editorial rules are not used", extra={"reason": self.current.why})
            return
        self.current.take(rules)
        log.info("editorial rules", extra={"version": rules.version, "rules": len(rules.rules)})

    def _stamp_now(self) -> _Stamp | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
