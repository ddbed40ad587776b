"""The configuration: yaml files against what they configure, plain numbers, job names, bounds and problems."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Interval
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from spo.bounds import DropoutRate, PositiveFloat, PositiveInt
from spo.config.checks import check_config, problems, warnings
from spo.config.checks.targets import parameter_types
from spo.config.coefficients import unused_coefficients
from spo.config.compose import MAX_NAME_LENGTH, compose, composer, directory, expand_numbers, job_name, multiply
from spo.config.groups import group_members
from spo.config.nodes import entries, has_judge, keys_of, locate
from spo.config.plan import Plan, plan
from spo.config.schema import Precision, typed_keys
from spo.config.values import choices_of, violation
from spo.errors import ConfigProblems, UserError, missing_package
from spo.resources import conf_dir
from spo.stages.train import train

GROUPS = group_members([conf_dir()])
MEMBERS = [(group, member) for group, members in GROUPS.items() for member in members]
# What a class passes on in its **kwargs.
FORWARDED = {"DDPStrategy": set(inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters)}
DIRECTIVES = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def targets(node: Any, prefix: str = "") -> list[tuple[str, DictConfig]]:
    """Return every node with a ``_target_``, with its key."""
    found = []
    if isinstance(node, DictConfig):
        if "_target_" in node:
            found.append((prefix.rstrip("."), node))
        for name in node:
            if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
                found += targets(node[name], f"{prefix}{name}.")
    return found


def completed(cfg: DictConfig) -> DictConfig:
    """Return a configuration with the values that a person has to give, and without Hydra's node."""
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    cfg.paths.run = "run"
    cfg.trainer.devices = 1  # strategy=fsdp has to be told
    numbers = {"model.default_lr": 0.1, "alpha.target": 1.0, "beta.target": 1.0}
    lists = {"alpha.values": [0.1], "beta.values": [0.1]}
    texts = dict.fromkeys(("model.path", "data.path", "data.source", "judge.path", "judge.model"), "given")
    texts["judge.reward._target_"] = "builtins.len"
    for key, value in (texts | numbers | lists).items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent)
        if node is not None and OmegaConf.is_missing(node, name):
            node[name] = value
    if cfg.model.default_lr is None:  # The size of the model that was given is unknown.
        cfg.model.default_lr = numbers["model.default_lr"]
    if "strength" in cfg:  # An earlier sweep may have to choose it.
        cfg.strength = 1.0
    return cfg


@pytest.fixture(scope="module")
def every_member() -> dict[tuple[str, str], DictConfig]:
    """Return a configuration for each member; members of different groups share one if they can."""
    presets = {group: GROUPS[group] for group in ("experiment", "hparams_search", "launcher", "debug")}
    plain_groups = {group: members for group, members in GROUPS.items() if group not in presets}
    found: dict[tuple[str, str], DictConfig] = {}
    with composer() as composed:
        for i in range(max(map(len, plain_groups.values()))):
            chosen = {group: members[i % len(members)] for group, members in plain_groups.items()}
            cfg = completed(composed([f"{group}={member}" for group, member in chosen.items()]))
            found |= {item: cfg for item in chosen.items()}
        for group, members in presets.items():
            for member in members:
                found[group, member] = completed(composed([f"{'+' if group == 'debug' else ''}{group}={member}"]))
    return found


# --- every yaml file -----------------------------------------------------------------------------------------------


def made_default(target: Any, name: str, default: Any) -> Any:
    """Return the default of a parameter; that of a dataclass may be a function that makes it."""
    made = [one.default_factory for one in fields(target) if one.name == name] if is_dataclass(target) else []
    return made[0]() if made and made[0] is not MISSING else default


