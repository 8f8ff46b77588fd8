"""Style that can be counted: sizes, names, docstrings, leftovers, and docs that keep up with the
code.
"""

import ast
import gc
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from eddyline.settings.loader import describe

ROOT = Path(__file__).parents[1]
ROOMS = ("eddyline", "streams", "embeddings", "index", "serving", "sandbox", "evaluation", "cli")
# A file has one idea; what is one idea need not be cut in two for its size.
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
FORMATTER_SKIPS = 10
# A longer one is listed here with the reason; the list is meant to stay empty.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
# Put together, so that this file does not hold the words it looks for.
LEFTOVERS = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")))
NAMES = re.compile(r"(^|_)(utils?|commons?|helpers?|misc|v\d+)(_|$)")
# A version in the name of a package that a protocol promises to keep is no second try at the same
# thing.
NAMED_BY_PROTOCOL = ("serving/proto/",)
# A user is "the user" or "they", and what is named here has the name of its field instead.
BANNED_WORDS = frozenset(
    "he him himself his she whoever whomever draft drafts gathered haul hauls knock knocked knocks "
    "lane lanes patience politely remembered resend resends unproven".split()
)
BANNED_NAMES = re.compile(
    r"\b(Answering|OfShard|click_chunks|cluster_map|give_way|item_cards|moved_elsewhere|sent_on)\b"
)
# What has happened is told in the words of its time.
HISTORY = ("CHANGELOG.md", "LOG.md")
COLUMNS_MAX = 100
# Neither a link nor what a linter reads at the end of a line can be wrapped.
LONG_PARTS = re.compile(r"https?://\S+|  # (type: ignore|noqa).*")
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:home|root|work|Users|tmp)/\w")
# People read what these print; everything else logs.
MAY_PRINT = ("benchmarks/", "examples/", "bootstrap.py")
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".lua", ".proto", ".lock", ".sh", ""}


