"""The Lua scripts of `stores.redis`, and the commands that each of them runs.

Redis does not undo what a script wrote before it failed. So every script compares the fence, checks
the user's rights, reads every key whose type or value could be wrong, writes, and moves the fence
last (`append_co_visits` takes back what it wrote instead). A write that failed left nothing, and
succeeds once the cause is gone. Redis looks at `maxmemory` before the first write only, so a script
that has begun to write runs to its end.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

# Each script with its heads. The last two move no fence: they remove what has no effect on any
# later write.
_HEADS = {
    "write_users": ("users_fence", "fence"),
    "write_profiles": ("fence",),
    "count_clicks": ("fence",),
    "append_co_visits": ("fence",),
    "write_item_metadata": ("fence",),
    "remove_idle_users": (),
    "remove_deleted_items": (),
}
NAMES = tuple(_HEADS)
_CALL = re.compile(r"redis\.p?call\('([A-Z]+)'")
# ARGV[1]: a key that may be written, then commands. Returns those that this user may not run.
DENIED = """
local denied = {}
for i = 2, #ARGV do
  if redis.acl_check_cmd and not redis.acl_check_cmd(ARGV[i], ARGV[1]) then
    denied[#denied + 1] = ARGV[i]
  end
end
return denied
"""
# Redis before 7.0 has no `acl_check_cmd`: there a missing right shows at the first write only.
_RIGHTS = """
for _, command in ipairs({{{commands}}}) do
  if redis.acl_check_cmd and not redis.acl_check_cmd(command, KEYS[1]) then
    return redis.error_reply("NOPERM this user has no permissions to run the '" .. command
      .. "' command, which a write needs")
  end
end
"""


@lru_cache
def text(name: str) -> str:
    """A script with its heads."""
    fences, body = "".join(map(_read, _HEADS[name])), _read(name)
    return fences + _RIGHTS.format(commands=_quoted(_CALL.findall(fences + body))) + body


@lru_cache
def commands(name: str) -> frozenset[str]:
    """The commands that a script runs, in lower case."""
    return frozenset(command.lower() for command in _CALL.findall(text(name)))


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name.lower()}'" for name in sorted(set(names)))


def _read(name: str) -> str:
    return (files("eddyline.stores") / "scripts" / f"{name}.lua").read_text(encoding="utf-8")