@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_member_matches_the_signatures_of_its_targets(
    every_member: dict[tuple[str, str], DictConfig], group: str, member: str
) -> None:
    cfg = every_member[group, member]
    assert OmegaConf.to_container(cfg, resolve=True)  # every interpolation leads somewhere
    for key, node in targets(cfg.get(group), f"{group}."):
        target = locate(node["_target_"])
        parameters = {
            name: parameter
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        given = {str(name) for name in node} - DIRECTIVES
        known = parameters.keys() | FORWARDED.get(target.__name__, set())
        assert given <= known, f"{key}: not parameters of {node['_target_']}"
        signed_by = target.__init__ if inspect.isclass(target) else target
        # a class may have inherited its signature from elsewhere
        if getattr(signed_by, "__module__", target.__module__).startswith("spo."):
            assert given == parameters.keys(), f"{key}: parameters without a value in yaml"
            for name in given:
                default = made_default(target, name, parameters[name].default)
                if default is not inspect.Parameter.empty and not OmegaConf.is_interpolation(node, name):
                    # a variant such as cdpo is the same target with another value; its base has the default
                    members = [every_member[group, other].get(group) for other in GROUPS[group]]
                    same = [one for cfg in members for _, one in targets(cfg) if one["_target_"] == node["_target_"]]
                    homes = [plain(one[name]) for one in same]
                    assert plain(default) in homes, f"{key}.{name}: two homes for one default"


def plain(value: Any) -> Any:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(value) if isinstance(value, tuple) else value


FROM_OUTSIDE = ("optimizer", "scheduler", "trainer", "strategy", "logger")
THIRD_PARTY = [(group, member) for group, member in MEMBERS if group in FROM_OUTSIDE]


@pytest.mark.parametrize(("group", "member"), THIRD_PARTY)
def test_third_party_target_takes_its_yaml(
    every_member: dict[tuple[str, str], DictConfig], group: str, member: str, tmp_path: Path
) -> None:
    cfg = every_member[group, member].copy()
    cfg.paths.run = str(tmp_path)
    for _key, node in targets(cfg[group], f"{group}."):
        if node["_target_"].startswith("spo."):
            continue
        if node["_target_"].endswith("DeepSpeedStrategy") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        extra = {"accelerator": "cpu", "devices": 1, "logger": False} if group == "trainer" else {}
        made = instantiate(node, **extra)
        if group == "optimizer":
            optimizer = made([torch.nn.Parameter(torch.zeros(1))])
            assert optimizer.param_groups[0]["lr"] == cfg.model.default_lr
        elif group == "scheduler":
            schedule = made(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
            assert schedule.get_last_lr() == [0.0]  # all members warm up
        elif group == "trainer":
            assert made.max_steps == cfg.trainer.max_steps
        else:
            assert type(made).__name__ == node["_target_"].rpartition(".")[2]


def test_every_group_is_selected_by_the_main_file() -> None:
    with composer() as composed:
        chosen = composed([]).hydra.runtime.choices
    assert set(GROUPS) - set(chosen) <= {"debug"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"regularizer": "GlobalKL", "reference": "FrozenReference"}),
        (["method=dpo"], {"regularizer": "NoRegularizer"}),
        (["method=spo", "regularizer=none"], {"regularizer": "NoRegularizer"}),
        (["regularizer=none", "method=spo"], {"regularizer": "NoRegularizer"}),
        (["experiment=local_ablation"], {"regularizer": "LocalKL"}),
        (["model=hf_lora", "model.path=x"], {"reference": "AdapterOffReference"}),
        (["model=hf_lora", "model.path=x", "reference=frozen"], {"reference": "FrozenReference"}),
    ],
)
def test_method_or_model_chooses_for_other_groups_unless_overridden(
    overrides: list[str], expected: dict[str, str]
) -> None:
    cfg = compose(overrides)
    assert {group: cfg[group]["_target_"].rpartition(".")[2] for group in expected} == expected


def test_defaults_follow_method_and_data() -> None:
    cfg = compose(["method=ipo"])
    assert (cfg.alpha.value, cfg.beta.value) == (cfg.data.default_alpha, cfg.method.default_beta)
    assert compose(["method=spo"]).regularizer.weight == "beta"
    assert compose(["method=dpo", "regularizer=global_kl"]).regularizer.weight == 0.01
    falling = compose(["alpha=linear", "alpha.start=0.05"]).alpha
    assert (falling.start, falling.end, falling.steps) == (0.05, 0.005, compose().trainer.max_steps)


def test_compose_sets_the_run_directory(tmp_path: Path) -> None:
    assert compose(["method=dpo"], run_dir=tmp_path).paths.run == str(tmp_path)
    assert Path(compose(["hydra.run.dir=here/it/is"]).paths.run) == Path.cwd() / "here/it/is"


# --- bounds and choices --------------------------------------------------------------------------------------------


def test_every_setting_outside_a_target_has_a_type(every_member: dict[tuple[str, str], DictConfig]) -> None:
    """Check that the schema has every number and switch that no parameter of ours takes, and no other key."""
    settings: set[str] = set()
    for cfg in every_member.values():
        for key, node, name in entries(cfg):
            if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, name) or name in DIRECTIVES:
                continue
            ours = str(node.get("_target_", "")).startswith("spo.")
            if isinstance(node[name], int | float) and not ours:
                settings.add(key)
    typed = set(typed_keys())
    # Parameters of other packages, passed on as they are, and numbers in a mapping that a parameter of ours takes.
    of_others = ("strategy.plugin.", "judge.request.", "method.loss.weights.")
    assert {key for key in settings - typed if not key.startswith(of_others)} == set()
    known = set().union(*(keys_of(cfg) for cfg in every_member.values()))
    assert typed <= known


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (0, PositiveInt, "must be at least 1"),
        (1, PositiveInt, None),
        (True, PositiveInt, "must be a whole number"),
        (1.0, PositiveInt, "must be a whole number"),
        (None, PositiveInt | None, None),
        ("x", PositiveInt | None, "must be a whole number, or null"),
        (0, PositiveFloat, "must be a positive number"),
        (math.inf, PositiveFloat, "must be a finite number"),
        (math.nan, PositiveFloat, "must be a finite number"),
        ("x", DropoutRate, "must be a number, at least 0 and below 1"),
        (1, DropoutRate, "must be at least 0 and below 1"),
        (0.5, Annotated[float, Interval(gt=0, le=0.4)], "must be above 0 and at most 0.4"),
        (1, bool, "must be true or false"),
        ("yes", bool | None, "must be true or false, or null"),
        (32, Literal["32", "64"], None),
        ("322", Literal["32", "64"] | None, "choose 32, 64 or null; did you mean 32?"),
        ("b", float | Literal["beta"], "must be a number, or beta"),
        ([1], float, "must be a number"),
        ("x", Sequence[str], "must be a list, written [..]"),
        (["x"], Sequence[str], None),
        (1, Mapping[str, int], "must be a mapping"),
        ([1], str, "must be a text"),
        (object(), torch.Tensor, None),
        (None, torch.Tensor, "must be a Tensor"),
        (None, torch.Tensor | None, None),
        (None, Any, None),
    ],
)
def test_value_violates_type_or_bounds(value: object, hint: object, words: str | None) -> None:
    assert violation(value, hint) == words


