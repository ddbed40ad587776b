"""Every fenced block of README, CONTRIBUTING and docs is executed, or at least parsed, as its tag says.

run
    Executed as printed.
run-tiny
    Executed with ``+debug=tiny`` appended to each command that composes a configuration.
compose
    Executed with ``--cfg job`` and one value for each seed appended, which keeps sweeps over seeds short.
loss
    A file with a loss: ``tests/test_loss_examples.py`` trains and validates with it, and compares its values.
parse
    Parsed only: commands that need a network, an account or a cluster, and files that a person writes. A file whose
    first line is a comment with its path is put into the folder of the blocks below it.
launch
    Executed by ``tests/test_launchers.py``, with torchrun and with programs that imitate SLURM.

Each block runs in its own folder, which contains these files, and a model, pairs and benchmarks if the text assumes
them.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from spo import cli
from tests.commands import enter
from tests.environments import ROOT, copy_of_project, fresh_environment, run
from tests.helpers import save_model
from tests.test_import_llama2c import SIZES, write_model, write_tokenizer

TAGS = ("run", "run-tiny", "compose", "loss", "launch", "parse")
MAX_PARSED_BLOCKS = 13
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_WIDTH = 100
"""Width at which the prose of the documentation wraps."""
COMMANDS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
"""Start of the command that runs a block of a language."""
EXTRA_ARGUMENTS = {"run": "", "run-tiny": " +debug=tiny", "compose": " --cfg job seed=1 data.seed=0"}
COMPOSING_COMMAND = re.compile(r"^spo (train|iterate|inspect)(?!.*--resume)\b[^#\n]*?(?=\s*(#|$))", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its language and tag after the fence, and its text."""

    document: Path
    line: int
    language: str
    tag: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.document)}:{self.line}"

    @property
    def script(self) -> str:
        """Return the text that a test executes."""
        if self.language == "python":
            return self.text.replace("compose([", 'compose(["+debug=tiny", ') if self.tag == "run-tiny" else self.text
        return COMPOSING_COMMAND.sub(lambda match: match[0] + EXTRA_ARGUMENTS[self.tag], self.text)

    @property
    def path(self) -> str | None:
        """Return the path in the first line of a file that is shown, or ``None``."""
        first = re.match(r"# (\S+/\S+\.(py|yaml))\n", self.text)
        return first[1] if first and self.language != "bash" else None


def name_of(document: Path) -> str:
    """Return the path of a document in the repository."""
    return document.relative_to(ROOT).as_posix() if document.is_relative_to(ROOT) else document.name


def blocks_of(document: Path, text: str) -> list[Block]:
    """Return the fenced blocks of a document."""
    found: list[Block] = []
    fence, lines = "", text.splitlines()
    for number, line in enumerate(lines, 1):
        opening = re.match(r"\s*(```+|~~~+)\s*(\S*)\s*(.*)$", line)
        if not fence and opening:
            fence, start = opening[1], number
            language, tag = opening[2], opening[3].strip()
        elif fence and line.strip() == fence:
            body = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(document, start, language, tag, body))
            fence = ""
    assert not fence, f"{document.name}:{start}: this block has no end"
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document, document.read_text())]


def tagged(*tags: str) -> Iterator[object]:
    """Yield the blocks with these tags as test parameters; those that execute something are slow."""
    for block in BLOCKS:
        if block.tag in tags:
            fast = block.tag in ("compose", "loss", "parse")
            yield pytest.param(block, id=str(block), marks=() if fast else pytest.mark.slow)


def prepare_folder(folder: Path, block: Block) -> None:
    """Create what the text assumes in a folder: files shown above the block, a model, files of pairs and lists."""
    for other in BLOCKS:
        if other.document == block.document and other.line < block.line and other.path is not None:
            file = folder / other.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(other.text)
    if "python benchmarks/" in block.text or "python -m benchmarks." in block.text:
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    if "examples/import_llama2c.py" in block.text:
        shutil.copytree(ROOT / "examples", folder / "examples")
        write_model(folder / "MODEL.bin", SIZES)
        write_tokenizer(folder / "TOKENIZER.bin")
    if "MODEL_DIR" in block.text:
        save_model(folder / "MODEL_DIR", max_position_embeddings=512)
    if "PAIRS.jsonl.gz" in block.text:
        rng = random.Random(0)
        with gzip.open(folder / "PAIRS.jsonl.gz", "wt") as file:
            for _ in range(64):
                prompt, chosen, rejected = (" ".join(f"w{rng.randint(3, 22)}" for _ in range(8)) for _ in range(3))
                file.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n")
    if "LISTS.jsonl.gz" in block.text:
        rng = random.Random(0)
        with gzip.open(folder / "LISTS.jsonl.gz", "wt") as file:
            for _ in range(64):
                prompt, *texts = (" ".join(f"w{rng.randint(3, 22)}" for _ in range(8)) for _ in range(5))
                responses = [f" {text}" for text in texts]
                file.write(json.dumps({"prompt": prompt, "responses": responses, "scores": [4, 1, 3, 2]}) + "\n")


