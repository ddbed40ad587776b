"""Sequential Preference Optimization: the earlier rewards of a round, and the policy that its loss leads to."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data import DataError, PreparedPairs, Renderer, Row, TokenizedPair, prepare
from spo.data.collate import collate
from spo.errors import UserError
from spo.evaluation.judges.reward import RewardJudge
from spo.exact.optimum import minimize
from spo.losses import DPOLoss, SequentialPOLoss
from spo.losses.declarations import DataNeeds
from spo.models import ModelSpec
from spo.rounds.scoring import score_completions
from spo.stages import earlier_rewards as stage
from spo.stages.earlier_rewards import earlier_coefficients, sequence_rewards, with_earlier_rewards
from spo.stages.from_config import resolve_values
from spo.stages.iterate import round_config
from spo.stages.prepare import prepare_run
from spo.types import PairLogps, Sequences, pad_sequences
from tests.helpers import FAST, PAD, PLAIN, completion_logps, frozen, model_spec, save_model, tiny_llama, tiny_tokenizer
from tests.test_dealt_stages import in_two_processes

WORDS = [
    ("w3 w4", "w5 w6", "w7"),
    ("w4 w4 w9", "w8", "w9 w10 w11 w12"),
    ("w5", "w13 w14 w15", "w16 w17"),
    ("w6 w3", "w18 w5", "w18 w6"),
    ("w7 w8", "w19", "w20 w21 w22 w3 w4"),
]
COEFFICIENTS = (0.3, -0.7)
RENDERER = Renderer(tiny_tokenizer(), 64, "drop_pair")


def config(folder: Path, speed: Any = PLAIN) -> DictConfig:
    settings = {name: value for name, value in asdict(speed).items() if name != "probed"}
    values = {"model": {}, "trainer": {"accelerator": "cpu"}, "data": {"eval_batch_size": 3}, "speed": settings}
    return cast(DictConfig, OmegaConf.create(values | {"paths": {"cache": str(folder / "cache")}}))


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of the first model and of the policies of two rounds."""
    folder = tmp_path_factory.mktemp("policies")
    return [str(save_model(folder / str(i), seed=i)) for i in range(3)]


@pytest.fixture(scope="module")
def pairs() -> PreparedPairs:
    rows = [Row(prompt, chosen, rejected) for prompt, chosen, rejected in WORDS]
    return prepare(rows, RENDERER, 0, 0.2, 0.2, 1, needs=DataNeeds.of(SequentialPOLoss()))


def expected(policies: Sequence[str], batch: Any, coefficients: Sequence[float] = COEFFICIENTS) -> Tensor:
    """Return the ``(N,)`` rewards of the sequences of a batch, from the weights and the definition alone."""
    models = []
    for i, folder in enumerate(policies):
        models.append(frozen(tiny_llama(seed=i)))
        models[-1].load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    logps = [completion_logps(model, batch.sequences) for model in models]
    ratios = [after - before for before, after in pairwise(logps)]
    total = torch.zeros(len(batch.sequences), dtype=torch.float64)
    for coefficient, ratio in zip(coefficients, ratios, strict=True):
        total += coefficient * ratio
    return total


@pytest.mark.parametrize("speed", [PLAIN, FAST])
def test_loss_reads_the_rewards_of_the_tokens_that_are_trained_on(
    speed: Any, policies: list[str], pairs: PreparedPairs, tmp_path: Path
) -> None:
    spec = model_spec(dtype="float64", attn_implementation="sdpa")
    found = with_earlier_rewards(config(tmp_path, speed), spec, PAD, policies, pairs, COEFFICIENTS)
    for split in ("train", "selection", "test"):
        of_split: list[TokenizedPair] = getattr(found, split)
        assert of_split and all(ids[-1] == RENDERER.eos_id for pair in of_split for ids in pair.completions)
        batch = collate(of_split, range(len(of_split)), PAD)
        rewards = batch.per_completion(expected(policies, batch)).T
        assert rewards.abs().min() > 1e-3
        # The batch holds them in float32.
        assert batch.features["earlier_reward"].double() == pytest.approx(rewards, rel=1e-6)
        assert torch.tensor([pair.numbers["earlier_reward"] for pair in of_split]) == pytest.approx(rewards, abs=1e-6)