CHOICES = [(key, choice) for key, hint in typed_keys().items() for choice in choices_of(hint)]


@pytest.mark.parametrize(("key", "choice"), CHOICES)
def test_every_choice_of_a_setting_passes_the_checks(key: str, choice: object) -> None:
    overrides = ["data=enumerable"] if (key, choice) == ("data.truncation", "trim_completion") else []
    if key == "method.regularizer_weight":
        overrides = ["method=dpo"]
    if key.startswith("strategy."):
        overrides = ["strategy=fsdp", "trainer.devices=2"]
    if key.startswith("iteration."):
        overrides = ["iteration=dpo"]
    assert problems(compose([*overrides, f"{key}={choice}"])) == []


def test_every_choice_of_a_target_can_be_instantiated(every_member: dict[tuple[str, str], DictConfig]) -> None:
    walked = 0
    for (group, _), cfg in every_member.items():
        for key, node in targets(cfg.get(group), f"{group}."):
            target = locate(node["_target_"])
            if not node["_target_"].startswith("spo.") or node["_target_"].endswith(("Judge", "FileSource")):
                continue
            for name, hint in parameter_types(target).items():
                for choice in choices_of(hint):
                    changed = node.copy()
                    changed[name] = choice
                    if choice == "reference":  # sampled pairs need a number
                        changed.num_pairs = 9
                    if "source" in changed:  # a round's prompts, which the group of another member may give
                        changed.source = every_member["data", "stories"].data.source
                    assert instantiate(changed) is not None, f"{key}.{name}={choice}"
                    walked += 1
    assert walked > 10


@pytest.mark.parametrize("precision", choices_of(Precision))
def test_every_precision_trains(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "cache"))
    small = ["data=enumerable", "data.max_new_tokens=2", "data.source.num_symbols=2", "logger=record", "callbacks=none"]
    short = ["trainer=cpu", "trainer.max_steps=2", "evaluation.samples_per_prompt=2", "evaluation.bootstrap_samples=10"]
    metrics = train(compose([*small, *short, f"trainer.precision={precision}"], run_dir=tmp_path / "run"))
    assert math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["eval/kl"])


# --- plain numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("alpha=0.5", ["alpha=constant", "alpha.value=0.5"]),
        ("beta=1", ["beta=constant", "beta.value=1"]),
        ("beta=1e-3", ["beta=constant", "beta.value=1e-3"]),
        ("beta=0.01,0.1", ["beta=constant", "beta.value=0.01,0.1"]),
        ("alpha=choice(0.1,0.2)", ["alpha=constant", "alpha.value=choice(0.1,0.2)"]),
        ("alpha=range(0.1,0.5,0.1)", ["alpha=constant", "alpha.value=range(0.1,0.5,0.1)"]),
        ("alpha=interval(0.1,1)", ["alpha=constant", "alpha.value=interval(0.1,1)"]),
        ("alpha=shuffle(1,2)", ["alpha=constant", "alpha.value=shuffle(1,2)"]),
        ("alpha=linear", ["alpha=linear"]),
        ("alpha=linear,cosine", ["alpha=linear,cosine"]),
        ("alpha=glob(*)", ["alpha=glob(*)"]),
        ("alpha.value=0.5", ["alpha.value=0.5"]),
        ("+alpha=0.5", ["+alpha=0.5"]),
        ("seed=1", ["seed=1"]),
        ("model.lora.alpha=16", ["model.lora.alpha=16"]),
    ],
)
def test_plain_numbers_are_expanded(typed: str, meant: list[str]) -> None:
    assert expand_numbers([typed]) == meant
    assert expand_numbers(expand_numbers([typed])) == meant


