"""``spo methods``: the table and the page of each method, and the words that its yaml file and its loss state."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from docs.hooks import method_pages
from spo import cli
from spo.config.comments import comments_of
from spo.config.compose import compose
from spo.config.groups import METHOD_GROUPS, config_folders, group_members
from spo.config.nodes import locate
from spo.losses import (
    Column,
    Drawn,
    Feature,
    ListLoss,
    Loss,
    Mismatched,
    MixLoss,
    PreferenceLoss,
    Role,
    SelfSupervisedPOLoss,
    Term,
)
from spo.losses.dpo import DPOLoss
from spo.pages.formulas import as_text, formulas_of
from spo.pages.methods import MethodFacts, markdown_table, method_page, methods_table
from spo.resources import conf_dir
from spo.runs.identity import identity
from spo.stages.methods import arguments_of, facts_of, read_methods
from spo.types import PairLogps
from tests.environments import ROOT

CHECKED_BY = ("official code", "TRL", "second implementation", "reconstruction")
NAMES = group_members([conf_dir()])["method"]


@pytest.fixture(scope="module")
def shipped() -> Mapping[str, MethodFacts]:
    return {method.name: method for method in read_methods(config_folders(None), verify=True)}


def printed(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_method_describes_itself(name: str, shipped: Mapping[str, MethodFacts]) -> None:
    node = yaml.safe_load((conf_dir() / "method" / f"{name}.yaml").read_text())
    method = shipped[name]
    assert node["group"] == method.group and node["group"] in METHOD_GROUPS
    assert (method.changes, method.use_when, method.checked) == (node["changes"], node["use_when"], node["checked"])
    for words in (node["changes"], node["use_when"]):
        assert 10 < len(words) <= 120 and not words.endswith(".") and "\n" not in words
    assert re.match(f"({'|'.join(CHECKED_BY)}): ..", node["checked"])


@pytest.mark.parametrize("name", NAMES)
def test_docstring_states_paper_and_equation(name: str, shipped: Mapping[str, MethodFacts]) -> None:
    method = shipped[name]
    docstring = inspect.cleandoc(locate(method.loss).__doc__)
    assert method.formula and "L" in method.formula[0]
    assert "arXiv:" in docstring or not method.paper
    assert ("reconstruction" in docstring) >= (method.checked_by == "reconstruction")


@pytest.mark.parametrize("name", NAMES)
def test_page_has_about_ten_lines_and_every_key(name: str, shipped: Mapping[str, MethodFacts]) -> None:
    lines = printed(method_page(shipped[name]), 100)
    text = " ".join(" ".join(lines).split())
    node = yaml.safe_load((conf_dir() / "method" / f"{name}.yaml").read_text())
    for key in node["loss"].keys() - {"_target_"}:
        assert f"method.loss.{key}=" in text
    assert len(lines) <= 11 + 2 * len(shipped[name].keys)
    assert lines[0].startswith(f"{name}: {node['title']}"[:100])
    for words in (node["changes"], node["use_when"], node["checked"], node["paper"], shipped[name].verified):
        assert str(words) in text
    assert not set(text) & set("\\`$") - {"`"} and text.isascii()


def test_readme_shows_every_method_under_its_heading(shipped: Mapping[str, MethodFacts]) -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    group, found = "", {}
    for line in table.splitlines():
        if heading := re.match(r"\| \*\*([^*]+)\*\* \| \|", line):
            group = heading[1]
        elif row := re.match(r"\| `(\w+)` \|", line):
            found[row[1]] = (group, "**reconstruction**" in line)
    assert found == {name: (one.group, one.checked_by == "reconstruction") for name, one in shipped.items()}


def test_site_has_a_section_for_every_method(shipped: Mapping[str, MethodFacts]) -> None:
    pytest.importorskip("latex2mathml")
    pages = method_pages([*shipped.values()])
    assert len(pages) == len({method.group for method in shipped.values()})
    for method in shipped.values():
        section = pages[method.group.replace(" ", "-")].partition(f"{{#{method.name}}}\n")[2].partition("\n## ")[0]
        assert "<math" in section and all(f"| `{key.name}` | `{key.default}` |" in section for key in method.keys)
        assert f"spo.losses.md#{method.loss}" in section


def test_tables_have_each_method_once_at_any_width(shipped: Mapping[str, MethodFacts]) -> None:
    methods = [*shipped.values()]
    for width in (80, 110, 160):
        lines = printed(methods_table(methods, width), width)
        first = [line.split(" ")[0] for line in lines if line and not line.startswith(" ")]
        assert [word for word in first if word in shipped] == [*shipped]
        assert max(map(len, lines)) <= width
        assert [line for line in lines if line.rstrip() in METHOD_GROUPS] == [
            group for group in METHOD_GROUPS if any(method.group == group for method in methods)
        ]
    assert "| `dpo` | Direct Preference Optimization | [arXiv:2305.18290](https" in markdown_table(methods)


# --- command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (["--data", "ranked"], lambda loss: issubclass(loss, ListLoss)),
        (["--data", "unpaired"], lambda loss: loss.inputs.__name__ == "LabelledLogps"),
        (["--data", "pairs", "--no-reference"], lambda loss: issubclass(loss, PreferenceLoss)),
    ],
)
def test_filters(words: list[str], fits: Any, tmp_path: Path, shipped: Mapping[str, MethodFacts]) -> None:
    assert cli.main(["methods", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    kind, free = words[1], "--no-reference" in words
    assert [*found] == [
        name for name, one in shipped.items() if one.data == kind and not (free and "reference" in one.needs)
    ]
    assert all(fits(locate(row["loss"])) or row["name"] == "mix" for row in found.values())
    assert not (free and {"dpo", "tdpo1", "bapo", "mrpo"} & found.keys()) and (not free or "spo" in found)


def test_methods_of_config_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "method"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "defaults:\n  - dpo\n  - override /reference@_global_.reference: cached\n\n"
        "title: Mine\ndefault_beta: 0.5\nloss:\n  label_smoothing: 0.25 # a quarter\n"
    )
    assert cli.main(["methods", "mine", "--config-dir", str(tmp_path), "--json", str(tmp_path / "x.json")]) == 0
    text = capsys.readouterr().out
    assert "beta=0.5" in text and "method.loss.label_smoothing=0.25  a quarter" in text
    (row,) = json.loads((tmp_path / "x.json").read_text())
    # Words on another method are not those on this one.
    assert (row["title"], row["group"], row["checked"], row["paper"]) == ("Mine", "other", "", "arXiv:2305.18290")
    assert row["needs"] == ["beta", "reference", "reference=cached"]
    assert cli.main(["methods", "--config-dir", str(tmp_path)]) == 0
    assert re.search(r"\nother *\nmine ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["dpoo"], 1, "there is no method dpoo; did you mean dpo?"),
        (["q"], 1, "there is no method q; spo methods lists them"),
        (["--data", "triples"], 2, "invalid choice: 'triples'"),
        (["dpo", "--no-reference"], 2, "name a method, or filter the table"),
        (["--config-dir", "nowhere"], 1, "--config-dir nowhere: there is no such folder"),
        (["--json", "nowhere/x.json"], 1, "--json nowhere/x.json: there is no folder"),
    ],
)
def test_wrong_command_lines(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", *words]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: Mine\n", "mine.yaml: method.loss._target_ does not name the class of a loss"),
        ("loss: {_target_: spo.losses.DPOLos}\n", "mine.yaml: method.loss: there is no spo.losses.DPOLos; did you"),
        ("loss: [\n", "mine.yaml cannot be read"),
        ("defaults: [nothing]\n", "names nothing, and there is no such method"),
    ],
)
def test_unreadable_methods(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text)
    assert cli.main(["methods", "--config-dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


# --- facts ---------------------------------------------------------------------------------------------------------


class Hungry(PreferenceLoss):
    """A loss that declares everything.

    Args:
        names: Names of
            references, in order. They are loaded.
    """

    uses_alpha = True
    uses_reference = False
    full_batch = True
    terms: Mapping[str, Term] = {"kl": Term(lambda scored: scored.policy_tokens, needs_reference_logits=True)}
    features: Mapping[str, Feature] = {"a": Feature("a"), "b": Feature("b", default=0.0), "c": Feature("c", each=True)}
    extra_completions: Mapping[str, Role] = {"x": Column("anchor"), "y": Drawn(), "z": Mismatched()}

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @property
    def extra_references(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the names."""
        return tuple(self.names)

    def update_statistics(self, logps: PairLogps) -> None:
        """Do nothing."""

    def fit_width(self, width: int) -> None:
        """Do nothing."""