class Unloadable(ModelSpec):
    def base(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")


SEQUENCES = [((1, 3, 4), (5, 6, 2)), ((1, 4), (7, 2)), ((1, 4), (8, 9, 10, 2)), ((1, 5), (2,))]


def test_rewards_are_cached_by_models_and_tokens(policies: list[str], tmp_path: Path) -> None:
    cfg, spec = config(tmp_path), model_spec(dtype="float64")
    closed = Unloadable(**vars(spec))
    first = sequence_rewards(cfg, spec, PAD, policies, SEQUENCES, COEFFICIENTS)
    assert sequence_rewards(cfg, closed, PAD, policies, SEQUENCES, COEFFICIENTS) == first
    # Other coefficients need no forward pass, and a copy of a model is the same model.
    copy = shutil.copytree(policies[0], tmp_path / "copy")
    other = sequence_rewards(cfg, closed, PAD, [str(copy), *policies[1:]], SEQUENCES, (0.0, -1.4))
    alone = sequence_rewards(cfg, closed, PAD, policies, SEQUENCES, (0.3, 0.0))
    for sequence in SEQUENCES:
        assert other[sequence] / 2 + alone[sequence] == pytest.approx(first[sequence], abs=1e-12)
    with pytest.raises(AssertionError, match="a model was loaded"):
        sequence_rewards(cfg, closed, PAD, policies, SEQUENCES[:3], COEFFICIENTS)
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, copy / "model.safetensors")
    with pytest.raises(AssertionError, match="a model was loaded"):
        sequence_rewards(cfg, closed, PAD, [str(copy), *policies[1:]], SEQUENCES, COEFFICIENTS)


def test_first_round_and_zero_weights_load_no_model(policies: list[str], tmp_path: Path) -> None:
    closed = Unloadable(**vars(model_spec()))
    zeros = dict.fromkeys(SEQUENCES, 0.0)
    assert sequence_rewards(config(tmp_path), closed, PAD, policies[:1], SEQUENCES, ()) == zeros
    assert sequence_rewards(config(tmp_path), closed, PAD, policies, SEQUENCES, (0.0, 0.0)) == zeros
    assert sequence_rewards(config(tmp_path), closed, PAD, policies, [], COEFFICIENTS) == {}
    assert not (tmp_path / "cache").exists()


def test_coefficients_that_do_not_fit_and_log_probs_that_are_not_finite_are_refused(
    policies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, spec = config(tmp_path), model_spec()
    with pytest.raises(ValueError, match="2 rounds are finished, but there are 1 coefficients"):
        sequence_rewards(cfg, spec, PAD, policies, SEQUENCES, (0.1,))
    # Loading refuses NaN; a model that masks tokens computes -inf.
    monkeypatch.setattr(stage, "_logps", lambda *_: [-1.0, -torch.inf, -2.0, -torch.inf])
    with pytest.raises(DataError, match=r"earlier round \(.+0\) gives no finite log-probability to 2 of 4 completions"):
        sequence_rewards(cfg, spec, PAD, policies, SEQUENCES, COEFFICIENTS)


def test_coefficient_is_the_weight_times_the_final_beta(tmp_path: Path) -> None:
    finished = [tmp_path / "round-1", tmp_path / "round-2"]
    for run_dir, beta in zip(finished, (0.2, 0.3), strict=True):
        run_dir.mkdir()
        (run_dir / "coefficients.json").write_text(f'{{"alpha": 1, "beta": {beta}}}')
    assert earlier_coefficients([0.5, 2.0], []) == []
    assert earlier_coefficients([0.5, 2.0], finished[:1]) == [0.1]
    assert earlier_coefficients([0.5, 2.0], finished) == pytest.approx([0.1, 0.6])
    assert earlier_coefficients([], finished) == []
    with pytest.raises(UserError, match=r"coefficients\.json is missing or damaged, so the implicit reward"):
        earlier_coefficients([0.5], [tmp_path])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("iteration.rewards=null", "iteration.rewards is not set, and method.loss keeps"),
        (
            "iteration.rounds=3 iteration.rewards=[plot,plot,plot]",
            "iteration.earlier_weights is too short for iteration.rounds=3",
        ),
        ("iteration.earlier_weights=[-1]", "iteration.earlier_weights=-1: must be a number of 0 or more"),
        ("iteration.earlier_weights=[a]", "iteration.earlier_weights=a: must be a number of 0 or more"),
        ("iteration.rounds=1 iteration.earlier_weights=[]", ""),
        ("iteration.rounds=3 iteration.rewards=[plot,plot,plot] method=dpo", ""),
    ],
)
def test_rounds_say_what_they_align_and_keep(words: str, message: str) -> None:
    found = problems(compose(["experiment=sequential", *words.split()]))
    assert (message in found[0] and len(found) == 1) if message else not found