BAD_NUMBERS = ["0", "-1", "0.0", "null", "true", "inf", "nan", "1e400", "", "[1,2]", "{a:1}", "1,linear", "1,null"]
BAD_NUMBERS += ["0.1,0", "range(0,1,0.5)", "range(2,1)", "interval(0,1)", "choice(1,true)", "("]


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("key", ["alpha", "beta"])
def test_number_that_is_not_positive_is_rejected(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{key}=") as caught:
        expand_numbers([f"{key}={value}"])
    assert "Traceback" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_plain_numbers_reach_the_schedules() -> None:
    cfg = compose(["alpha=0.5", "beta=2"])
    assert instantiate(cfg.alpha)(3) == 0.5 and instantiate(cfg.beta)(3) == 2


# --- resolvers -----------------------------------------------------------------------------------------------------


def test_multiply_is_decimal() -> None:
    assert multiply(0.05, 0.1) == 0.005 and multiply(3, 4) == 12


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["hydra.run.dir=x", "hydra/launcher=joblib", "launcher=joblib", "paths.outputs=y", "rerun=true"], "default"),
        (["method=spo", "alpha=constant", "alpha.value=0.5", "seed=1"], "method-spo_alpha-0.5_seed-1"),
        (["logger=record", "logger.wandb.mode=offline", "tags=[a]", "threads=2"], "default"),
        (["speed=plain", "+logger@logger.more=wandb"], "speed-plain"),
        (["alpha=constant"], "alpha-constant"),
        (["alpha.value=0.5"], "alpha.value-0.5"),
        (["trainer.max_steps=20"], "trainer.max_steps-20"),
        (["iteration=dpo", "iteration.rounds=3", "iteration.source.round=1"], "iteration-dpo_iteration.source.round-1"),
        (["method=spo_weighted", "beta=constant", "beta.value=1e-3"], "method-spo__weighted_beta-1e-3"),
    ],
)
def test_job_name_shows_its_overrides(overrides: list[str], name: str) -> None:
    assert job_name(overrides) == name


def test_job_name_leaves_out_the_search_it_comes_from() -> None:
    assert directory(["method=dpo", "alpha=linear", "seed=1", "hparams_search=dpo"], compose(["method=dpo"])) == (
        "method-dpo_seed-1"
    )
    assert job_name(["hparams_search=dpo"]) == "hparams_search-dpo"  # a sweep is


@pytest.mark.parametrize(
    ("overrides", "dropped", "name"),
    [
        (["method=dpo", "alpha=constant", "alpha.value=0.5", "beta=linear"], ["alpha"], "method-dpo_beta-linear"),
        (["method=sft", "alpha=cosine", "beta.value=3", "seed=1"], ["alpha", "beta"], "method-sft_seed-1"),
        (["alpha=linear", "++alpha.end=2", "~alpha.start", "alpha@x=y"], ["alpha"], "default"),
        (["model.lora.alpha=16", "alpha=linear"], ["alpha"], "model.lora.alpha-16"),
    ],
)
def test_job_name_leaves_out_unused_coefficients(overrides: list[str], dropped: list[str], name: str) -> None:
    assert job_name(overrides, dropped) == name


def test_unused_coefficients_of_compositions() -> None:
    def of(*overrides: str) -> list[str]:
        return unused_coefficients(compose(overrides))

    assert of() == of("method=dpo", "method.loss._target_=nowhere.Loss") == []
    assert of("method=dpo") == of("method=dpo", "regularizer=global_kl") == ["alpha"]
    assert of("regularizer=none") == ["beta"] and of("method=sft") == ["alpha", "beta"]
    assert of("method=sft", "regularizer=global_kl", "regularizer.weight=beta") == ["alpha"]
    assert of("regularizer.weight=0.1") == ["beta"]


def test_job_name_shows_last_part_of_path_and_distinguishes_folders() -> None:
    one, other = (job_name([f"data.path=/data/{folder}/my pairs.jsonl"]) for folder in ("a", "b"))
    assert re.fullmatch(r"data\.path-my-pairs\.jsonl_[0-9a-f]{8}", one) and one != other


KEYS = st.from_regex(r"[+~]{0,2}[a-z_][a-z0-9._]{0,12}", fullmatch=True)
TEXTS = st.text(st.sampled_from("ab01_-./ =,éß[]{}'\"\\$:"), max_size=60)
VALUES = TEXTS | st.sampled_from(["constant", "0.5", "spo_weighted"])
LISTS = st.lists(st.tuples(KEYS | st.sampled_from(["alpha", "alpha.value"]), VALUES).map("=".join), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LISTS, LISTS)
def test_different_jobs_have_different_names(a: list[str], b: list[str]) -> None:
    def meaning(overrides: list[str]) -> list[str]:
        # alpha=0.5 is a way to write the pair, and where a job writes or starts is not part of it
        written = [part for o in overrides for part in _written_out(o)]
        return [o for o in written if not re.match(r"[+~]*(hydra[./=]|(paths|launcher)([.=@]|$)|rerun=)", o)]

    for overrides in (a, b):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", job_name(overrides)) and len(job_name(overrides)) <= MAX_NAME_LENGTH
        assert job_name(overrides) not in (".", "..")
    if meaning(a) != meaning(b):
        assert job_name(a) != job_name(b)


def _written_out(override: str) -> list[str]:
    key, _, value = override.partition("=")
    if key in ("alpha", "beta") and re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", value):
        return [f"{key}=constant", f"{key}.value={value}"]
    return [override]


# --- problems ------------------------------------------------------------------------------------------------------


def problem_text(*overrides: str, **kwargs: Any) -> str:
    with pytest.raises(ConfigProblems) as caught:
        plan(overrides, **kwargs)
    return str(caught.value)


