"""Methods from outside the package: each step equals a closed form or TRL, however it is cut, stopped or spread."""

from __future__ import annotations

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
from transformers import GPT2Config, GPT2LMHeadModel

from spo.data import TokenizedPair
from spo.forward.speed import Speed
from spo.models import FrozenReference
from tests.helpers import BOS, EOS, FAST, PLAIN, VOCAB, Spied, make_data, make_module, make_trainer, random_pairs
from tests.outside_oracles import EXTRA, ORACLES, POLICY, REFERENCE, Oracle, Row, completion

ROOT = Path(__file__).parents[1]
CONF = ROOT / "tests" / "outside" / "conf"
sys.path.append(str(CONF.parent))  # as PYTHONPATH does for a user

BETA, BATCH, STEPS = 0.1, 6, 3
METHODS = sorted(path.stem for path in CONF.glob("method/*.yaml"))
TERMS, STATE = ("ld_dpo", "tdpo2", "wpo"), ("bco", "debiased", "tr_dpo")
MODELS = {POLICY: 0, REFERENCE: 1, EXTRA: 2}


def small_model(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model whose every number has the dtype; Llama computes norms and positions in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=12,
            n_layer=1,
            n_head=2,
            initializer_range=0.5,
            tie_word_embeddings=False,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=BOS,
            eos_token_id=EOS,
            attn_implementation="sdpa",
        )
        return GPT2LMHeadModel(config).to(dtype).eval()


@cache
def speed_of(layout: str) -> Speed:
    return {"padded": PLAIN, "packed": FAST}[layout].resolve_for(small_model(0))


def part(group: str, name: str, key: str | None = None, **changes: Any) -> Any:
    """Make the object that a yaml of the plugin describes."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    return instantiate(node if key is None else node[key], **changes)  # type: ignore[index]


def make_loss(name: str, dtype: torch.dtype = torch.float64) -> Any:
    loss = part("method", name, "loss")
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


def some_rows(name: str, *, soft: bool) -> list[TokenizedPair]:
    """Rows that share prompts, and in which only some have a soft label and a weight."""
    pairs = random_pairs(
        11,
        seed=1,
        preference=lambda i: None if i % 2 or not soft else 0.6 + i / 30,
        weight=lambda i: None if i > 5 or not soft else 0.5 + i / 10,
    )
    pairs[3:5] = [replace(pair, prompt_ids=pairs[2].prompt_ids, prompt_id=pairs[2].prompt_id) for pair in pairs[3:5]]
    pairs[4] = replace(pairs[4], chosen_ids=pairs[2].rejected_ids)
    return pairs


def row_of(pair: TokenizedPair, models: dict[str, nn.Module]) -> Row:
    def seen(tokens: Sequence[int], number: float = 0.0) -> Any:
        return completion(pair.prompt_ids, tokens, models, number)

    return Row(
        seen(pair.chosen_ids),
        seen(pair.rejected_ids or ()),
        right=1.0 if pair.preference is None else float(torch.tensor(pair.preference)),
        weight=1.0 if pair.weight is None else float(torch.tensor(pair.weight)),
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
        reference=part("reference", "tr_dpo", every=2) if name == "tr_dpo" else FrozenReference(),
        reference_model=models[REFERENCE],
        speed=speed_of(layout),
        micro_batch_size=micro,
        beta=BETA,
        optimizer=optimizer,
    )
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
    policy, oracle = models[POLICY], ORACLES[name](BETA)
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