def test_second_round_has_its_own_reward_and_keeps_the_first(
    policies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        shutil.copytree(policies[number], tmp_path / f"round-{number}" / "policy")
        (tmp_path / f"round-{number}" / "history.jsonl").write_text("")
    (tmp_path / "round-1" / "coefficients.json").write_text('{"alpha": 1, "beta": 0.4}')
    (tmp_path / "pairs.jsonl").write_text("")
    words = [
        *("experiment=sequential", "iteration.earlier_weights=[0.5]", "judge=none", "data.min_pairs=1"),
        *("data=jsonl", f"data.path={tmp_path / 'pairs.jsonl'}", "data.max_length=64", "data.batch_size=2"),
        *("model=hf", f"model.path={policies[0]}", "model.dtype=float64", "trainer.accelerator=cpu"),
    ]
    second = round_config(compose([*words, f"paths.cache={tmp_path / 'cache'}"], run_dir=tmp_path), tmp_path, 2)
    assert (second.iteration.source.reward, second.iteration.source.earlier_coefficients) == ("brevity", [0.2])
    rows = [Row(*texts) for texts in WORDS]
    monkeypatch.setattr("spo.stages.prepare.preference_rows", lambda *_: (rows, {}))
    found = prepare_run(resolve_values(second)).pairs
    for of_split in (found.train, found.selection, found.test):
        batch = collate(of_split, range(len(of_split)), PAD)
        rewards = batch.per_completion(expected(policies[:2], batch, (0.2,))).T
        assert torch.tensor([pair.numbers["earlier_reward"] for pair in of_split]) == pytest.approx(rewards, abs=1e-6)


def test_scale_is_a_factor_of_the_component_that_scores() -> None:
    judge = RewardJudge(lambda _, texts: {"reward": [0.0] * len(texts), "length": [float(len(text)) for text in texts]})
    [found] = score_completions(judge, ["a"], [["b", "ccc"]], "length", 0.5)
    assert found.scores == [0.5, 1.5] and found.win_rates[0] == pytest.approx((0.5 + 1 / (1 + math.e)) / 2)


def test_processes_share_the_completions(policies: list[str], tmp_path: Path) -> None:
    def rewards(folder: Path) -> tuple[list[float], list[int]]:
        sizes: list[int] = []

        def counted(rows: Sequence[Any], pad_token_id: int) -> Sequences:
            sizes.append(len(rows))
            return pad_sequences(rows, pad_token_id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "pad_sequences", counted)
            spec = model_spec(dtype="float64")
            found = sequence_rewards(config(folder), spec, PAD, policies, SEQUENCES, COEFFICIENTS)
        return list(found.values()), sizes

    first, second = in_two_processes(tmp_path, rewards)
    shutil.rmtree(tmp_path / "cache")
    alone, sizes = rewards(tmp_path)
    assert first[0] == second[0] == alone
    assert sizes == [3, 1] * 3 and first[1] == [3] * 3 and second[1] == [1] * 3


# --- what the loss leads to ----------------------------------------------------------------------------------------

FIRST = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4]], dtype=torch.float64).log()
R1 = torch.tensor([[1.0, 0.0, -0.5, 0.3], [0.2, -1.0, 0.7, 0.0]], dtype=torch.float64)
R2 = torch.tensor([[-1.5, 0.4, 1.0, 0.2], [0.0, 1.2, -0.8, 0.5]], dtype=torch.float64)
BETAS = (0.5, 0.8, 0.3)


def rows(policy: Tensor, reference: Tensor, labels_by: Tensor, earlier: Tensor) -> PairLogps:
    """Return all ordered pairs of the responses to each prompt, with the labels of Bradley and Terry."""
    count = policy.shape[1]
    i, j = (place.flatten() for place in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    i, j = i[i != j], j[i != j]
    return PairLogps(
        policy[:, i].flatten(),
        policy[:, j].flatten(),
        reference[:, i].flatten(),
        reference[:, j].flatten(),
        preference=(labels_by[:, i] - labels_by[:, j]).sigmoid().flatten(),
        features={"earlier_reward": torch.stack([earlier[:, i].flatten(), earlier[:, j].flatten()], 1)},
    )


def trained(loss: Any, reference: Tensor, labels_by: Tensor, earlier: Tensor, beta: float) -> Tensor:
    """Return the ``(P, R)`` log-probs of the policy at which the loss over all pairs is least."""

    def objective(logits: Tensor) -> Tensor:
        return loss(rows(logits.log_softmax(-1), reference, labels_by, earlier), alpha=0.0, beta=beta).mean()

    found = minimize(objective, reference, beta)
    assert found is not None
    return found


def implicit(after: Tensor, before: Tensor, beta: float) -> Tensor:
    return beta * (after - before)


NONE = torch.zeros_like(R1)


@pytest.fixture(scope="module")
def after_first() -> Tensor:
    return trained(SequentialPOLoss(), FIRST, R1, NONE, BETAS[0])


def mean(values: Tensor, policy: Tensor) -> Tensor:
    """Return the ``(P,)`` expectation of a reward under a policy."""
    return (policy.exp() * values).sum(-1)


def test_first_round_is_dpo(after_first: Tensor) -> None:
    assert after_first == pytest.approx((FIRST + R1 / BETAS[0]).log_softmax(-1), abs=1e-7)
    assert trained(DPOLoss(), FIRST, R1, NONE, BETAS[0]) == pytest.approx(after_first, abs=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.5])