def test_every_block_has_a_known_tag() -> None:
    assert [str(block) for block in BLOCKS if block.tag not in TAGS] == []
    runnable = [block for block in BLOCKS if block.tag not in ("loss", "parse")]
    assert [str(block) for block in runnable if block.language not in COMMANDS] == []
    assert len([block for block in BLOCKS if block.tag == "parse"]) <= MAX_PARSED_BLOCKS
    assert {block.tag for block in BLOCKS} == set(TAGS)


def test_blocks_are_found_and_completed_for_a_run() -> None:
    text = "a\n```bash run-tiny\nspo train a=1 -m  # why\nspo evaluate X\nspo train --resume X\nspo inspect\n```\n"
    (block,) = blocks_of(Path("x.md"), text)
    assert (block.line, block.language, block.tag) == (2, "bash", "run-tiny")
    assert block.script == (
        "spo train a=1 -m +debug=tiny  # why\nspo evaluate X\nspo train --resume X\nspo inspect +debug=tiny\n"
    )
    (untagged,) = blocks_of(Path("x.md"), "~~~\nx\n~~~\n")
    assert untagged.tag not in TAGS
    with pytest.raises(AssertionError, match=r"x.md:1: this block has no end"):
        blocks_of(Path("x.md"), "```bash run\n")


COMPOSED: set[tuple[str, ...]] = set()


def typed(block: Block, folder: Path) -> list[list[str]]:
    """Return the arguments of each ``spo`` of a block, as bash passes them."""
    recorder = 'spo() { printf "%s\\0" "$@"; printf "\\n"; }\n'
    lines = run(["bash", "-euo", "pipefail", "-c", recorder + block.script], folder).split("\0\n")
    assert lines.pop() == ""
    return [line.split("\0") for line in lines]


@pytest.mark.parametrize("block", tagged("compose"))
def test_commands_compose(
    block: Block,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare_folder(tmp_path, block)
    enter(tmp_path, cache_dir, monkeypatch)
    commands = typed(block, tmp_path)
    assert commands
    for words in commands:
        if tuple(words) in COMPOSED:  # another page shows the same command
            continue
        COMPOSED.add(tuple(words))
        assert cli.main(words) == 0
        assert yaml.safe_load(capsys.readouterr().out)["method"]["name"]


@pytest.mark.parametrize("block", tagged("run", "run-tiny"))
def test_commands_run(block: Block, tmp_path: Path, cache_dir: Path) -> None:
    folder, programs = tmp_path / "reader", None
    if "pip install" in block.text:
        programs = fresh_environment(tmp_path / "environment")
        copy_of_project(folder)
    else:
        folder.mkdir()
    prepare_folder(folder, block)
    command = [*COMMANDS[block.language], block.script]
    run(command, folder, programs, SPO_CACHE_DIR=str(cache_dir))
    if any(words in block.text for words in ("spo train", "spo iterate", "spo.train")):
        results = sorted((folder / "outputs").rglob("metrics.json"))
        assert results
        assert "eval/entropy" in json.loads(results[-1].read_text())


@pytest.mark.parametrize("block", tagged("parse"))
def test_other_blocks_parse(block: Block) -> None:
    if block.language == "bash":
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif block.language == "python":
        assert ast.parse(block.text).body
    else:
        assert block.language == "yaml"
        assert yaml.safe_load(block.text)


def test_readme_has_the_command_for_the_tests() -> None:
    pattern = re.search(r'grep -m 1 -x "(.*)" README.md', (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    lines = [line for block in BLOCKS for line in block.text.splitlines() if re.fullmatch(pattern[1], line)]
    assert lines == ["pip install -e '.[test]' -c constraints.txt && pytest"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_have_targets(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), f"{name_of(document)}: {target}"


def too_wide(text: str) -> list[str]:
    """Return the lines of prose that are too wide; tables, commands, and lines with a long link do not wrap."""
    prose = re.sub(r"^\s*(```|~~~).*?^\s*\1", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = (line for line in prose.splitlines() if not line.startswith(("|", "!", "    ")))
    return [line for line in lines if len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_WIDTH]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_prose_is_within_the_width(document: Path) -> None:
    assert too_wide(document.read_text()) == []


def test_too_wide_prose_is_detected() -> None:
    wide = "word " * MAX_WIDTH
    assert too_wide(f"a\n| {wide}|\n```bash run\n{wide}\n```\n[b]({'c' * MAX_WIDTH})\n") == []
    assert too_wide(f"a\n{wide}\n") == [wide]


def note_keys() -> set[str]:
    """Return the keys of all notes that the package writes."""
    from spo.data import findings, remarks

    keys = findings.SENTENCES.keys() | remarks.SENTENCES.keys()
    for file in (ROOT / "spo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("note", "note_once"):
                keys |= {arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and " " not in arg.value}
    return keys


def test_every_note_is_documented() -> None:
    text = "".join(file.read_text() for file in (ROOT / "docs" / "reference").glob("*.md"))
    assert len(note_keys()) > 30 and {key for key in note_keys() if f"{key}`" not in text} == set()
