"""UPO and Self-supervised PO, whose heads read hidden states: values, every gradient, resume, and two processes."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spo.config.compose import compose
from spo.data import Renderer, Row, TokenizedPair, prepare
from spo.data.collate import collate
from spo.data.readability import readability
from spo.forward.speed import Speed
from spo.losses import DataNeeds, DPOLoss, MixLoss, SelfSupervisedPOLoss, UPOLoss
from spo.losses.key_phrases import key_phrases, without_phrases
from spo.models import FrozenReference
from spo.objective import score
from spo.objective.learned import tensors_of
from spo.stages.evaluate import evaluate_command
from spo.stages.train import train
from spo.types import CompletionLogps, LabelledLogps, PairLogps
from tests.commands import TINY
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import (
    FAST,
    PLAIN,
    Spied,
    frozen,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    random_rows,
    run_on_two_ranks,
    small_model,
)

WIDTH, BETA, COUNT = 12, 0.3, 7
UPO_OPTIONS: dict[str, Any] = {
    "gamma": 0.7,
    "temperature": 2.0,
    "expectile": 0.8,
    "value_weight": 0.5,
    "max_weight": 1.3,
    "reward": None,
}
SSPO_OPTIONS: dict[str, Any] = {"gamma": 0.4, "versions": 3}
LAYOUTS = {"padded": PLAIN, "packed": replace(FAST, max_logits=None), "deferred": FAST}


def upo(**options: Any) -> UPOLoss:
    """Return UPO with a value head that is not zero."""
    loss = UPOLoss(**UPO_OPTIONS | options).double()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        loss.fit_width(WIDTH)
        assert loss.value_head is not None
        nn.init.normal_(loss.value_head.weight, std=0.2)
    return loss.double()


def sspo(**options: Any) -> SelfSupervisedPOLoss:
    loss = SelfSupervisedPOLoss(**SSPO_OPTIONS | options)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        loss.fit_width(WIDTH)
    return loss.double()


def rows_of_upo() -> list[TokenizedPair]:
    """Completions that share a prompt, with soft labels and weights in some rows, and rewards on both sides of V."""
    pairs = random_pairs(COUNT, 1, weight=lambda i: None if i > 4 else 0.5 + i / 10)
    pairs[3] = replace(pairs[3], prompt_ids=pairs[2].prompt_ids, prompt_id=pairs[2].prompt_id)
    rewards = torch.randn(COUNT, generator=torch.Generator().manual_seed(2)).tolist()
    return [
        replace(
            pair,
            rejected_ids=None,
            rejected_text=None,
            label=(1.0, 0.0, 0.3)[i % 3],
            features={"auxiliary_reward": rewards[i]},
            extra={"mismatched": pairs[i - 1 if i != 3 else 1].chosen_ids},
        )
        for i, pair in enumerate(pairs)
    ]


def rows_of_sspo() -> list[TokenizedPair]:
    """Pairs whose versions are other completions; in some rows a version is the one before it."""
    pairs = random_pairs(COUNT, 1, preference=lambda i: None if i % 2 else 0.8, weight=lambda i: None if i > 4 else 2.0)
    others = [tuple(completion) for _, completion in random_rows(4 * COUNT, 9)]
    names = ("chosen_1", "chosen_2", "rejected_1", "rejected_2")
    rows = [replace(pair, extra=dict(zip(names, others[4 * i :], strict=False))) for i, pair in enumerate(pairs)]
    rows[1] = replace(rows[1], extra={**rows[1].extra, "chosen_1": rows[1].chosen_ids})
    same = rows[2].extra["rejected_1"]
    rows[2] = replace(rows[2], extra={**rows[2].extra, "rejected_2": same})
    return rows


# --- a second implementation --------------------------------------------------------------------------------------


def seen_by(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the log-prob of a completion and the states that predict it, from a forward pass over it alone."""
    out = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
    places = slice(len(prompt) - 1, -1)
    logps = out.logits[0, places].log_softmax(-1)
    return logps[range(len(completion)), list(completion)].sum(), out.hidden_states[-1][0, places]


