"""Lists of completions from the file to the loss: best of n, rankings, and each distinct sequence forwarded once."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.config.plan import plan
from spo.data import DataError, Dropped, NoPreference, RankedFileSource, Renderer, Row, RowError, TokenizedPair
from spo.data.collate import collate
from spo.errors import ConfigProblems
from spo.losses import DPOLoss, ListLoss, PreferenceLoss, SFTLoss, SPOBestOfNLoss, SPOLoss, SPORankedLoss
from spo.models import FrozenReference
from spo.regularizers import LocalKL
from spo.types import ListLogps, PairLogps, PreferenceBatch
from tests.commands import TINY, history, job, shared_cache
from tests.helpers import (
    BOS,
    EOS,
    PAD,
    completion_logps,
    frozen,
    make_module,
    random_pairs,
    sequences,
    tiny_llama,
    tiny_tokenizer,
)

LOSSES = {"best_of_n": SPOBestOfNLoss(), "ranked": SPORankedLoss()}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
ALPHA = 0.3


def lists_of(logps: Tensor, mask: Tensor | None = None, order: Tensor | None = None, **columns: Tensor) -> ListLogps:
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    order = torch.arange(logps.shape[1]).expand_as(logps) if order is None else order
    return ListLogps(logps, mask, order, **columns)


def random_logps(*shape: int, seed: int = 0, scale: float = 20.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, generator=generator, dtype=torch.float64)


def loss_of(loss: ListLoss, lists: ListLogps, alpha: float = ALPHA) -> Tensor:
    return loss(lists, alpha=alpha, beta=1.0)


# ---------------------------------------------------------------------------------------------------------- losses


def by_loops(loss: ListLoss, lists: ListLogps, alpha: float) -> Tensor:
    """Compute the definition list by list, from probabilities."""
    losses = []
    for row in range(len(lists.policy)):
        ranking = [lists.policy[row, i] for i in lists.order[row].tolist() if lists.mask[row, i]]
        terms = []
        for k in range(len(ranking) - 1):
            total = sum((alpha * later).exp() for later in ranking[k:])
            terms.append(-((alpha * ranking[k]).exp() / total).log() / alpha)
        used = terms[:1] if isinstance(loss, SPOBestOfNLoss) else terms
        value = sum(used, torch.zeros((), dtype=torch.float64))
        losses.append(value if lists.weight is None else lists.weight[row] * value)
    return torch.stack(losses)


@EACH
@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.5])
def test_list_loss_value_and_gradient_equal_the_definition(loss: ListLoss, alpha: float) -> None:
    logps = random_logps(6, 5).requires_grad_()
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 3:], mask[2, 0], mask[3, 1:4] = False, False, False
    order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    lists = lists_of(logps, mask, order, weight=torch.linspace(0, 2, 6, dtype=torch.float64))
    ours, theirs = loss_of(loss, lists, alpha), by_loops(loss, lists, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(ours.sum(), logps)
    (expected,) = torch.autograd.grad(theirs.sum(), logps)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
    assert gradient.masked_select(~mask).abs().max() == 0


@EACH
@pytest.mark.parametrize("preference", [None, torch.tensor([1.0, 0.7, 0.5, 0.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_list_of_two_equals_a_pair(loss: ListLoss, preference: Tensor | None, dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=dtype)
    preference = None if preference is None else preference.to(dtype)
    logps = (random_logps(4, 2, scale=400.0) - 100).to(dtype).requires_grad_()
    pair = PairLogps(logps[:, 0], logps[:, 1], preference=preference, weight=weight)
    lists = lists_of(logps, weight=weight, **({} if preference is None else {"preference": preference}))
    for alpha in (0.01, 0.3, 4.0):
        settings = {"alpha": alpha, "beta": 1.0}
        ours, theirs = loss(lists, **settings), SPOLoss()(pair, **settings)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(values.sum(), logps)[0] for values in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
        ours, theirs = loss.metrics(lists, **settings), SPOLoss().metrics(pair, **settings)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            torch.testing.assert_close(values, theirs[name])


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_list_loss_at_equal_log_probs_counts_rankings(n: int) -> None:
    lists = lists_of(torch.full((2, n), -37.0, dtype=torch.float64))
    assert loss_of(SPOBestOfNLoss(), lists).tolist() == pytest.approx([math.log(n) / ALPHA] * 2)
    assert loss_of(SPORankedLoss(), lists).tolist() == pytest.approx([math.log(math.factorial(n)) / ALPHA] * 2)


@EACH
def test_list_loss_ignores_positions_and_padding(loss: ListLoss) -> None:
    logps = random_logps(3, 4)
    lists = lists_of(logps, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    value, metrics = loss_of(loss, lists), loss.metrics(lists, alpha=ALPHA, beta=1.0)
    for places in itertools.permutations(range(4)):
        moved = replace(lists, policy=logps[:, list(places)], order=torch.tensor(places).argsort().expand(3, 4))
        torch.testing.assert_close(loss_of(loss, moved), value, rtol=1e-12, atol=0)
        for name, values in loss.metrics(moved, alpha=ALPHA, beta=1.0).items():
            torch.testing.assert_close(values, metrics[name])
    nothing = torch.full((3, 2), float("nan"), dtype=torch.float64)
    padded = replace(
        lists,
        policy=torch.cat([nothing, logps], 1).requires_grad_(),
        mask=torch.tensor([False] * 2 + [True] * 4).expand(3, 6),
        order=torch.tensor([0, 2, 3, 1, 4, 5]).expand(3, 6),
    )
    torch.testing.assert_close(loss_of(loss, padded), value, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss_of(loss, padded).sum(), padded.policy)
    assert gradient.isfinite().all() and gradient[:, :2].abs().max() == 0 and gradient[:, 2:].abs().min() > 0
    for name, values in loss.metrics(padded, alpha=ALPHA, beta=1.0).items():
        torch.testing.assert_close(values, metrics[name])


@EACH
def test_list_loss_is_finite_for_extreme_log_probs(loss: ListLoss) -> None:
    logps = torch.tensor([[-9000.0, 0.0, -1.0], [0.0, -9000.0, -9000.0]]).requires_grad_()
    value = loss_of(loss, lists_of(logps))
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert value[0].item() == pytest.approx(9000, rel=1e-2)


def test_only_the_ranked_loss_uses_the_order_of_the_others() -> None:
    logps = random_logps(2, 4)
    lists, other = (lists_of(logps, order=torch.tensor(order).expand(2, 4)) for order in ([0, 1, 2, 3], [0, 3, 1, 2]))
    torch.testing.assert_close(loss_of(SPOBestOfNLoss(), lists), loss_of(SPOBestOfNLoss(), other))
    assert (loss_of(SPORankedLoss(), lists) - loss_of(SPORankedLoss(), other)).abs().min() > 0.1


def test_metrics_of_a_list() -> None:
    lists = lists_of(torch.tensor([[-2.0, -1.0, -3.0, -4.0]]), order=torch.tensor([[0, 3, 2, 1]]))
    got = {name: value.item() for name, value in SPORankedLoss().metrics(lists, alpha=0.5, beta=1.0).items()}
    assert got == {
        "rewards/chosen": pytest.approx(-1.0),
        "rewards/rejected": pytest.approx(-4 / 3),
        "rewards/margins": pytest.approx(1 / 3),
        "rewards/accuracies": pytest.approx(2 / 3),
        "logps/chosen": pytest.approx(-2.0),
        "logps/rejected": pytest.approx(-8 / 3),
    }


@EACH
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_list_loss_optimum_is_softmax_of_reward_over_alpha(loss: ListLoss, alpha: float) -> None:
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    orders = list(itertools.permutations(range(4), 3))
    chance = torch.stack([torch.stack([(rewards[i] - rewards[list(o[k:])].logsumexp(0)) for k, i in enumerate(o)]).sum()
                          for o in orders]).exp()  # fmt: skip
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([[*o, ({0, 1, 2, 3} - set(o)).pop()] for o in orders])
    mask = torch.ones(len(orders), 4, dtype=torch.bool).scatter(1, order[:, 3:], False)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(-1).expand(len(orders), 4)
        expected = (chance * loss_of(loss, lists_of(policy, mask, order), alpha)).sum()
        expected.backward()
        return expected

    for _ in range(5):
        optimizer.step(closure)
    reached, optimum = logits.detach().softmax(-1), loss.optimum(rewards, torch.zeros(4), alpha, 1.0)
    assert optimum is not None
    torch.testing.assert_close(optimum.exp(), (rewards / alpha).softmax(-1))
    torch.testing.assert_close(reached, optimum.exp(), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- batches


def a_list(prompt: tuple[int, ...], *completions: tuple[int, ...], **columns: Any) -> TokenizedPair:
    chosen, rejected, *worse = completions
    return TokenizedPair(prompt, chosen, rejected, "", "", "", "", worse_ids=tuple(worse), **columns)


A, B, C, D = (3, EOS), (4, 5, EOS), (6, EOS), (7, 8, 9, EOS)


def test_batch_of_lists_of_different_lengths() -> None:
    lists = [a_list((BOS, 10), A, B), a_list((BOS, 11), C, A, D, B), a_list((BOS, 10), B, C, A)]
    reference = torch.arange(12.0).reshape(3, 4)
    batch = collate(lists, [0, 1, 2], PAD, reference)
    # A and B after the prompt 10 are in two lists.
    assert batch.completions is not None
    assert batch.completions.tolist() == [[0, 1, 2], [2, 3, 4], [-1, 5, 0], [-1, 6, -1]]
    assert batch.sequences.completion_length.tolist() == [2, 2, 3, 2, 2, 4, 3]
    assert batch.reference_logps is not None and batch.reference_logps.tolist() == [0, 4, 8, 5, 9, 6, 7]
    seen = ListLogps.of_batch(batch, -torch.arange(1.0, 8.0), batch.reference_logps)
    assert seen.mask.tolist() == [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert seen.policy.tolist() == [[-1, -3, 0, 0], [-2, -4, -6, -7], [-3, -5, -1, 0]]
    assert seen.reference is not None and seen.reference.tolist() == [[0, 8, 0, 0], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert batch.mean_per_pair(torch.arange(1.0, 8.0)).tolist() == [2, 4.75, 3]
    pair = PairLogps.of_batch(batch, -torch.arange(1.0, 8.0), None)
    assert pair.policy_rejected is not None and pair.policy_rejected.tolist() == [-3, -4, -5]


def unmerged(pairs: list[TokenizedPair]) -> PreferenceBatch:
    """Chosen ones first, then rejected ones, repetitions and all, as a batch built by hand."""
    rows = [(pair.prompt_ids, pair.completions[side]) for side in (0, 1) for pair in pairs]
    merged = collate(pairs, range(len(pairs)), PAD)
    return replace(merged, sequences=sequences(rows), completions=None, reference_logps=None)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("loss", [SPOLoss(), DPOLoss(), SPORankedLoss()], ids=lambda loss: type(loss).__name__)
def test_shared_sequence_is_forwarded_once(loss: PreferenceLoss, precomputed: bool) -> None:
    columns = {"preference": 0.8, "weight": 1.5}
    pairs = [
        TokenizedPair((BOS, prompt), *chosen, "", "", "", "", **columns)
        for prompt in (10, 11)
        for chosen in itertools.permutations((A, B, C, D), 2)
    ]
    reference = frozen(tiny_llama(1))
    merged, plain = collate(pairs, range(24), PAD), unmerged(pairs)
    assert (len(merged.sequences), len(plain.sequences)) == (8, 48)
    if precomputed:
        with torch.no_grad():
            table = completion_logps(reference, plain.sequences).view(2, 24).T
        merged = collate(pairs, range(24), PAD, table)
        plain = replace(plain, reference_logps=table.T.flatten())

    def outcome(batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        policy = tiny_llama(0, scale=0.1)
        module = make_module(
            policy,
            loss=loss,
            regularizer=LocalKL(0.5),
            reference=FrozenReference(),
            reference_model=reference,
        )
        scored = module.pairs.score(batch)
        losses, metrics = module.pairs.losses(scored.inputs_of(loss), 0)
        divergence = module.regularization.on_pairs(scored)
        assert divergence is not None
        (losses.sum() + 0.5 * divergence.sum()).backward()
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        return losses, {**metrics, "divergence": divergence}, gradients

    (losses, metrics, gradients), (plain_losses, plain_metrics, plain_gradients) = outcome(merged), outcome(plain)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-6, atol=1e-6)
    largest = max(g.abs().max().item() for g in plain_gradients.values())
    # Llama's norms are float32 inside.
    torch.testing.assert_close(gradients, plain_gradients, rtol=0, atol=1e-5 * largest)


# -------------------------------------------------------------------------------------------------------- rendering


def rendered(row: Row, max_length: int = 20, truncation: Any = "drop_pair") -> TokenizedPair | Dropped:
    return Renderer(tiny_tokenizer(), max_length, truncation).render(row)


def test_list_is_rendered_like_its_pairs() -> None:
    row = Row("w5 w6", " w7", " w8 w9", worse=(" w10", " w7 w7"))
    got = rendered(row)
    assert isinstance(got, TokenizedPair)
    assert got.prompt_ids == (BOS, 5, 6) and got.repeated == 0
    assert got.completions == ((7, EOS), (8, 9, EOS), (10, EOS), (7, 7, EOS))
    assert got.texts == (" w7", " w8 w9", " w10", " w7 w7")


def test_repeated_completion_keeps_its_best_rank() -> None:
    got = rendered(Row("w5", " w7", " w8", worse=(" w7", "  w8", " w9")))
    assert isinstance(got, TokenizedPair) and got.repeated == 2
    assert got.completions == ((7, EOS), (8, EOS), (9, EOS))
    assert rendered(Row("w5", " w7", "  w7", worse=(" w7",), where="here")) == Dropped("identical", "here")


def test_truncation_drops_the_whole_list() -> None:
    row = Row("w5 w6", " w7", " w8 w9 w10", worse=(" w8 w9 w11",))
    assert rendered(row, 6) == Dropped("too_long", "")
    cut = rendered(row, 5, "trim_completion")
    assert isinstance(cut, TokenizedPair) and cut.truncated
    assert cut.completions == ((7, EOS), (8, 9)) and cut.texts == (" w7", "w8w9") and cut.repeated == 1
    moved = rendered(row, 6, "trim_prompt")
    assert isinstance(moved, TokenizedPair) and moved.prompt_ids == (BOS, 6) and len(moved.completions) == 3


# ---------------------------------------------------------------------------------------------------------- sources


def source(folder: Path, *rows: Any, max_responses: int | None = None, on_bad_row: Any = "stop", **columns: str) -> Any:
    file = folder / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RankedFileSource(str(file), columns, on_bad_row, max_responses)


def read(made: RankedFileSource) -> list[tuple[Any, ...]]:
    return [(row.chosen, row.rejected, *row.worse) for row in made.rows(lambda prompts, n: [])]


GOOD = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.1, 3, -2]}


def test_scores_and_order_rank_the_responses(tmp_path: Path) -> None:
    turn = [[{"role": "assistant", "content": text}] for text in "ab"]
    talk = {"prompt": [{"role": "user", "content": "hi"}], "responses": turn, "order": [1, 0]}
    ordered = {"prompt": "p", "responses": ["a", "b", "c"], "order": [2, 0, 1], "scores": [1, 1, 1], "weight": 2}
    made = source(tmp_path, GOOD, ordered, talk)
    assert read(made) == [("b", "a", "c"), ("c", "a", "b"), (tuple(turn[1]), tuple(turn[0]))]
    assert not made.dropped_responses and made.yields_lists and made.counts == {"read": 3, "skipped": 0}
    assert [row.weight for row in made.rows(lambda prompts, n: [])] == [None, 2, None]
    named = source(tmp_path, {"q": "p", "answers": ["a", "b"], "points": [0, 1]}, prompt="q", responses="answers",
                   scores="points")  # fmt: skip
    assert read(named) == [("b", "a")]


def test_ranked_lists_from_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "lists.parquet")
    assert read(RankedFileSource(str(tmp_path), None, "stop", None)) == [("b", "a", "c")]


def test_rows_without_a_preference_are_skipped_and_counted(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["a", " ", "b", "c", "a", "d"], "scores": [5, 6, 3, 3, 1, 0]}
    made = source(tmp_path, row)
    [kept] = read(made)
    assert kept in [("a", "b", "d"), ("a", "c", "d")]
    assert made.dropped_responses == {"empty": 1, "equal": 1, "tied": 1}
    # Which of the tied ones stays does not follow from their place in the file.
    swapped = {**row, "responses": ["a", " ", "c", "b", "a", "d"]}
    assert read(source(tmp_path, swapped)) == [kept]
    pick = [read(source(tmp_path, {"prompt": "p", "responses": [f"x{i}", f"y{i}", "z"], "scores": [1, 1, 0]}))[0][0][0]
            for i in range(20)]  # fmt: skip
    assert set(pick) == {"x", "y"}
    nothing = source(tmp_path, {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}, GOOD)
    assert read(nothing) == [("b", "a", "c")] and not nothing.dropped_responses
    assert [type(bad) for bad in nothing.bad_rows] == [NoPreference]


def test_max_responses_ignores_the_rank(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(6)]
    rows = [{"prompt": "p", "responses": texts, "order": list(o)} for o in itertools.permutations(range(6))][::7]
    made = source(tmp_path, *rows, max_responses=3)
    got = read(made)
    assert len({frozenset(kept) for kept in got}) == 1
    ranks = [[texts[i] for i in row["order"]] for row in rows]  # type: ignore[attr-defined]
    assert all(list(kept) == [t for t in rank if t in kept] for kept, rank in zip(got, ranks, strict=True))
    assert made.yields_lists and not source(tmp_path, GOOD, max_responses=2).yields_lists
    with pytest.raises(DataError, match=r"data.source.max_responses=1: a ranking needs at least 2"):
        source(tmp_path, GOOD, max_responses=1)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"responses": ["a"], "scores": [1]}, "responses", "at least 2 responses, not 1"),
    ({"responses": "a b"}, "responses", "must be a list, not text"),
    ({"responses": ["a", 3, "c"]}, "responses", "response 2 must be text or a list of messages, not a number"),
    ({"responses": ["a", [{"role": "assistant", "content": "b"}], "c"]}, "responses", "must all be text"),
    ({"scores": [1, 2]}, "scores", "has 2 numbers for 3 responses"),
    ({"scores": [1, float("nan"), 2]}, "scores", "score 2 must be finite, not nan"),
    ({"scores": [1, True, 2]}, "scores", "score 2 must be a number, not true or false"),
    ({"scores": None}, "scores", "must be a list, not null"),
    ({"order": [0, 1]}, "order", "must contain each of 0 to 2 once"),
    ({"order": [1, 2, 3]}, "order", "must contain each of 0 to 2 once"),
    ({"order": [0, 0, 1]}, "order", "must contain each of 0 to 2 once"),
    ({"order": [0, "1", 2]}, "order", "must contain each of 0 to 2 once"),
    ({"weight": -1}, "weight", "finite and not negative"),
    ({"prompt": None}, "prompt", "must be text or a list of messages, not null"),
]


@pytest.mark.parametrize(("change", "column", "reason"), BAD, ids=lambda value: str(value)[:30])
def test_bad_row_error_names_line_and_column(change: dict[str, Any], column: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=reason) as error:
        read(source(tmp_path, GOOD, {**GOOD, **change}))
    assert str(error.value).startswith(f"{tmp_path / 'lists.jsonl'}, line 2: column {column!r}")
    made = source(tmp_path, GOOD, {**GOOD, **change}, on_bad_row="skip")
    assert read(made) == [("b", "a", "c")] and made.counts == {"read": 2, "skipped": 1}


def test_missing_columns_and_unknown_names(tmp_path: Path) -> None:
    for column in ("prompt", "responses", "scores"):
        with pytest.raises(RowError, match=r"missing; the row has .*data\.source\.columns maps") as error:
            read(source(tmp_path, {key: value for key, value in GOOD.items() if key != column}))
        assert error.value.column == column
    with pytest.raises(DataError, match="choose from prompt, responses, scores, order, weight"):
        read(source(tmp_path, GOOD, chosen="best"))


# ----------------------------------------------------------------------------------------------------- composition


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{**GOOD, "prompt": f"p {i}"} for i in range(40)]
    source(tmp_path, *rows)
    return tmp_path / "lists.jsonl"


@pytest.mark.parametrize("method", ["spo", "spo_weighted", "dpo", "ipo"])
def test_pair_methods_reject_lists(method: str, file: Path) -> None:
    words = ["data=ranked_jsonl", f"data.path={file}", f"method={method}"]
    with pytest.raises(ConfigProblems) as error:
        plan(words)
    message = str(error.value)
    assert f"method={method} compares two completions" in message and "data.source.max_responses=2" in message
    assert "method=spo_best_of_n or method=spo_ranked" in message
    assert plan([*words, "data.source.max_responses=2"]).jobs


@pytest.mark.parametrize("method", ["spo_best_of_n", "spo_ranked", "sft"])
def test_list_methods_accept_lists(method: str, file: Path) -> None:
    assert plan(["data=ranked_jsonl", f"data.path={file}", f"method={method}"]).jobs


def test_max_responses_must_be_at_least_two(file: Path) -> None:
    with pytest.raises(ConfigProblems, match=r"data\.source\.max_responses=1: must be at least 2"):
        plan(["data=ranked_jsonl", f"data.path={file}", "method=spo_ranked", "data.source.max_responses=1"])


def test_sft_uses_the_best_completion_alone() -> None:
    lists = [a_list((BOS, 10), A, B, C), a_list((BOS, 11), C, A)]
    policy = tiny_llama(0)
    batch = collate(lists, range(2), PAD)
    logps = make_module(policy, loss=SFTLoss()).pairs.score(batch).inputs_of(SFTLoss())
    losses = SFTLoss()(logps, alpha=1.0, beta=1.0)  # type: ignore[arg-type]
    best = sequences([((BOS, 10), A), ((BOS, 11), C)])
    torch.testing.assert_close(losses, -completion_logps(policy, best))


def test_list_methods_on_pairs_train_like_spo(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = shared_cache(tmp_path_factory)
    runs = {}
    for method in ("spo", "spo_ranked", "spo_best_of_n"):
        metrics = job(tmp_path / method, cache, TINY, f"method={method}", "data.source.labels=soft")
        runs[method] = [*history(tmp_path / method), metrics]
    for method in ("spo_ranked", "spo_best_of_n"):
        for ours, theirs in zip(runs[method], runs["spo"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_training_step_passes_lists_to_the_loss() -> None:
    pairs = random_pairs(6, seed=3)
    lists = [replace(pair, worse_ids=((9, EOS), (8, EOS))) if i % 2 else pair for i, pair in enumerate(pairs)]
    policy = tiny_llama(0)
    batch = collate(lists, range(6), PAD)
    logps = make_module(policy, loss=SPORankedLoss()).pairs.score(batch).inputs_of(SPORankedLoss())  # type: ignore[arg-type]
    got = loss_of(SPORankedLoss(), logps)  # type: ignore[arg-type]
    for i, one in enumerate(lists):
        alone = completion_logps(policy, sequences([(one.prompt_ids, c) for c in one.completions]))
        torch.testing.assert_close(got[i], loss_of(SPORankedLoss(), lists_of(alone[None]))[0], rtol=1e-6, atol=1e-6)