def test_defaults_pass_all_checks() -> None:
    planned = plan([])
    assert isinstance(planned, Plan) and len(planned.jobs) == 1
    assert warnings(planned.jobs[0].cfg) == []
    check_config(planned.jobs[0].cfg)


def test_all_bad_overrides_are_reported_together() -> None:
    text = problem_text("method=dop", "trainer.max_step=3", "foo", "alpha=0", "max_steps=3", "data=jsonl", "model=hf")
    assert text.startswith("the configuration has 7 problems:")
    for part in (
        "method=dop: no such member of method; did you mean dpo?",
        "trainer.max_step=3: unknown key; did you mean trainer.max_steps?",
        "foo: cannot be read",
        "alpha=0: 0 is not a positive, finite number",
        "max_steps=3: unknown key; did you mean sft.max_steps or trainer.max_steps?",
        "data.path is not set: the file, folder or hub name of your preference pairs",
        "model.path is not set: a Hugging Face folder or hub name",
    ):
        assert part in text


def test_wrong_settings_are_reported_together() -> None:
    text = problem_text(
        "trainer.precision=16-mixed",
        "+trainer.accumulate_grad_batches=2",
        "trainer.max_steps=-1",
        "data.truncation=drop",
        "data.on_bad_row=never",
        "data.micro_batch_size=64",
        "data.micro_batch_tokens=0",
        "data.group_by_length=1",
        "data.seed=1.5",
        "data.splits.test=0.95",
        "model.dtype=float23",
        "optimizer.lr=-1",
        "speed.packing=maybe",
        "speed.sampler=dynamic",
        "trainer.gradient_clip_val=0",
        "tags=one",
    )
    for part in (
        "trainer.precision=16-mixed: choose 32-true, 32 or bf16-mixed; did you mean bf16-mixed?; half precision is not",
        "trainer.accumulate_grad_batches cannot be set: use data.micro_batch_size",
        "trainer.max_steps=-1: must be at least 0",
        "data.truncation=drop: choose drop_pair, trim_completion or trim_prompt; did you mean drop_pair?",
        "data.on_bad_row=never: choose stop or skip",
        "data.micro_batch_size=64 exceeds data.batch_size=32",
        "data.micro_batch_tokens=0: must be at least 1, or null",
        "data.group_by_length=1: must be at least 2, or null",
        "data.seed=1.5: must be a whole number",
        "data.splits: selection=0.1 and test=0.95 leave no prompt",
        "model.dtype=float23: choose float32",
        "optimizer.lr=-1: must be a positive number",
        "speed.packing=maybe: must be true or false",
        "speed.sampler=dynamic: choose static or generate",
        "trainer.gradient_clip_val=0: must be a positive number, or null",
        "tags=one: must be a list",
    ):
        assert part in text, part
    assert text.startswith("the configuration has 16 problems:")


def test_wrong_parameters_of_targets_are_reported_together() -> None:
    text = problem_text(
        "method=dpo",
        "method.loss.label_smoothing=0.7",
        "+trainer.foo=1",
        "data.source.labels=softt",
        "data.source.num_prompts=0",
        "regularizer=global_kl",
        "regularizer.weight=-1",
        "regularizer.refresh_every=0.5",
        "evaluation.confidence=95",
        "evaluation.against=chosen",
        "callbacks.health.entropy=-1",
        "beta=linear",
        "beta.end=inf",
        "logger.wandb.mode=sometimes",
    )
    for part in (
        "method.loss.label_smoothing=0.7: must be at least 0 and below 0.5",
        "trainer.foo: Trainer does not have this parameter",
        "data.source.labels=softt: choose soft, hard or deterministic; did you mean soft?",
        "data.source.num_prompts=0: must be at least 1",
        "regularizer.weight=-1: must be at least 0, or beta",
        "regularizer.refresh_every=0.5: must be a whole number",
        "evaluation.confidence=95: must be above 0 and below 1",
        "evaluation.against=chosen: must be a list",
        "callbacks.health.entropy=-1: must be a positive number, or null",
        "beta.end=inf: must be a finite number",
        "logger.wandb.mode=sometimes: choose auto, online, offline or disabled",
    ):
        assert part in text, part
    assert text.startswith("the configuration has 11 problems:")


def test_wrong_setting_is_reported_before_targets_are_imported() -> None:
    text = problem_text("data.batch_size=0", "method.loss._target_=spo.losses.NoSuchLoss")
    assert text == "the configuration has a problem:\n  - data.batch_size=0: must be at least 1"