def plain_upo(rows: Sequence[TokenizedPair], policy: Any, reference: Any, loss: UPOLoss) -> Tensor:
    ratios, values, likelihoods = [], [], []
    mismatched = []
    for row in rows:
        logp, states = seen_by(policy, row.prompt_ids, row.chosen_ids)
        ratios.append(logp - seen_by(reference, row.prompt_ids, row.chosen_ids)[0].detach())
        other = row.extra["mismatched"]
        mismatched.append(
            (seen_by(policy, row.prompt_ids, other)[0] - seen_by(reference, row.prompt_ids, other)[0]).item()
        )
        assert loss.value_head is not None
        values.append((loss.value_head.weight[0] * states[0].detach()).sum() + loss.value_head.bias[0])
        likelihoods.append(logp)
    point = max(0.0, sum(mismatched) / len(rows))
    total = torch.zeros((), dtype=torch.float64)
    for row, ratio, value, logp in zip(rows, ratios, values, likelihoods, strict=True):
        label = float(torch.tensor(row.label))
        kto = label * (1 - torch.sigmoid(BETA * (ratio - point))) + (1 - label) * (
            1 - torch.sigmoid(BETA * (point - ratio))
        )
        gap = float(torch.tensor(row.features["auxiliary_reward"])) - value
        weight = min(math.exp(gap.item() / loss.temperature), loss.max_weight)
        side = 1 - loss.expectile if gap.item() < 0 else loss.expectile
        sample = kto - loss.gamma * weight * logp + loss.value_weight * side * gap**2
        total = total + float(torch.tensor(1.0 if row.weight is None else row.weight)) * sample
    return total / len(rows)


def plain_sspo(rows: Sequence[TokenizedPair], policy: Any, reference: Any, loss: SelfSupervisedPOLoss) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        assert row.rejected_ids is not None and loss.degree_head is not None
        ratios, degrees = [], []
        for side, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
            ratios.append(seen_by(policy, row.prompt_ids, ids)[0] - seen_by(reference, row.prompt_ids, ids)[0].detach())
            losses, last = [], None
            for degree, version in enumerate((ids, row.extra[f"{side}_1"], row.extra[f"{side}_2"])):
                if version != last:
                    mean = seen_by(policy, row.prompt_ids, version)[1].mean(0)
                    scores = loss.degree_head.weight @ mean + loss.degree_head.bias
                    losses.append(-scores.log_softmax(0)[degree])
                last = version
            degrees.append(torch.stack(losses).mean())
        margin = BETA * (ratios[0] - ratios[1])
        certainty = 1.0 if row.preference is None else float(torch.tensor(row.preference))
        preference = -certainty * logsigmoid(margin) - (1 - certainty) * logsigmoid(-margin)
        weight = 1.0 if row.weight is None else row.weight
        total = total + weight * (preference + loss.gamma * (degrees[0] + degrees[1]))
    return total / len(rows)


MAKE: dict[str, Callable[[], Any]] = {"upo": upo, "self_supervised_po": sspo}
ROWS: dict[str, Callable[[], list[TokenizedPair]]] = {"upo": rows_of_upo, "self_supervised_po": rows_of_sspo}
PLAIN_LOSS: dict[str, Callable[..., Tensor]] = {"upo": plain_upo, "self_supervised_po": plain_sspo}
EACH = pytest.mark.parametrize("name", MAKE)


@cache
def speed_of(layout: str) -> Speed:
    return LAYOUTS[layout].resolve_for(small_model(0))


def fitted(
    folder: Path,
    name: str,
    *,
    layout: str = "packed",
    micro: int | None = None,
    steps: int = 1,
    checkpoint: Path | None = None,
    **trainer: Any,
) -> Spied:
    module = make_module(
        small_model(0),
        loss=MAKE[name](),
        reference=FrozenReference(),
        reference_model=small_model(1),
        speed=speed_of(layout),
        micro_batch_size=micro,
        beta=BETA,
        optimizer=torch.optim.SGD,
    )
    data = make_data(ROWS[name](), max_steps=4, batch_size=COUNT, micro_batch_size=micro)
    started = make_trainer(folder, max_steps=steps, **trainer)
    started.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