def test_second_round_adds_the_earlier_reward(weight: float, after_first: Tensor) -> None:
    earlier = weight * implicit(after_first, FIRST, BETAS[0])
    found = trained(SequentialPOLoss(), after_first, R2, earlier, BETAS[1])
    assert found == pytest.approx((after_first + (R2 + weight * R1) / BETAS[1]).log_softmax(-1), abs=1e-7)
    if weight == 0:
        assert found == pytest.approx(trained(DPOLoss(), after_first, R2, earlier, BETAS[1]), abs=1e-7)


def test_third_round_adds_what_the_second_round_kept_too(after_first: Tensor) -> None:
    """The implicit reward of a round is its own reward and what it kept of earlier ones."""
    r3, weights = R1.flip(1), (0.4, 0.6)
    kept = implicit(after_first, FIRST, BETAS[0])
    second = trained(SequentialPOLoss(), after_first, R2, weights[0] * kept, BETAS[1])
    earlier = weights[0] * kept + weights[1] * implicit(second, after_first, BETAS[1])
    found = trained(SequentialPOLoss(), second, r3, earlier, BETAS[2])
    tilt = r3 + (weights[0] + weights[1] * weights[0]) * R1 + weights[1] * R2
    assert found == pytest.approx((second + tilt / BETAS[2]).log_softmax(-1), abs=1e-6)


def test_weight_protects_the_earlier_reward(after_first: Tensor) -> None:
    """The earlier reward grows with the weight at the rate of its variance, and the new reward pays for it."""
    kept, weights = implicit(after_first, FIRST, BETAS[0]), torch.linspace(0, 3, 13).tolist()
    policies = [trained(SequentialPOLoss(), after_first, R2, c * kept, BETAS[1]) for c in weights]
    old = torch.stack([mean(R1, policy) for policy in policies])
    new = torch.stack([mean(R2, policy) for policy in policies])
    assert (old.diff(dim=0) > 0).all() and (new.diff(dim=0) < 0).all()
    # Without the constraint the round forgets, and with a large weight it does not.
    floor = mean(R1, after_first)
    assert (old[0] < floor).all() and (old[-1] > floor).all()
    step = 1e-4
    for policy, c in zip(policies, weights, strict=True):
        further = trained(SequentialPOLoss(), after_first, R2, (c + step) * kept, BETAS[1])
        variance = mean(R1**2, policy) - mean(R1, policy) ** 2
        assert (mean(R1, further) - mean(R1, policy)) / step == pytest.approx(variance / BETAS[1], rel=1e-3)


def test_weight_is_the_multiplier_of_a_floor_under_the_earlier_reward(after_first: Tensor) -> None:
    """At the weight that keeps the earlier reward, the policy is the best one that keeps it."""
    one = slice(0, 1)
    start, r1, r2, beta = after_first[one], R1[one], R2[one], BETAS[1]
    kept = implicit(start, FIRST[one], BETAS[0])
    low, high = 0.0, 3.0
    for _ in range(25):
        middle = (low + high) / 2
        found = trained(SequentialPOLoss(), start, r2, middle * kept, beta)
        low, high = (middle, high) if mean(r1, found) < mean(r1, start) else (low, middle)

    def value(policy: Tensor) -> Tensor:
        return mean(r2, policy) - beta * mean(policy - start, policy)

    assert 0.1 < low < 2.9 and mean(r1, found) == pytest.approx(mean(r1, start), abs=1e-5)
    others = found + 0.3 * torch.randn(2000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = others.log_softmax(-1)
    allowed = mean(r1, others) >= mean(r1, found)
    assert allowed.sum() > 100 and (value(others[allowed]) <= value(found)).all()
    assert (value(others) > value(found)).any()  # The constraint binds.


def test_earlier_ties_have_no_effect(after_first: Tensor) -> None:
    given = rows(after_first.flip(1).log_softmax(-1), after_first, R2, NONE)
    tied = replace(given, features={"earlier_reward": torch.full_like(given.features["earlier_reward"], 7.5)})
    values = [SequentialPOLoss()(pair, alpha=0.0, beta=BETAS[1]) for pair in (given, tied)]
    assert torch.equal(*values) and torch.equal(values[0], DPOLoss()(given, alpha=0.0, beta=BETAS[1]))