def test_reference_to_wrong_value_is_not_reported_twice() -> None:
    text = problem_text("trainer.max_steps=-1")  # scheduler.num_training_steps refers to it
    assert text == (
        "the configuration has a problem:\n  - trainer.max_steps=-1: must be at least 0, or null; "
        "null leaves the length of the run to trainer.max_epochs"
    )


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["method=dpo", "reference=none"], "method=dpo needs a reference model, but reference=none"),
        (["reference=none"], "regularizer=global_kl scores sequences"),
        (["reference=precomputed"], "regularizer=global_kl scores sequences"),
        (["method=sft", "reference=precomputed"], "nothing reads the log-probabilities"),
        (["reference=cached"], "reference=cached: method=spo with regularizer=global_kl does not read"),
        (["method=dpo", "reference=cached", "regularizer=local_kl"], "choose reference=frozen"),
        (["method=dpo", "reference=precomputed", "reference.batch_tokens=0"], "reference.batch_tokens=0: must be"),
        (["reference=adapter_off"], "choose model=hf_lora"),
        (["model.adapter_path=x"], "an adapter needs model.lora"),
        (["model.path=somewhere/else"], "this model makes its own weights; for yours write model=hf"),
        (["model.initial=null"], "model.path and model.initial are both null"),
        (["model=hf", "model.path=./nowhere"], "model.path=./nowhere: there is no such folder"),
        (
            ["model=hf", "model.path=gpt2", "optimizer.lr=1e-5", "data=jsonl", "data.path=x.jsonl"],
            "data.path=x.jsonl: there is no such file",
        ),
        (["method=dpo", "regularizer=local_kl", "regularizer.weight=beta"], "needs a number of its own"),
        (["data.splits.test=0"], "data.splits.test=0: must be above 0 and below 1"),
        (["trainer.precision=bf16-true"], "weights in bfloat16 are model.dtype=bfloat16"),
        (["trainer.devices=0"], "trainer.devices=0: must be a number of devices"),
        (["trainer.accelerator=gpus"], "trainer.accelerator=gpus: choose"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a positive number"),
        (["rerun=maybe"], "rerun=maybe: must be true or false"),
        (["regularizer.refresh_every=0"], "regularizer.refresh_every=0: must be at least 1"),
        (["alpha=linear", "alpha.end=0"], "alpha.end=0: must be a positive number"),
        (["alpha=linear", "alpha.value=3"], "alpha.value=3: unknown key; alpha has end, start, steps"),
        (["method.loss._target_=spo.losses.SPOLos"], "did you mean SPOLoss?"),
        (["method.loss._target_=nowhere.Loss"], "there is no module nowhere"),
        (["judge=none", "evaluation.against=[reference,chosen]"], "a comparison with chosen takes a judge"),
        (
            ["data=jsonl", f"data.path={__file__}", "evaluation.against=[chosen]"],
            "there is none (judge=none, or judge=gold of data without a reward)",
        ),
        (["data.chat_template=no.jinja"], "data.chat_template=no.jinja: there is no such file"),
        (["debug=tiny"], "write it with a plus, +debug=tiny"),
        (["data.chat_template_kwargs.a=1"], "write it with a plus, +data.chat_template_kwargs.a=1"),
        (["+seed=1"], "the key exists already; write seed=1"),
        (["~nothing"], "there is nothing to delete"),
        (["+mine.key=1"], "mine: nothing reads this key"),
        (["method=spo,dpo"], "has several values; add -m"),
    ],
)
def test_impossible_combination_is_rejected(overrides: list[str], part: str) -> None:
    text = problem_text(*overrides)
    assert part in text and text.startswith("the configuration has a problem:")


def test_parameters_that_cannot_be_counted_do_not_hide_other_problems() -> None:
    text = problem_text("model=hf_lora", "model.path=some/model-not-here", "data=jsonl", "data.path=x.jsonl")
    assert text.startswith("the configuration has 2 problems:\n  - model.path=some/model-not-here: its parameters")
    assert "data.path=x.jsonl: there is no such file" in text


def test_unknown_key_names_the_keys_of_its_group_and_the_members_that_have_it() -> None:
    assert problem_text("alpha=linear", "alpha.value=3").endswith("alpha has end, start, steps; alpha=constant has it")
    without = problem_text("method=dpo", "regularizer.prompts=selection")  # this group does not have a key
    assert without.endswith("regularizer.prompts=selection: unknown key; regularizer=global_kl has it")


def test_unusable_chat_template_file_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    data = ["data=jsonl", f"data.path={__file__}", f"data.chat_template={file}"]
    contents = {"\ufeff\n": "the file is empty", '{"chat_template": "{{ messages }}"}': "the file is JSON"}
    for content, part in contents.items():
        file.write_text(content, encoding="utf-8")
        assert f"data.chat_template={file}: {part}" in problem_text(*data)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=dpo", "reference=precomputed"],
        ["method=dpo", "reference=cached", "regularizer=global_kl"],
        ["method=dpo", "regularizer=local_kl"],
        ["regularizer=none", "reference=none"],
        ["method=sft", "reference=none"],
        ["judge=none", "evaluation.against=[reference]"],
        ["evaluation.against=[chosen]"],
        ["model=hf", "model.path=gpt2", "optimizer.lr=1e-5"],
        ["model=hf_lora", "model.path=org/name", "model.lora.r=4", "optimizer.lr=1e-5"],
        ["+debug=tiny", "data.batch_size=4"],
        ["trainer.max_time=00:12:00:00"],
        ["trainer=gpu", "trainer.precision=bf16-mixed"],
        ["logger=csv"],
        ["callbacks=none", "evaluation=quick", "scheduler=cosine", "optimizer=sgd"],
    ],
)
def test_possible_combination_passes(overrides: list[str]) -> None:
    assert len(plan(overrides).jobs) == 1