@cache
def wanted(name: str) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the first step by the second implementation."""
    policy, loss = small_model(0), MAKE[name]()
    value = PLAIN_LOSS[name](ROWS[name](), policy, frozen(small_model(1)), loss)
    names = {**dict(policy.named_parameters()), **tensors_of(loss)}
    slopes = torch.autograd.grad(value, [*names.values()])
    return value.item(), dict(zip(names, slopes, strict=True))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        atol = tolerance * max(float(value.abs().max()), 1e-3)
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=name)


@EACH
@pytest.mark.parametrize(
    ("layout", "micro"), [("padded", None), ("packed", None), ("deferred", None), ("padded", 1), ("deferred", 3)]
)
def test_step_equals_a_plain_computation(name: str, layout: str, micro: int | None, tmp_path: Path) -> None:
    module = fitted(tmp_path, name, layout=layout, micro=micro)
    value, slopes = wanted(name)
    assert all(float(slope.abs().max()) > 1e-6 for key, slope in slopes.items() if key.startswith("loss."))
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(value, rel=1e-6)  # a float32
    assert_near(module.gradients[0], slopes)


@EACH
@pytest.mark.parametrize("micro", [None, 2])
def test_resumed_run_is_bit_identical(name: str, micro: int | None, tmp_path: Path) -> None:
    whole = fitted(tmp_path, name, steps=4, micro=micro)
    first = fitted(tmp_path, name, steps=2, micro=micro)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(tmp_path, name, steps=4, micro=micro, checkpoint=tmp_path / "half.ckpt")
    state, expected = resumed.state_dict(), whole.state_dict()
    heads = {"upo": "loss.value_head.weight", "self_supervised_po": "loss.degree_head.weight"}
    assert not torch.equal(expected[heads[name]], MAKE[name]().state_dict()[heads[name].removeprefix("loss.")])
    for key in expected:
        if key.startswith(("policy.", "loss.")):
            assert torch.equal(state[key], expected[key]), key


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    for name in MAKE:
        for micro in (None, 2):
            for rank in (0, 1):
                found = torch.load(tmp_path / f"{name}_{micro}_{rank}.pt", weights_only=True)
                assert_near(found, wanted(name)[1])


def run_as_one_of_two(folder: Path) -> None:
    for name in MAKE:
        for micro in (None, 2):
            module = fitted(folder, name, layout="padded", micro=micro, devices=2, strategy="ddp")
            torch.save(module.gradients[0], folder / f"{name}_{micro}_{os.environ['RANK']}.pt")


# --- UPO ------------------------------------------------------------------------------------------------------------


def labelled(policy: Sequence[float], reward: Sequence[float], value: Sequence[float]) -> LabelledLogps:
    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    zeros = torch.zeros(len(policy), dtype=torch.float64)
    return LabelledLogps(
        column(policy).requires_grad_(),
        zeros + 1,
        zeros,
        terms={"value": column(value).requires_grad_()},
        features={"auxiliary_reward": column(reward)},
        extra={"mismatched": CompletionLogps(zeros, zeros.long(), zeros)},
    )


ALONE: dict[str, Any] = {"desirable_weight": 0.0, "undesirable_weight": 0.0, "reward": None}


def test_likelihood_has_the_weight_of_the_advantage_and_its_limit() -> None:
    policy, reward, value = [-3.0, -5.0, -2.0, -4.0], [1.0, -2.0, 0.5, 9.0], [0.5, 1.0, 0.5, 1.0]
    logps = labelled(policy, reward, value)
    loss = UPOLoss(gamma=2.0, temperature=0.5, value_weight=0.0, max_weight=50.0, **ALONE)
    found = loss(logps, alpha=1.0, beta=0.1)
    weights = [math.exp(1.0), math.exp(-6.0), 1.0, 50.0]
    assert found.tolist() == pytest.approx([-2 * w * lp for w, lp in zip(weights, policy, strict=True)], rel=1e-12)
    found.sum().backward()
    assert logps.policy.grad is not None and logps.policy.grad.tolist() == pytest.approx([-2 * w for w in weights])
    assert logps.terms["value"].grad is None or not logps.terms["value"].grad.any()


def test_value_is_fitted_by_expectile_regression() -> None:
    logps = labelled([-3.0, -5.0], [1.0, -2.0], [0.5, 1.0])
    loss = UPOLoss(gamma=0.0, expectile=0.9, **ALONE)
    found = loss(logps, alpha=1.0, beta=0.1)
    assert found.tolist() == pytest.approx([0.9 * 0.25, 0.1 * 9.0], rel=1e-12)
    found.sum().backward()
    slope = logps.terms["value"].grad
    assert slope is not None and slope.tolist() == pytest.approx([-2 * 0.9 * 0.5, 2 * 0.1 * 3.0], rel=1e-12)
    assert logps.policy.grad is not None and not logps.policy.grad.any()


def test_rewards_are_made_by_the_function_of_the_configuration() -> None:
    feature = UPOLoss(reward=readability).features["auxiliary_reward"]
    texts = ["The cat sat.", "Extraordinarily complicated considerations predominate."]
    assert feature.each and feature.make is not None
    assert list(feature.make(["", ""], texts)) == readability(["", ""], texts)["reward"]
    assert UPOLoss(reward=None).features["auxiliary_reward"].make is None


@pytest.mark.parametrize(
    "options", [{"gamma": -1}, {"temperature": 0}, {"expectile": 1}, {"max_weight": 0}, {"reward": "text"}]
)
def test_options_outside_of_their_range_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        UPOLoss(**{"reward": None} | options)


# --- Self-supervised PO ---------------------------------------------------------------------------------------------

STORY = " Mia found a red ball under the big old tree. She gave the red ball to Tom, and he was happy.\nThe end."


def test_without_the_classification_it_is_dpo() -> None:
    loss = SelfSupervisedPOLoss(gamma=0.0)
    loss.fit_width(WIDTH)
    assert DataNeeds.of(loss) == DataNeeds.of(DPOLoss()) and not loss.terms and not tensors_of(loss)
    reward = torch.randn(2, 4, dtype=torch.float64)
    found, expected = (one.optimum(reward, reward, 1.0, 0.5) for one in (loss, DPOLoss()))
    assert found is not None and expected is not None and torch.equal(found, expected)
    assert sspo().optimum(reward, reward, 1.0, 0.5) is None


def test_key_phrases_are_ranked_by_degree_over_frequency() -> None:
    phrases = [STORY[start:end] for (start, end), *_ in key_phrases(STORY)]
    assert phrases == ["big old tree", "Mia found", "red ball", "gave", "Tom", "happy", "end"]
    assert [len(places) for places in key_phrases(STORY)] == [1, 1, 2, 1, 1, 1, 1]
    assert key_phrases("It was. And then, there\nit is!") == []


def test_texts_lose_increasing_shares_of_their_key_phrases() -> None:
    texts = [without_phrases(STORY, k / 4) for k in range(5)]
    assert texts[0] == STORY
    assert texts[1] == " a red ball under the. She gave the red ball to Tom, and he was happy.\nThe end."
    assert texts[2] == " a under the. She the to Tom, and he was happy.\nThe end."
    assert [len(re.findall(r"\w+", text)) for text in texts] == [23, 18, 13, 11, 10]
    assert without_phrases("Red ball", 1.0) == "Red ball" and without_phrases("", 0.5) == ""
    assert without_phrases("Red ball of Tom", 1.0) == "of"


@pytest.mark.parametrize("kind", ["adds_bos", "no_bos", "bos_is_eos_is_pad", "prepend", "chat"])
def test_versions_are_the_tokens_of_their_texts(kind: str) -> None:
    chat = kind == "chat"
    tokenizer = build("adds_bos", ENDS_IN_EOS) if chat else build(kind)
    renderer = Renderer(tokenizer, 400, "drop_pair")

    def row(prompt: str, chosen: str, rejected: str) -> Row:
        def said(text: str, role: str = "assistant") -> Any:
            return ({"role": role, "content": text},) if chat else text

        return Row(said(prompt, "user"), said(chosen), said(rejected))

    text, other = STORY.strip() if chat else STORY, "The cat sat. It was on the mat."
    rows = [row("tell the story?", text, other), row("then what?", other, text)]
    needs = DataNeeds.of(SelfSupervisedPOLoss())
    [first, second] = prepare(rows, renderer, 0, 0.0, 0.0, 1, needs=needs).train
    assert list(first.extra) == [f"{side}_{k}" for side in ("chosen", "rejected") for k in (1, 2, 3)]
    for k in (1, 2, 3):
        expected = renderer.render(row("tell the story?", without_phrases(text, k / 4), without_phrases(other, k / 4)))
        assert isinstance(expected, TokenizedPair)
        assert (first.extra[f"chosen_{k}"], first.extra[f"rejected_{k}"]) == (
            expected.chosen_ids,
            expected.rejected_ids,
        )
        assert first.extra[f"chosen_{k}"] == second.extra[f"rejected_{k}"] or kind == "prepend"


def test_versions_of_a_cut_completion_do_not_end() -> None:
    renderer = Renderer(build("adds_bos"), 60, "trim_completion")
    needs = DataNeeds.of(SelfSupervisedPOLoss())
    [pair] = prepare([Row("tell?", STORY, " no, the cat sat")], renderer, 0, 0.0, 0.0, 1, needs=needs).train
    assert pair.truncated and pair.chosen_ids[-1] != renderer.eos_id
    assert all((ids[-1] == renderer.eos_id) == name.startswith("rejected") for name, ids in pair.extra.items())
    assert renderer.decode(pair.extra["chosen_1"]) == without_phrases(pair.chosen_text, 0.25)


OWN_METRICS = [("upo", "upo/value"), ("self_supervised_po", "self_supervised_po/degree")]


def test_a_mix_gives_each_part_its_width_and_its_versions() -> None:
    def mixed() -> MixLoss:
        parts = {"own": SelfSupervisedPOLoss(**SSPO_OPTIONS), "dpo": DPOLoss()}
        loss = MixLoss(parts, {"own": 1.0, "dpo": 2.0})
        with torch.random.fork_rng():
            torch.manual_seed(4)
            loss.fit_width(WIDTH)
        return loss.double()

    rows = rows_of_sspo()
    loss = mixed()
    assert list(loss.terms) == ["own.degree"] and loss.needs_policy_states
    batch = collate(
        [replace(row, extra={f"own.{k}": v for k, v in row.extra.items()}) for row in rows], range(COUNT), 0
    )
    policy, reference = small_model(0), FrozenReference()
    reference.attach(lambda: frozen(small_model(1)))
    seen = score(batch, loss, policy, reference, PLAIN, {}).inputs_of(loss)
    plain = score(collate(rows, range(COUNT), 0), sspo(), policy, reference, PLAIN, {}).inputs_of(sspo())
    assert isinstance(plain, PairLogps)
    expected = sspo()(plain, alpha=1.0, beta=BETA) + 2 * DPOLoss()(plain, alpha=1.0, beta=BETA)
    torch.testing.assert_close(loss(seen, alpha=1.0, beta=BETA), expected, rtol=1e-12, atol=0)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric"), OWN_METRICS)
def test_a_run_and_its_evaluation_use_the_head(name: str, metric: str, tmp_path: Path) -> None:
    settings = [TINY, f"method={name}", "judge=none", "logger=record", "trainer.max_steps=4", "optimizer.lr=0.01"]
    settings += [f"paths.cache={tmp_path / 'cache'}"]
    metrics = train(compose(settings, run_dir=tmp_path / "run"))
    again = evaluate_command(tmp_path / "run", ["data.eval_batch_size=5"])
    assert again[f"eval/{metric}"] == pytest.approx(metrics[f"eval/{metric}"], abs=1e-5)
    assert metrics[f"eval/{metric}"] == pytest.approx(metrics[f"val/{metric}"], rel=0.5)
    assert (tmp_path / "run" / "loss.safetensors").is_file()
    assert not any("head" in path.name for path in (tmp_path / "run" / "policy").iterdir())
    if name == "upo":
        assert metrics["eval/upo/value"] != 0


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