@cache
def files() -> tuple[Path, ...]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip("not in a git checkout")
    return tuple(
        path for name in sorted(set(done.stdout.splitlines())) if (path := ROOT / name).is_file()
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    """Written Python files; generated ones are left out."""
    return [
        path
        for path in files()
        if path.suffix == ".py"
        and "_pb2" not in path.name
        and (not folders or name_of(path).startswith(folders))
    ]


@cache
def tree(path: Path) -> ast.Module:
    gc.disable()  # it would look at all trees again and again, for most of the time of a parse
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _trees_go() -> Iterator[None]:
    """Millions of nodes would make every later collection of this process slow."""
    yield
    tree.cache_clear()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_files_are_short() -> None:
    long = {name_of(p): n for p in python_files(*ROOMS) if (n := len(lines(p))) > FILE_LINES_MAX}
    assert {name: n for name, n in long.items() if name not in LONG_FILES} == {}
    assert sorted(LONG_FILES) == sorted(long), "a file that became short leaves the list"


def test_functions_are_short() -> None:
    long = {
        f"{name_of(path)}:{node.name}": length
        for path in python_files()
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert {name: n for name, n in long.items() if name not in LONG_FUNCTIONS} == {}
    assert sorted(LONG_FUNCTIONS) == sorted(long), "a function that became short leaves the list"


def test_names_say_what_a_thing_is() -> None:
    bad = [
        name
        for name in map(name_of, files())
        if not name.startswith(NAMED_BY_PROTOCOL)
        and any(NAMES.search(part.split(".")[0]) for part in name.split("/"))
    ]
    assert bad == []


def names_no_encoding(call: ast.Call) -> bool:
    """Whether the call opens a file as text and leaves the encoding to the machine's locale."""
    modes_given = [word.value for word in call.keywords if word.arg == "mode"]
    function, arguments = call.func, [*call.args, *modes_given]
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < ("read_text", "write_text").index(name) + 1
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    values = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
    modes = [v for v in values if isinstance(v, str) and re.fullmatch("[rwaxbt+]{1,3}", v)]
    # A method `open` without a mode may belong to anything.
    return not any("b" in mode for mode in modes) if modes else isinstance(function, ast.Name)


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and names_no_encoding(node)
    ]
    assert found == []


def test_the_formatter_lays_out_nearly_everything() -> None:
    mark = "# fmt: " + "skip"
    found = [
        f"{name_of(path)}:{number}"
        for path in python_files()
        for number, line in enumerate(lines(path), 1)
        if mark in line
    ]
    assert len(found) < FORMATTER_SKIPS, found


def test_nothing_is_left_for_later() -> None:
    found = [
        f"{name_of(path)}:{number}"
        for path in files()
        if path.suffix in TEXT and path.name != "LICENSE" and path.suffix != ".lock"
        for number, line in enumerate(lines(path), 1)
        if LEFTOVERS.search(line)
    ]
    assert found == []


def test_no_stub_is_shipped() -> None:
    stub = "Not" + "ImplementedError"
    assert [
        name_of(path) for path in python_files() if stub in path.read_text(encoding="utf-8")
    ] == []


def test_every_module_says_what_it_is() -> None:
    bare = [
        name_of(path)
        for path in python_files()
        if path.stat().st_size and ast.get_docstring(tree(path)) is None
    ]
    assert bare == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in python_files("tests/") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
    folders = {
        name_of(path).split("/")[1]
        for path in python_files("tests/")
        if name_of(path).count("/") > 1
    }
    assert folders <= {
        "unit",
        "contract",
        "mutations",
        "simulation",
        "integration",
        "cdc",
        "chaos",
        "containers",
        "model",
        "fuzz",
    }


def test_no_path_of_one_machine() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:60]}"
        for path in files()
        if path.suffix in TEXT and path.suffix != ".lock" and path != Path(__file__)
        for number, line in enumerate(lines(path), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def prose() -> Iterator[tuple[Path, int, str]]:
    """(file, line number, line) of everything that people wrote, this file left out."""
    for path in files():
        written = path.suffix in TEXT and path.suffix != ".lock" and "_pb2" not in path.name
        if written and path.name not in ("LICENSE", *HISTORY) and path != Path(__file__):
            for number, line in enumerate(lines(path), 1):
                yield path, number, line


def test_the_words_are_those_of_the_field() -> None:
    found = []
    for path, number, line in prose():
        line = line.replace("Draft201909Validator", "")  # jsonschema's
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", line)}
        bad = sorted(words & BANNED_WORDS) + BANNED_NAMES.findall(line)
        found += [f"{name_of(path)}:{number}: {word}" for word in bad]
    assert found == [], "\n".join(found)


def test_lines_fit() -> None:
    """Tables and code cannot be wrapped in a page."""
    found, fenced = [], False
    for path, number, line in prose():
        page = path.suffix == ".md"
        fenced = page and fenced != line.lstrip().startswith("```")
        unwrapped = page and (fenced or line.startswith("|"))
        if len(LONG_PARTS.sub("", line)) > COLUMNS_MAX and not unwrapped:
            found.append(f"{name_of(path)}:{number}")
    assert found == [], "\n".join(found)


def test_only_what_people_read_is_printed() -> None:
    found = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        if name_of(path).startswith(MAY_PRINT) or "print" not in text:
            continue
        tokens = list(tokenize.generate_tokens(StringIO(text).readline))
        for before, token, after in zip([None, *tokens], tokens, tokens[1:], strict=False):
            called = token.type == tokenize.NAME and token.string == "print" and after.string == "("
            if called and (before is None or before.string != "."):
                found.append(f"{name_of(path)}:{token.start[0]}")
    assert found == []


def test_the_docs_name_every_setting() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name, *_ in describe() if f"| `{name}` |" not in page] == []


def test_links_between_the_docs_lead_somewhere() -> None:
    broken = []
    for path in files():
        if path.suffix == ".md":
            links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
            near = [link for link in links if "://" not in link and not link.startswith("mailto:")]
            broken += [
                f"{name_of(path)}: {link}" for link in near if not (path.parent / link).exists()
            ]
    assert broken == []


def test_tests_that_the_docs_name_are_there() -> None:
    """`file`: `function`, as docs/testing.md names them."""
    named = re.compile(r"`(test_\w+)`: `(test_\w+)`")
    code = {path.stem: path for path in python_files("tests/") if path.name.startswith("test_")}
    found = [
        f"{name_of(page)}: {file}: {function}"
        for page in files()
        if page.suffix == ".md"
        for file, function in named.findall(page.read_text(encoding="utf-8"))
        if file not in code or f"def {function}(" not in code[file].read_text(encoding="utf-8")
    ]
    assert found == [], "\n".join(found)