def test_settings_without_effect_are_warned_about() -> None:
    def warned(*overrides: str) -> list[str]:
        return warnings(compose(overrides))

    assert warned("method=dpo", "alpha=0.3") == ["dpo does not read alpha: what you set it to has no effect"]
    assert len(warned("method=dpo", "alpha=linear")) == 1
    assert "nothing reads beta in sft" in warned("method=sft", "beta=3")[0]
    assert "nothing reads beta in spo" in warned("regularizer=none", "beta=3")[0]
    assert warned("alpha=0.3", "beta=3") == warned("method=dpo", "beta=3") == []


# --- several jobs --------------------------------------------------------------------------------------------------


def test_multirun_checks_all_jobs_together() -> None:
    planned = plan(["method=spo,dpo", "alpha=0.1,0.2", "seed=1"], multirun=True)
    assert [job.overrides for job in planned.jobs] == [
        [f"method={method}", "alpha=constant", f"alpha.value={alpha}", "seed=1"]
        for method in ("spo", "dpo")
        for alpha in (0.1, 0.2)
    ]
    assert planned.multirun and planned.jobs[1].cfg.alpha.value == 0.2
    text = problem_text("method=spo,dop,dpo", "reference=none,frozen", "seed=-1,1", multirun=True)
    assert "method=dop: no such member of method" in text
    assert "seed=-1: must be at least 0 and below 4294967296 [job method=spo reference=none seed=-1 and 3 more]" in text
    text = problem_text("method=spo,dpo", "reference=none,frozen", multirun=True)
    assert "method=dpo needs a reference model, but reference=none" in text
    assert "[job method=dpo reference=none]" in text and "frozen [job method=dop" not in text


def test_sweep_presets_expand_to_jobs() -> None:
    jobs = plan(["hparams_search=grid", "method=dpo"]).jobs
    assert {(job.cfg.alpha.value, job.cfg.beta.value) for job in jobs} == {
        (a, b) for a in (0.02, 0.05, 0.1) for b in (0.03, 0.1, 0.3)
    }
    assert len(plan(["hparams_search=seeds", "seed=7"]).jobs) == 1  # the command line has the last word


# --- configuration of one's own ------------------------------------------------------------------------------------

OUTSIDE_LOSS = """
from spo.losses import PreferenceLoss
class MyLoss(PreferenceLoss):
    def __init__(self, scale): self.scale = scale
    def of_pairs(self, pair, *, alpha, beta): return self.scale * (pair.policy_rejected - pair.policy_chosen)
"""


def test_loss_from_outside_the_package_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_spo.py").write_text(OUTSIDE_LOSS)
    (tmp_path / "conf/method").mkdir(parents=True)
    yaml = "name: mine\ndefault_beta: 0.2\nloss:\n  _target_: outside_spo.MyLoss\n  scale: 2\n"
    (tmp_path / "conf/method/mine.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "conf"
    (job,) = plan(["method=mine"], config_dir=own).jobs
    assert job.cfg.beta.value == 0.2 and problems(job.cfg) == []
    assert "method=mine needs a reference" in problem_text("method=mine", "reference=none", config_dir=own)
    assert "did you mean mine?" in problem_text("method=min", config_dir=own)
    with pytest.raises(UserError, match="no such folder"):
        plan([], config_dir=tmp_path / "nowhere")


BOUNDED_LOSS = """
from typing import Annotated
from annotated_types import Ge, Le
from spo.losses import DPOLoss

class Bounded(DPOLoss):
    made = 0

    def __init__(self, share: Annotated[float, Ge(0), Le(1)], rounds: Annotated[int, Ge(1)] | None = None):
        super().__init__()
        type(self).made += 1
"""


def test_own_member_with_a_shipped_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "dpo.yaml").write_text("loss: {_target_: spo.losses.SFTLoss}")
    with pytest.raises(UserError, match=r"method/dpo\.yaml has the name of a shipped member"):
        compose(["method=dpo"], config_dir=tmp_path)
    with pytest.raises(UserError, match=r"method/dpo\.yaml has the name of a shipped member"):
        plan(["method=dpo"], config_dir=tmp_path)
    (tmp_path / "method" / "dpo.yaml").rename(tmp_path / "method" / "my_dpo.yaml")
    assert compose(["method=my_dpo"], config_dir=tmp_path).method.loss._target_ == "spo.losses.SFTLoss"


