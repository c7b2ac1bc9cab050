"""README and docs: every block of Python runs, prints what the page shows, and every link leads somewhere.

The blocks of a page run from top to bottom in one namespace. A block that is fenced as `output` shows what
the block before it prints; a block without one prints nothing. Commands of dynquant run too: a block that is
fenced as `console` shows what they print. The text has to be the same. A number with a
decimal point may differ by one in its last digit: the last bits of NumPy's products depend on the BLAS.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
from decimal import Decimal
from pathlib import Path

import pytest

from dynquant import cli

ROOT = Path(__file__).parent.parent
GUIDE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")] + GUIDE
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")

# Pages that need a package of an extra.
EXTRAS = {
    "command_line": "safetensors",
    "dask": "dask.array",
    "models": "safetensors",
    "pytorch": "torch",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def examples(text):
    """(line, code, what it prints) of every block of Python."""
    blocks = [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in FENCE.finditer(text)]
    pairs = itertools.zip_longest(blocks, blocks[1:], fillvalue=("", "", 0))
    return [
        (line, code, follower[1] if follower[0] == "output" else "")
        for (language, code, line), follower in pairs
        if language == "python" or (language == "console" and code.startswith("$ dynquant "))
    ]


def parts_of(block):
    """The commands of a block, and what they print: its other lines."""
    lines = block.splitlines(keepends=True)
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, "".join(line for line in lines if not line.startswith("$ "))


def prose(page):
    """The text of a page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def agree(shown, printed):
    """Whether the texts are the same, but for one unit in the last digit of decimal numbers."""
    if DECIMAL.sub("#", shown) != DECIMAL.sub("#", printed):
        return False
    pairs = zip(map(Decimal, DECIMAL.findall(shown)), map(Decimal, DECIMAL.findall(printed)), strict=True)
    return all(unit(a) == unit(b) and abs(a - b) <= unit(a) for a, b in pairs)


def unit(number):
    """One in its last digit."""
    return Decimal(1).scaleb(number.as_tuple().exponent)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("3 rows, 1.25 dB", "3 rows, 1.26 dB", True),
        ("3 rows, 1.25 dB", "3 rows, 1.27 dB", False),
        ("3 rows, 1.25 dB", "4 rows, 1.25 dB", False),
        ("1.2", "1.20", False),
        ("-0.5", "0.5", False),
        ("[1.0, 2.0]", "[1.0]", False),
    ],
)
def test_comparison_of_outputs(shown, printed, same):
    assert agree(shown, printed) == same


@each_page
def test_code_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    if page.stem in EXTRAS:
        pytest.importorskip(EXTRAS[page.stem])
    data = tmp_path / "bench" / "data"
    data.mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "data" / "minilm_ffn.npz", data)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for line, code, shown in examples(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines in front, so that a traceback names the line of the page.
            if code.startswith("$ "):
                commands, shown = parts_of(code)
                for command in commands:
                    assert cli.main(shlex.split(command.removeprefix("dynquant "))) == 0, command
            else:
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
        found = printed.getvalue()
        assert agree(shown, found), f"{page}:{line} prints\n{found}\nand shows\n{shown}"


@each_page
def test_code_fits_the_page(page):
    """84 characters: on a window of 1,400 pixels nobody has to scroll sideways."""
    blocks = [code for _, code, _ in examples(page.read_text(encoding="utf-8"))]
    code = [block for block in blocks if not block.startswith("$ ")]
    assert not [line for line in "".join(code).splitlines() if len(line) > 84]


@each_page
def test_links_lead_to_files(page):
    links = [link for link in LINK.findall(prose(page)) if "://" not in link]
    missing = [link for link in links if not os.path.exists(page.parent / link)]
    assert not missing


@each_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:`|\$ )make ([a-z0-9-]+)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(targets)


def names_in_the_reference():
    """Module -> the names that docs/reference.rst lists of it."""
    text = (ROOT / "docs" / "reference.rst").read_text(encoding="utf-8")
    names = {}
    for module, part in re.findall(
        r"^\.\. currentmodule:: (\S+)$(.*?)(?=^\.\. currentmodule|\Z)", text, re.M | re.S
    ):
        names.setdefault(module, []).extend(re.findall(r"^(?: {3}|\.\. data:: )(\w+)$", part, re.M))
    return names


@pytest.mark.parametrize("module", names_in_the_reference())
def test_reference_has_every_public_name(module):
    public = pytest.importorskip(module, exc_type=ImportError).__all__
    assert sorted(names_in_the_reference()[module]) == sorted(public)


def test_command_line_has_every_option():
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    (commands,) = [action for action in cli._parser()._actions if action.choices]
    for name, parser in commands.choices.items():
        assert f"dynquant {name}" in text
        for action in parser._actions:
            assert action.dest == "help" or any(o in text for o in action.option_strings or [action.metavar])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
