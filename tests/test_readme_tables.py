"""The README's tables of methods and config groups follow from conf/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.tables import groups_table, methods_table, rewrite
from spo.config.groups import group_members
from spo.errors import UserError
from spo.resources import conf_dir
from tests.environments import ROOT

README = ROOT / "README.md"


def test_readme_is_up_to_date(tmp_path: Path) -> None:
    copy = Path(shutil.copy(README, tmp_path))
    subprocess.run([sys.executable, "-m", "docs.tables", str(copy)], check=True, cwd=ROOT)
    assert copy.read_text() == README.read_text(), "run: python -m docs.tables README.md"


def test_tables_have_every_method_and_member() -> None:
    text = README.read_text()
    for file in conf_dir().glob("method/*.yaml"):
        assert f"| `{file.stem}` | {yaml.safe_load(file.read_text())['title']} |" in text
    for group in group_members([conf_dir()]):
        assert f"| `{group}` |" in text
    assert "`common`" not in text


def test_new_method_adds_a_line(tmp_path: Path) -> None:
    conf = Path(shutil.copytree(conf_dir(), tmp_path / "conf"))
    (conf / "method" / "zz.yaml").write_text(
        "defaults:\n  - override /regularizer@_global_.regularizer: local_kl\n"
        "name: zz\ntitle: Mine\npaper: arXiv:1\ndefault_beta: 0.25\nloss:\n  _target_: spo.losses.SPOLoss\n"
    )
    before, after = methods_table(conf_dir()).splitlines(), methods_table(conf).splitlines()
    link = "[arXiv:1](https://arxiv.org/abs/1)"
    row = f"| `zz` | Mine | {link} | pairs, alpha, `regularizer=local_kl` |  | 0.25 |"
    assert after[1:] == [*before[1:], "| **other** | | | | | |", row]
    number = len(list(conf_dir().glob("method/*.yaml")))
    assert (before[0].split()[0], after[0].split()[0]) == (str(number), str(number + 1))
    assert "`zz`" in next(line for line in groups_table(conf).splitlines() if line.startswith("| `method` |"))


@pytest.mark.parametrize("before", ["", "an old one\n"])
def test_tables_are_written_between_their_markers(before: str) -> None:
    parts = {"methods": methods_table(conf_dir()), "groups": groups_table(conf_dir())}
    marked = "x\n" + "".join(f"<!-- {name} -->\n{before}<!-- /{name} -->\ny\n" for name in parts)
    once = rewrite(marked, conf_dir())
    expected = "x\n" + "".join(f"<!-- {name} -->\n{table}\n<!-- /{name} -->\ny\n" for name, table in parts.items())
    assert once == expected == rewrite(once, conf_dir())
    with pytest.raises(UserError, match="<!-- groups --> and <!-- /groups -->"):
        rewrite(marked.partition("<!-- groups")[0], conf_dir())
