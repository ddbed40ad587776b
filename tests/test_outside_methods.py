"""Methods in and outside the package: each step equals a closed form, however it is cut, stopped or spread."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from spo import cli
from spo.data import TokenizedPair
from spo.forward.speed import Speed
from spo.models import FrozenReference
from spo.resources import conf_dir
from tests.closed_forms import EXTRA, ORACLES, POLICY, REFERENCE, Completion, Oracle, Row, completion
from tests.commands import TINY
from tests.helpers import (
    FAST,
    PLAIN,
    VOCAB,
    Spied,
    frozen,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    run_on_two_ranks,
    save_model,
    small_model,
)

ROOT = Path(__file__).parents[1]
CONF = ROOT / "tests" / "outside" / "conf"
sys.path.append(str(CONF.parent))  # as PYTHONPATH does for a user

BETA, BATCH, STEPS, EMBEDDED = 0.1, 6, 3, 3
PREFIX = "outside_"
"""Beginning of the names of members, since a member of --config-dir must not have the name of a shipped one."""
OUTSIDE = sorted(path.stem for path in CONF.glob("method/*.yaml"))
SHIPPED = sorted(name for name in ORACLES if (conf_dir() / "method" / f"{name}.yaml").is_file())
METHODS = [*OUTSIDE, *SHIPPED]
TERMS, STATE = ("ld_dpo", "tdpo2", "wpo"), ("bco", "outside_debiased", "outside_tr_dpo")
LABELLED = ("bco", "kto", "outside_kto")
EMBEDDING = {"rpo": "prompt_embedding", "outside_rpo": "embedding"}
MODELS = {POLICY: 0, REFERENCE: 1, EXTRA: 2}


@cache
def speed_of(layout: str) -> Speed:
    return {"padded": PLAIN, "packed": FAST}[layout].resolve_for(small_model(0))


def part(group: str, name: str, **changes: Any) -> Any:
    """Make the loss or the reference that a yaml of the plugin or of the package describes."""
    own = CONF / group / f"{name}.yaml"
    node = OmegaConf.load(own if own.is_file() else conf_dir() / group / f"{name}.yaml")
    return instantiate(node.loss if group == "method" else node, **changes)


def make_loss(name: str, dtype: torch.dtype = torch.float64) -> Any:
    loss = part("method", name, **({"embedder": {"size": EMBEDDED}} if name == "rpo" else {}))
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


def make_reference(name: str) -> Any:
    if "tr_dpo" not in name:
        return FrozenReference()
    return part("reference", "outside_following" if name == "outside_tr_dpo" else "following", every=2)


def some_rows(name: str, *, soft: bool) -> list[TokenizedPair]:
    """Rows that share prompts, and in which only some have a soft label and a weight."""
    pairs = random_pairs(
        11,
        seed=1,
        preference=lambda i: None if i % 2 or not soft else 0.3 + i / 20,
        weight=lambda i: None if i > 5 or not soft else 0.5 + i / 10,
    )
    pairs[3:5] = [replace(pair, prompt_ids=pairs[2].prompt_ids, prompt_id=pairs[2].prompt_id) for pair in pairs[3:5]]
    pairs[4] = replace(pairs[4], chosen_ids=pairs[2].rejected_ids or ())
    return [replace(pair, **columns) for pair, columns in zip(pairs, columns_of(name, pairs, soft), strict=True)]


def columns_of(name: str, pairs: list[TokenizedPair], soft: bool) -> list[dict[str, Any]]:
    """Return what else the rows of a method have."""
    random = torch.Generator().manual_seed(3)
    numbers = torch.randn(len(pairs), EMBEDDED, generator=random).tolist()
    if name in EMBEDDING:
        return [{"features": {EMBEDDING[name]: tuple(row)}} for row in numbers]
    if name == "outside_debiased":
        return [{"features": {"number": (row[0], row[1])}} for row in numbers]
    if name in LABELLED:
        single = {"rejected_ids": None, "rejected_text": None, "preference": None}
        others = [pairs[i - 1 if i not in (3, 4) else 1].chosen_ids for i in range(len(pairs))]
        return [
            {**single, "label": 0.2 + i / 20 if soft else float(i % 3 > 0), "extra": {"mismatched": other}}
            for i, other in enumerate(others)
        ]
    return [{} for _ in pairs]


def row_of(pair: TokenizedPair, models: dict[str, nn.Module]) -> Row:
    """Return a row as the closed forms see it; its numbers are those of single precision."""

    def seen(tokens: Sequence[int] | None, number: float = 0.0) -> Completion | None:
        return completion(pair.prompt_ids, tokens, models, number) if tokens else None

    def single(number: float | None) -> float:
        return 1.0 if number is None else float(torch.tensor(number))

    numbers = [single(number) for number in pair.features.get("number", (0.0, 0.0))]  # type: ignore[union-attr]
    return Row(
        completion(pair.prompt_ids, pair.chosen_ids, models, numbers[0]),
        seen(pair.rejected_ids, numbers[1]),
        seen(pair.extra.get("mismatched")),
        next((cast(Sequence[float], pair.features[key]) for key in EMBEDDING.values() if key in pair.features), ()),
        single(pair.preference if pair.label is None else pair.label),
        single(pair.weight),
    )


class Watched(Spied):
    """Keeps what each step starts from, its rows, its gradients and its loss."""

    def watch(self) -> Watched:
        self.starts: list[dict[str, Tensor]] = []
        self.indices: list[list[int]] = []
        self.slopes: list[dict[str, Tensor]] = []
        self.values: list[float] = []
        return self

    def training_step(self, window: Any, batch_idx: int) -> None:
        self.indices.append(torch.cat([batch.index for batch in window]).tolist())
        self.starts.append({name: value.clone() for name, value in self.state_dict().items()})
        self.passes = {POLICY: 0, REFERENCE: 0}
        models: dict[str, Any] = {POLICY: self.policy, REFERENCE: self.reference.model}  # type: ignore[attr-defined]
        hooks = [
            model.transformer.h[0].register_forward_hook(lambda *_, name=name: self._count(name))
            for name, model in models.items()
        ]
        super().training_step(window, batch_idx)
        for hook in hooks:
            hook.remove()

    def _count(self, name: str) -> None:
        self.passes[name] += 1

    def on_train_start(self) -> None:
        super().on_train_start()
        self.optimizers().optimizer.register_step_pre_hook(self._keep)  # type: ignore[union-attr]

    def _keep(self, *_: Any) -> None:
        self.slopes.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    def _log(self, row: dict[str, float]) -> None:
        self.values.append(row["train/loss"])


def fitted(
    folder: Path,
    name: str,
    *,
    soft: bool = False,
    dtype: torch.dtype = torch.float64,
    layout: str = "packed",
    micro: int | None = None,
    steps: int = STEPS,
    planned: int = STEPS,
    checkpoint: Path | None = None,
    optimizer: Any = torch.optim.SGD,
    **trainer: Any,
) -> Watched:
    models = {model: small_model(seed, dtype) for model, seed in MODELS.items()}
    module = make_module(
        models[POLICY],
        loss=make_loss(name, dtype),
        reference=make_reference(name),
        reference_model=models[REFERENCE],
        speed=speed_of(layout),
        micro_batch_size=micro,
        beta=BETA,
        optimizer=optimizer,
    )
    if name == "mrpo":
        extra = FrozenReference()
        extra.attach(lambda: frozen(models[EXTRA]))
        module.extra_references = {"extra": extra}
    module.__class__ = Watched
    rows = some_rows(name, soft=soft)
    data = make_data(rows, max_steps=planned, batch_size=BATCH, micro_batch_size=micro)
    watched = cast(Watched, module).watch()
    started = make_trainer(folder, max_steps=steps, **trainer)
    started.fit(watched, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return watched


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(slope.abs().max()) for slope in theirs.values())
    assert largest > 1e-6
    for name, slope in ours.items():
        torch.testing.assert_close(slope, theirs[name], rtol=0, atol=tolerance * largest, msg=lambda m, n=name: n + m)


def assert_same_steps(ours: Watched, theirs: Watched, tolerance: float) -> None:
    assert len(ours.slopes) == len(theirs.slopes) == STEPS
    assert ours.values == pytest.approx(theirs.values, rel=max(tolerance, 1e-12))
    for one, other in zip(ours.slopes, theirs.slopes, strict=True):
        assert_close(one, other, tolerance)


def assert_equals_oracle(module: Watched, name: str, rows: list[TokenizedPair]) -> None:
    """Compare the loss and every gradient of each step, from the weights that the step started with."""
    models = {model: small_model(seed) for model, seed in MODELS.items()}
    policy, oracle = models[POLICY], ORACLES.get(name, ORACLES[name.removeprefix(PREFIX)])(BETA)
    after = [*module.starts[1:], {key: value.clone() for key, value in module.state_dict().items()}]
    for step, indices in enumerate(module.indices):
        load(policy, oracle, module.starts[step])
        seen = [row_of(rows[i], models) for i in indices]
        oracle.observe(seen)
        value = torch.stack(oracle.losses(seen)).mean()
        wanted = {f"policy.{key}": p for key, p in policy.named_parameters()}
        wanted |= {f"loss.{key}": p for key, p in oracle.parameters.items()}
        slopes = dict(zip(wanted, torch.autograd.grad(value, [*wanted.values()]), strict=True))
        assert module.values[step] == pytest.approx(value.item(), rel=1e-9)
        assert_close(module.slopes[step], slopes, 1e-9)
        load(policy, oracle, after[step])
        oracle.move(models[REFERENCE], policy, step + 1)


def load(policy: nn.Module, oracle: Oracle, state: dict[str, Tensor]) -> None:
    policy.load_state_dict({key[7:]: value for key, value in state.items() if key.startswith("policy.")})
    for key, parameter in oracle.parameters.items():
        parameter.data.copy_(state[f"loss.{key}"])


@pytest.mark.parametrize("name", METHODS)
def test_each_step_equals_the_closed_form(name: str, tmp_path: Path) -> None:
    certain = fitted(tmp_path, name, layout="padded", micro=2)
    assert_equals_oracle(certain, name, some_rows(name, soft=False))
    soft = fitted(tmp_path, name, soft=True)
    assert_equals_oracle(soft, name, some_rows(name, soft=True))
    assert_same_steps(fitted(tmp_path, name, soft=True, layout="padded"), soft, 1e-11)
    assert_same_steps(fitted(tmp_path, name, soft=True, micro=2), soft, 1e-12)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in STATE else pytest.mark.slow) for name in METHODS]
)
def test_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"micro": 4, "planned": 4, "optimizer": torch.optim.AdamW}
    straight = fitted(tmp_path, name, steps=4, **options)
    first = fitted(tmp_path, name, steps=2, **options)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = fitted(tmp_path, name, steps=4, checkpoint=tmp_path / "first.ckpt", **options)
    assert first.values + second.values == straight.values
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    ours, theirs = (module.reference.model.state_dict() for module in (second, straight))  # type: ignore[attr-defined]
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("name", "micro", "passes"),
    [*((name, micro, micro) for name in TERMS for micro in (1, 3)), ("aot", 1, 1), ("aot", 3, 6), ("bco", 1, 1)],
)
def test_terms_do_not_cost_a_forward_pass(name: str, micro: int, passes: int, tmp_path: Path) -> None:
    """A loss of all pairs of a step takes a second pass of several micro-batches, and none of a single one."""
    module = fitted(tmp_path, name, micro=BATCH // micro, steps=1)
    assert module.passes == {POLICY: passes, REFERENCE: passes}


# --- the command ---------------------------------------------------------------------------------------------------


def write_rows(path: Path, labelled: bool) -> Path:
    """Write rows of words of the tiny tokenizer with all columns that a method reads."""
    random = torch.Generator().manual_seed(5)

    def words(most: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (most,), generator=random).tolist())

    def row(i: int) -> dict[str, Any]:
        prompt = f"{words(3)} w{3 + i % 20} w{3 + i // 20}"
        if labelled:
            return {"prompt": prompt, "completion": f" {words(2 + i % 4)}", "label": i % 3 > 0}
        numbers = torch.randn(5, generator=random).tolist()
        styles = {"chosen_style": numbers[3], "rejected_style": numbers[4]}
        pair = {"prompt": prompt, "chosen": f" {words(2 + i % 4)}", "rejected": f" {words(5 - i % 3)} w3"}
        return {**pair, **styles, "embedding": numbers[:3], "preference": 0.9 if i % 2 else 0.3, "weight": 1 + i % 2}

    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(64)))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and two models."""
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("pairs", "labelled"):
        write_rows(folder / f"{kind}.jsonl", kind == "labelled")
    for seed in (0, 1):
        save_model(folder / f"model{seed}", seed=seed, scale=0.1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data"), [*((name, "pairs") for name in OUTSIDE), ("outside_kto", "labelled")])
def test_command_trains(name: str, data: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(inputs / "cache"))
    words = [TINY, f"data={'labelled_jsonl' if data == 'labelled' else 'jsonl'}", f"data.path={inputs}/{data}.jsonl"]
    words += ["model=hf", f"model.path={inputs}/model0", "judge=none", "logger=record", "optimizer.lr=1e-3"]
    words += ["trainer=cpu", "data.max_length=32", "data.max_new_tokens=8", "hydra.run.dir=run"]
    assert cli.main(["train", "--config-dir", str(CONF), f"method={name}", *words]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    assert metrics["train/grad_norm"] > 0 and metrics["train/rewards/chosen"] != 0
    for key in make_loss(name).extra_metrics:
        assert all(f"{split}/{key}" in metrics for split in ("train", "val", "eval"))
        assert key in Path("run/report.html").read_text()
    assert Path("run/loss.safetensors").is_file() == (name == "outside_debiased")


# --- processes -----------------------------------------------------------------------------------------------------

SPREAD = [(torch.float64, None, STEPS, 1e-12), (torch.float64, 2, STEPS, 1e-12), (torch.float32, 2, 1, 1e-6)]
"""Dtype, pairs of a micro-batch, steps, and by how much of the largest gradient two processes may differ from one."""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name in METHODS:
        for case, (dtype, _, steps, tolerance) in enumerate(SPREAD):
            alone = fitted(tmp_path, name, soft=True, dtype=dtype, steps=steps)
            both = two[name, case]
            assert both["values"] == pytest.approx(alone.values, rel=max(tolerance, 1e-12))
            for ours, theirs in zip(both["slopes"], alone.slopes, strict=True):
                assert_close(ours, theirs, tolerance)


if __name__ == "__main__":
    [out] = map(Path, sys.argv[1:])
    found = {}
    for name in METHODS:
        for case, (dtype, micro, steps, _) in enumerate(SPREAD):
            options: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
            module = fitted(out, name, soft=True, dtype=dtype, micro=micro, steps=steps, **options)
            found[name, case] = {"values": module.values, "slopes": module.slopes}
            is_first = module.trainer.is_global_zero
    if is_first:
        torch.save(found, out / "two.pt")