def test_needs_follow_from_declarations(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    file, folders = tmp_path / "method" / "hungry.yaml", config_folders(tmp_path)
    needs = [
        "alpha", "beta", "token-level terms of policy and reference", "column a", "column b (optional)",
        "columns chosen_c and rejected_c", "column anchor", "completions drawn from the reference",
        "completions of other prompts", "further references p, q", "whole batch", "running statistics",
        "a head on hidden states of the policy",
    ]  # fmt: skip
    file.write_text(f"loss: {{_target_: {__name__}.Hungry, names: [p, q]}}\n")
    method = facts_of("hungry", folders)
    assert [*method.needs] == needs and method.reads_reference and method.verified is None
    assert [(key.name, key.default, key.comment) for key in method.keys] == [
        ("method.loss.names", "[p, q]", "Names of references, in order")
    ]
    # Without a value that the command line has to give, the class itself is read.
    file.write_text(f"loss: {{_target_: {__name__}.Hungry, names: '???'}}\n")
    needs.remove("further references p, q")
    assert [*facts_of("hungry", folders, verify=True).needs] == needs


def test_a_sum_has_a_head_if_a_part_has_one(shipped: Mapping[str, MethodFacts]) -> None:
    head = "a head on hidden states of the policy"
    assert head in shipped["self_supervised_po"].needs and head not in shipped["mix"].needs
    parts: dict[str, Any] = {"dpo": DPOLoss(), "degree": SelfSupervisedPOLoss()}
    assert MixLoss(parts, {"dpo": 1.0, "degree": 1.0}).has_width
    assert not MixLoss({"dpo": DPOLoss()}, {"dpo": 1.0}).has_width


def test_words_do_not_change_the_identity_of_a_run(tmp_path: Path) -> None:
    cfg = compose(["method=dpo"], run_dir=tmp_path)
    before = identity(cfg)
    for key in ("group", "changes", "use_when", "checked"):
        assert cfg.method[key]
        cfg.method[key] = "other"
    assert identity(cfg) == before
    cfg.method.loss.label_smoothing = 0.1
    assert identity(cfg) != before


def test_arguments_and_comments_are_read() -> None:
    assert arguments_of(DPOLoss) == {"label_smoothing": "Assumed share epsilon of flipped labels, in [0, 0.5)"}
    assert arguments_of(Loss) == {}
    text = "a: 1 # first\nloss: # of all\n  b: 2\n  # above\n  c: {d: 1} # behind\n"
    assert comments_of(text) == {"a": "first", "loss": "of all", "loss.c": "behind"} | {"loss.c.d": "behind"}


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\frac{1}{2\tau}", "1/(2 tau)"),
        (r"-\frac{1}{\alpha} \log\sigma(\alpha d)", "-(1/alpha) log sigma(alpha d)"),
        (r"\log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}", "log(pi(y_w|x)/pi_ref(y_w|x))"),
        (r"\left(h - \frac12\right)^2", "(h - 1/2)^2"),
        (r"\frac{a + b}{c d} e", "((a + b)/(c d)) e"),
        (r"\sum_{k=1}^{n-1} \hat{x}_k^2", "sum_(k=1)^(n-1) x_hat_k^2"),
        (r"\begin{cases} a & \text{if } b \\ c & \text{else} \end{cases}", "{a if b; c else}"),
        (r"\lVert a\rVert \le \infty,\quad b\cdot\sqrt{2}", "||a|| <= infinity,  b*sqrt(2)"),
        (r"|y_w| \mathrm{sg}[u]", "|y_w| sg[u]"),
    ],
)
def test_formulas_as_text(latex: str, text: str) -> None:
    assert as_text(latex) == text


def test_formulas_are_found() -> None:
    assert formulas_of("A.\n\n.. math:: a\n          b\n\nwhere\n\n.. math::\n\n    c\n\nd :math:`e`") == ["a b", "c"]
    assert formulas_of("A :math:`b` and :math:`c`.") == ["b", "c"] and formulas_of("A.") == []
