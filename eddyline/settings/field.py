"""How a setting is declared: `name: Annotated[type, within(low, high)] = default`, text below.

The text is a string literal on the next lines; docs/configuration.md is made of these texts.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

from msgspec import Meta


def within(low: float, high: float) -> Meta:
    """The limits of a number, both included."""
    return Meta(ge=low, le=high)


def descriptions(section: type[Any]) -> dict[str, str]:
    """Setting → the text below it in the source of its section, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
