"""Plugins: code outside the package belongs to a run, to cached results and to verdicts, and an edit is noticed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from spo.config.checks import problems
from spo.config.compose import compose
from spo.config.nodes import targets
from spo.errors import UserError
from spo.evaluation.judges.pairwise import PairwiseJudge
from spo.losses import DPOLoss
from spo.losses.base import LOSS_METRICS
from spo.records.digests import model_digest
from spo.records.plugins import LIBRARIES, plugin_digests, plugin_sources
from spo.runs.another_run import refuse_another_run
from spo.runs.claim import Status, claim, finish
from spo.runs.identity import differences, identity
from spo.runs.provenance import record_continuation
from spo.runs.resume import resumed_config
from spo.stages.from_config import data_key, model_plugins

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes a Python file into a folder on the path; its modules are forgotten afterwards."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)

    def write(name: str, content: str) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        importlib.invalidate_caches()
        return file

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def new_process() -> None:
    """Forget loaded plugins, as another process does not have them."""
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


# --- which files ---------------------------------------------------------------------------------------------------


def test_sources_are_the_module_or_package_and_what_it_imports(write: Write, tmp_path: Path) -> None:
    write("plug_a.py", "import json, torch, plug_b\nfrom plug_pack.deep import thing\nimport plug_missing\n")
    write("plug_b.py", "import plug_a\n")  # a cycle
    write("plug_pack/__init__.py", "from . import deep\n")
    write("plug_pack/deep/thing.py", "raise RuntimeError('must not be imported')\n")
    write("plug_space/inner/loss.py", "this is no Python")
    names = ["plug_a.Loss", "plug_space.inner.loss.Loss", "spo.losses.DPOLoss", "torch.optim.SGD", "builtins.dict"]
    found = plugin_sources(names)
    assert [*found] == ["plug_a", "plug_b", "plug_pack", "plug_space"]
    folder = tmp_path / "code"
    assert [source.path for source in found.values()] == [
        folder / "plug_a.py",
        folder / "plug_b.py",
        folder / "plug_pack",
        folder / "plug_space",
    ]
    assert not any(name.startswith("plug_") for name in sys.modules)
    for file, changed in (
        ("plug_a.py", "plug_a"),
        ("plug_b.py", "plug_b"),
        ("plug_pack/deep/thing.py", "plug_pack"),
        ("plug_space/inner/loss.py", "plug_space"),
    ):
        before = plugin_digests(names)
        write(file, (folder / file).read_text() + "# edited\n")
        after = plugin_digests(names)
        assert [name for name in before if before[name] != after[name]] == [changed]


def test_digest_does_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place in ("one", "two"):
        (tmp_path / place / "plug_c").mkdir(parents=True)
        (tmp_path / place / "plug_c" / "__init__.py").write_text("x = 1\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            digests.append(plugin_digests(["plug_c.x"]))
    assert digests[0] == digests[1] != {}


def test_installed_plugin_counts_where_it_is_named_and_not_where_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    (tmp_path / "site-packages").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    (tmp_path / "site-packages" / "plug_installed.py").write_text("x = 1\n")
    write("plug_d.py", "import plug_installed\n")
    assert [*plugin_sources(["plug_d.Loss"])] == ["plug_d"]
    assert [*plugin_sources(["plug_installed.Loss"])] == ["plug_installed"]


def test_loaded_code_keeps_its_digest_until_it_is_loaded_again(write: Write) -> None:
    write("plug_e.py", "x = 1\n")
    module = importlib.import_module("plug_e")
    first = plugin_digests(["plug_e.x"])
    write("plug_e.py", "x = 22\n")
    assert plugin_digests(["plug_e.x"]) == first  # as it runs
    importlib.reload(module)
    assert plugin_digests(["plug_e.x"]) != first and module.x == 22


def test_module_without_files_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plug_made_up", type(sys)("plug_made_up"))
    assert plugin_sources(["plug_made_up.Loss", "__main__.Loss", "plug_nowhere.Loss"]).keys() <= {"__main__"}


@pytest.mark.parametrize(
    "words", [(), ("strategy=fsdp", "trainer.devices=2"), ("logger=csv",), ("model=hf_lora", "model.path=x")]
)
def test_shipped_configuration_does_not_name_plugins(words: tuple[str, ...], tmp_path: Path) -> None:
    found = targets(compose(words, run_dir=tmp_path))
    assert {target.partition(".")[0] for target in found.values()} <= LIBRARIES
    assert identity(compose(words, run_dir=tmp_path))["plugins"] == {}


# --- runs ----------------------------------------------------------------------------------------------------------


def config(run_dir: Path, *words: str) -> DictConfig:
    return compose(["++method.loss._target_=plug_loss.MyLoss", *words], run_dir=run_dir)


def test_edited_loss_makes_it_another_run(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("plug_loss.py", "import plug_parts\nclass MyLoss: ...\n")
    file = write("plug_parts.py", "weight = 1\n")
    run_dir = tmp_path / "run"
    cfg = config(run_dir)
    with claim(run_dir, cfg) as status:
        assert status is Status.NEW
    first = plugin_digests(["plug_parts"])["plug_parts"]
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert provenance["plugins"]["plug_parts"] == {"path": str(file), "sha256": first}
    assert json.loads((run_dir / "identity.json").read_text())["plugins"].keys() == {"plug_loss", "plug_parts"}
    with claim(run_dir, cfg) as status:
        assert status is Status.UNFINISHED

    write("plug_parts.py", "weight = 2\n")
    new_process()
    words = r"(?s)  - the code of plug_parts, which the configuration names, has changed\n.*rerun=true"
    unfinished = rf"{words}.*; spo train --resume {run_dir} continues it with the code as it is now$"
    for refuse in (lambda: refuse_another_run(run_dir, cfg), lambda: claim(run_dir, cfg).__enter__()):
        with pytest.raises(UserError, match=unfinished):
            refuse()
    for step in (3, 4):
        with claim(run_dir, cfg, resumed=True) as status:
            assert status is Status.UNFINISHED
            record_continuation(run_dir, cfg, step)
    assert capsys.readouterr().err.count("note: the code of plug_parts has changed; this run continues at step 3") == 1
    [entry] = json.loads((run_dir / "provenance.json").read_text())["continued_with"]
    assert entry["step"] == 3 and entry["plugins"]["plug_parts"] not in (first, None)

    finish(run_dir, {"eval/kl": 1.0})
    with pytest.raises(UserError, match=words) as failure:
        refuse_another_run(run_dir, cfg)
    assert "--resume" not in str(failure.value)
    assert f"; or restore {file} as the run used it, and the same command continues" in str(failure.value)
    (tmp_path / "iterate.json").touch()  # A round that was resumed with this code would be refused again.
    (run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match=rf"move the whole iteration {tmp_path} aside") as failure:
        refuse_another_run(run_dir, cfg)
    assert "--resume" not in str(failure.value) and f"{file} as the rounds so far used it" in str(failure.value)
    (tmp_path / "iterate.json").unlink()
    finish(run_dir, {"eval/kl": 1.0})
    write("plug_parts.py", "weight = 1\n")
    new_process()
    with claim(run_dir, cfg) as status:  # as it was: the result is that of this code
        assert status is Status.FINISHED


def test_other_differences_are_not_cured_by_a_resume(write: Write, tmp_path: Path) -> None:
    write("plug_loss.py", "class MyLoss: ...\n")
    with claim(tmp_path / "run", config(tmp_path / "run")):
        pass
    write("plug_loss.py", "class MyLoss: x = 1\n")
    new_process()
    with pytest.raises(UserError, match="seed: 0 there, 5 now") as failure:
        refuse_another_run(tmp_path / "run", config(tmp_path / "run", "seed=5"))
    assert "plug_loss" in str(failure.value) and "--resume" not in str(failure.value)
    with pytest.raises(UserError, match="seed: 0 there, 5 now"):
        claim(tmp_path / "run", config(tmp_path / "run", "seed=5"), resumed=True).__enter__()


def test_changes_of_a_resumed_run_keep_the_plugins_that_started_it(write: Write, tmp_path: Path) -> None:
    write("plug_loss.py", "class MyLoss: ...\n")
    run_dir = tmp_path / "run"
    with claim(run_dir, config(run_dir, "trainer.max_steps=9")):
        pass
    started = json.loads((run_dir / "identity.json").read_text())["plugins"]
    write("plug_loss.py", "class MyLoss: x = 1\n")
    new_process()
    resumed_config(run_dir, ["trainer.max_steps=10"], allow=["plug_loss"])
    assert json.loads((run_dir / "identity.json").read_text())["plugins"] == started


def test_parts_that_change_no_result_do_not_count(write: Write, tmp_path: Path) -> None:
    write("plug_log.py", "class Log: ...\n")
    write("plug_alpha.py", "class Alpha: ...\n")
    words = ["method=dpo", "++logger.mine._target_=plug_log.Log", "++alpha._target_=plug_alpha.Alpha"]
    assert identity(compose(words, run_dir=tmp_path), ["alpha"])["plugins"] == {}
    assert identity(compose(words, run_dir=tmp_path), [])["plugins"].keys() == {"plug_alpha"}


def test_identity_of_a_run_before_plugins_were_recorded(write: Write, tmp_path: Path) -> None:
    write("plug_loss.py", "class MyLoss: ...\n")
    new = identity(config(tmp_path))
    old = {key: value for key, value in new.items() if key != "plugins"}
    assert differences(old, new) == [] and differences({**new, "plugins": {}}, new) != []


# --- cached results ------------------------------------------------------------------------------------------------


def test_caches_depend_on_plugins_of_data_and_model(write: Write, tmp_path: Path) -> None:
    write("plug_source.py", "class Source: ...\n")
    write("plug_reward.py", "def reward(): ...\n")
    write("plug_model.py", "def initial(): ...\n")
    words = [
        "++data.source._target_=plug_source.Source",
        "++data.reward._target_=plug_reward.reward",
        "++model.initial._target_=plug_model.initial",
    ]
    cfg = compose(words, run_dir=tmp_path)
    keys = [data_key(cfg)]
    for file in ("plug_source.py", "plug_reward.py"):
        write(file, "edited = True\n")
        keys.append(data_key(cfg))
    assert keys[0] != keys[1] != keys[2]
    before = model_plugins(cfg)
    write("plug_model.py", "edited = True\n")
    assert before.keys() == {"plug_model"} and model_plugins(cfg) != before


def test_code_in_a_model_folder_is_part_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling_mine.py").write_text("scale = 1\n")
    before = model_digest(tmp_path)
    (tmp_path / "modeling_mine.py").write_text("scale = 2\n")
    assert model_digest(tmp_path) != before


def test_verdicts_belong_to_the_code_of_the_judge(write: Write, tmp_path: Path) -> None:
    from spo.evaluation.judges.base import JudgedPair

    code = (
        "from spo.evaluation.judges.pairwise import PairwiseJudge\n"
        "class MyJudge(PairwiseJudge):\n"
        "    identity = {'judge': 'mine'}\n"
        "    def ask(self, comparisons):\n"
        "        yield {shown: float(shown.first WHICH shown.second) for shown in comparisons}\n"
    )
    pair = [JudgedPair("p", "aa", "b")]

    def verdict(which: str) -> Sequence[float | None]:
        write("plug_judge.py", code.replace("WHICH", which))
        new_process()
        judge: Any = importlib.import_module("plug_judge").MyJudge(tmp_path / "verdicts.sqlite", 0.0)
        assert isinstance(judge, PairwiseJudge)
        return judge.verdicts(pair)

    assert [verdict("<"), verdict(">"), verdict("<")] == [[1.0], [0.0], [1.0]]


# ------------------------------------------------------------------------------------- losses written for 0.1.0


def test_old_declarations_of_a_loss_are_translated() -> None:
    with pytest.warns(DeprecationWarning) as caught:

        class Old(DPOLoss):
            uses_batch_statistics = True
            metric_names = (*DPOLoss.metric_names, "mine/share")

    assert [str(one.message) for one in caught] == [
        "Old.uses_batch_statistics is now full_batch",
        "Old.metric_names is now extra_metrics",
    ]
    loss = Old()
    assert loss.full_batch and loss.uses_batch_statistics and loss.extra_metrics == ("mine/share",)
    assert loss.metric_names == Old.metric_names == (*LOSS_METRICS, "mine/share")
    assert not DPOLoss().full_batch and DPOLoss().metric_names == LOSS_METRICS

    class New(Old):
        full_batch, extra_metrics = False, ()

    assert not New().uses_batch_statistics and New().metric_names == LOSS_METRICS


def test_old_declarations_of_a_second_base_class_are_translated() -> None:
    class Mixin:
        uses_batch_statistics = True
        metric_names = (*LOSS_METRICS, "mine/share")

    with pytest.warns(DeprecationWarning):

        class Old(Mixin, DPOLoss):
            pass

    assert Old().full_batch and Old().uses_batch_statistics and Old().extra_metrics == ("mine/share",)
    assert Old().metric_names == (*LOSS_METRICS, "mine/share")


def test_old_declarations_of_an_object_are_translated() -> None:
    class Old(DPOLoss, torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.uses_batch_statistics = True
            self.metric_names = (*self.metric_names, "mine/share")

    with pytest.warns(DeprecationWarning):

        class Computed(DPOLoss):
            @property
            def metric_names(self) -> tuple[str, ...]:
                return (*LOSS_METRICS, "mine/computed")

    assert (Old().full_batch, Old().extra_metrics) == (True, ("mine/share",))
    assert Computed().extra_metrics == ("mine/computed",) and Computed().metric_names[-1] == "mine/computed"


LOSSES_OF_LISTS = """
import torch
from spo.losses import ListLoss, PreferenceLoss

class List(ListLoss):
    uses_lists = True
    def of_ranking(self, lists, *, alpha, beta): return -lists.policy[:, 0]

class Pair(PreferenceLoss):
    uses_lists = True
    def of_pairs(self, pair, *, alpha, beta): return -pair.policy_chosen

class Module(torch.nn.Module, PreferenceLoss):
    def of_pairs(self, pair, *, alpha, beta): return -pair.policy_chosen
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("List", None),
        ("Pair", "method.loss: Pair declares uses_lists, which no longer has an effect: derive it from "),
        ("Module", "torch.nn.Module comes first among the base classes of Module: write it last"),
    ],
)
def test_base_classes_of_a_loss_are_checked(write: Write, tmp_path: Path, name: str, words: str | None) -> None:
    write("plug_lists.py", LOSSES_OF_LISTS)
    cfg = compose(["method=dpo"], run_dir=tmp_path)
    cfg.method.loss = {"_target_": f"plug_lists.{name}"}
    found = "\n".join(problems(cfg))
    assert found == "" if words is None else words in found