def test_bounds_of_a_plugin_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bounded_spo.py").write_text(BOUNDED_LOSS)
    (tmp_path / "method").mkdir()
    loss = "loss:\n  _target_: bounded_spo.Bounded\n  share: 0.5\n  rounds: null\n"
    (tmp_path / "method/bounded.yaml").write_text(f"name: bounded\n{loss}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(plan(["method=bounded"], config_dir=tmp_path).jobs) == 1
    text = problem_text("method=bounded", "method.loss.share=2", "method.loss.rounds=0.5", config_dir=tmp_path)
    assert "method.loss.share=2: must be at least 0 and at most 1" in text
    assert "method.loss.rounds=0.5: must be a whole number, or null" in text


def test_unused_coefficients_instantiate_a_loss_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counted_spo.py").write_text(BOUNDED_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = ["method=dpo", "method.loss._target_=counted_spo.Bounded", "+method.loss.share=1"]
    cfg = compose([*keys, "~method.loss.label_smoothing"])
    assert [unused_coefficients(cfg) for _ in range(3)] == [["alpha"]] * 3
    assert locate("counted_spo.Bounded").made == 1


def test_loss_must_derive_from_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "underived_spo.py").write_text(OUTSIDE_LOSS.replace("(PreferenceLoss)", ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = problems(compose(["method.loss._target_=underived_spo.MyLoss", "+method.loss.scale=2"]))
    assert problem == (
        "method.loss: MyLoss is not a loss: derive it from spo.losses.PreferenceLoss, or from spo.losses.ListLoss for "
        "ranked lists"
    )


def test_misspelled_key_of_a_preset_is_reported(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nsede: 3\ntrainer:\n  max_step: 4\n")
    text = problem_text("experiment=mine", config_dir=tmp_path)
    assert "sede: nothing reads this key; did you mean seed?" in text
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ntrainer:\n  max_step: 4\n")
    text = problem_text("experiment=mine", config_dir=tmp_path)
    assert "trainer.max_step: Trainer does not have this parameter; did you mean max_steps?" in text


def test_missing_extra_names_its_installation() -> None:
    assert missing_package("hydra_plugins.hydra_joblib_launcher.launcher") == (
        "hydra_joblib_launcher is not installed: pip install 'spo[joblib]'"
    )
    assert missing_package("peft.tuners") == "peft is not installed: pip install 'spo[peft]'"
    assert missing_package("numpy") is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("callbacks", "hello", "callbacks=hello: must be null, or a mapping"),
        ("callbacks", [1, 2], "callbacks=[1, 2]: must be null, or a mapping"),
        ("logger", 3, "logger=3: must be null, or a mapping"),
        ("callbacks.x", {"a": 1}, "callbacks.x={'a': 1}: must be null, or have a _target_"),
        ("logger.x", 3, "logger.x=3: must be null, or have a _target_"),
        ("judge", 3, "judge=3: choose a member"),
        ("probe", None, "probe=null: must have its keys"),
        ("callbacks.health._partial_", "x", "callbacks.health._partial_=x: must be true or false"),
        ("callbacks.health._recursive_", 2, "callbacks.health._recursive_=2: must be true or false"),
        ("callbacks.health._args_", "x", "callbacks.health._args_=x: must be a list"),
        ("callbacks.health._target_", 3, "callbacks.health._target_=3: must be the dotted path"),
        ("callbacks.health._convert_", "bad", "callbacks.health._convert_=bad: choose none"),
        ("seed", 2**32, "seed=4294967296: must be at least 0 and below"),
        ("data.seed", 10**400, ": must be at least 0 and below"),
    ],
)
def test_part_of_another_shape_is_a_problem_in_words(key: str, value: Any, words: str) -> None:
    cfg = compose(run_dir="run")
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    assert any(words in problem for problem in problems(cfg)), problems(cfg)


def test_method_of_a_moving_reference_needs_one() -> None:
    for reference in ("frozen", "precomputed", "cached"):
        text = problem_text("method=tr_dpo", f"reference={reference}")
        assert f"reference={reference} stays as it is: choose reference=following" in text
    assert problems(compose(["method=tr_dpo"])) == problems(compose(["method=dpo", "reference=following"])) == []
    assert any("it never moves" in sentence for sentence in warnings(compose(["method=tr_dpo", "reference.every=200"])))


def test_mapping_over_a_mapping_names_what_is_new_in_it() -> None:
    text = problem_text("method=rpo", "method.loss.embedder={_target_: spo.models.EncoderEmbedder, path: p}")
    assert text.endswith("add what is new there by itself, +method.loss.embedder.path=...")
    text = problem_text(
        "method=rpo", "method.loss.embedder._target_=spo.models.EncoderEmbedder", "+method.loss.embedder.path=p"
    )
    assert "embedder.size: EncoderEmbedder does not have this parameter; ~method.loss.embedder.size removes it" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+method.loss.losses.ipo._target_=spo.losses.IPOLoss"], "set +method.loss.weights.ipo=NUMBER"),
        (["+method.loss.weights.ipo=1"], "weights.ipo is the weight of no loss; losses has dpo, sft"),
        (["method.loss.weights.dpo=0", "method.loss.weights.sft=0"], "one of them above 0"),
        (["method.loss.weights.dpo=-1"], "at least 0"),
    ],
)
def test_wrong_weights_of_a_mix_are_explained(overrides: list[str], words: str) -> None:
    assert words in problem_text("method=mix", *overrides)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["judge=none"], False),
        (["data=jsonl", "data.path=x.jsonl"], False),
        (["data=jsonl", "data.path=x.jsonl", "judge=function", "judge.reward._target_=builtins.len"], True),
        (["judge=language_model", "judge.path=x"], True),
    ],
)
def test_whether_there_is_a_judge_is_known_without_making_it(words: list[str], expected: bool) -> None:
    assert has_judge(compose(words)) is expected
