"""Our DPO and IPO against TRL's DPOTrainer: its own code, run on the same log-probs and on the same tokens."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.data import FileSource, HHSource, Renderer, TokenizedPair
from spo.data.collate import collate
from spo.losses import DPOLoss, IPOLoss, PreferenceLoss
from spo.models import FrozenReference
from spo.types import PairLogps
from tests.data.tokenizers_built_here import build
from tests.fixtures import write_alpaca_like, write_hh_like
from tests.helpers import make_module, model_spec, tiny_llama

pytest.importorskip("trl", reason="trl is not installed")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SPO_DATA_DIR", ROOT / "../shared/data"))
LOSSES: dict[str, PreferenceLoss] = {"sigmoid": DPOLoss(), "ipo": IPOLoss(length_normalize=True)}
BETA = 0.1


def trl_trainer(model: nn.Module, reference: nn.Module, tokenizer: Any, loss_type: str, folder: Path) -> Any:
    """Return a DPOTrainer as a user would make it; its data set is unused, since tests pass batches by hand."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder),
        loss_type=[loss_type],
        beta=BETA,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        disable_dropout=True,
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    return DPOTrainer(model, reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def given_pairs(dtype: torch.dtype) -> tuple[PairLogps, list[Tensor], list[Tensor], Tensor]:
    """Per-token log-probs of policy and reference, four pairs each, and their sums as our losses take them."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9)[None, :] < torch.tensor([3, 9, 5, 7, 8, 2, 9, 4])[:, None]
    tokens = [-2 * torch.rand(8, 9, generator=generator, dtype=dtype) * mask for _ in range(2)]
    policy, reference = tokens
    policy.requires_grad_()
    sums, reference_sums, length = policy.sum(1), reference.sum(1), mask.sum(1).to(dtype)
    pair = PairLogps(sums[:4], sums[4:], reference_sums[:4], reference_sums[4:], length[:4], length[4:])
    return pair, [policy], [reference], mask


class TalliedModel(nn.Module):
    """Answers TRL's forward with given per-token log-probs."""

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.logps = logps

    def forward(self, **_: Any) -> Any:
        nothing = torch.zeros_like(self.logps.detach())
        return SimpleNamespace(
            log_probs=self.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), aux_loss=None
        )


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_trl_on_given_log_probs(loss_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair, [policy], [reference], mask = given_pairs(dtype)
    tokenizer = build("adds_bos")
    vocabulary = {"vocab_size": len(tokenizer), "dtype": torch.float32}
    trainer = trl_trainer(tiny_llama(0, **vocabulary), tiny_llama(1, **vocabulary), tokenizer, loss_type, tmp_path)
    trainer.ref_model = TalliedModel(reference)
    prompt_and_completion = torch.cat([torch.zeros(8, 1, dtype=torch.bool), mask], dim=1).long()
    inputs = {
        "input_ids": torch.ones(8, 10, dtype=torch.long),
        "attention_mask": torch.ones(8, 10, dtype=torch.long),
        "completion_mask": prompt_and_completion,
    }
    theirs = trainer._compute_loss(TalliedModel(policy), inputs, return_outputs=False)
    ours = LOSSES[loss_type](pair, alpha=1.0, beta=BETA).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (our_gradient,) = torch.autograd.grad(ours, policy)
    (their_gradient,) = torch.autograd.grad(theirs, policy)
    torch.testing.assert_close(our_gradient * mask, their_gradient * mask, rtol=1e-6, atol=1e-6)


def assert_parity(
    model: nn.Module, reference: nn.Module, tokenizer: Any, pairs: list[TokenizedPair], loss_type: str, folder: Path
) -> None:
    """One batch through our module and through TRL's collator and loss."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    module = make_module(
        model, loss=LOSSES[loss_type], reference=FrozenReference(), reference_model=reference, beta=BETA
    )
    pair = module.pairs.score(collate(pairs, range(len(pairs)), pad)).inputs_of(module.loss)
    losses, metrics = module.pairs.losses(pair, 0)
    losses.mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()

    trainer = trl_trainer(model, reference, tokenizer, loss_type, folder)
    examples = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids or ())}
        for p in pairs
    ]
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(examples), return_outputs=False)
    theirs.backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    logged = {key: values[0] for key, values in trainer._metrics["train"].items()}
    # TRL's rewards are sums for IPO too
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies") if loss_type == "sigmoid" else ()
    for key in ("logps/chosen", "logps/rejected", *rewards):
        assert metrics[key].mean().item() == pytest.approx(logged[key], rel=1e-5, abs=1e-4), key
    difference = sum(float((ours[name] - p.grad).square().sum()) for name, p in model.named_parameters())  # type: ignore[operator]
    norm = sum(float(gradient.square().sum()) for gradient in ours.values())
    assert norm > 0 and (difference / norm) ** 0.5 < 1e-5


def some_pairs(source: Any, tokenizer: Any, limit: int) -> list[TokenizedPair]:
    """Six pairs that fit, of different prompts and lengths, without soft labels, which TRL does not have."""
    renderer = Renderer(tokenizer, limit, "drop_pair")
    pairs: dict[str, TokenizedPair] = {}
    for row in source.rows(lambda prompts, n: []):
        rendered = renderer.render(row) if len(pairs) < 6 else None
        if isinstance(rendered, TokenizedPair):
            pairs[rendered.prompt_id] = replace(rendered, preference=None)
    assert len({len(pair.chosen_ids) for pair in pairs.values()}) > 4
    return list(pairs.values())


def source_of(kind: str, path: Path) -> Any:
    if kind == "hh":
        return HHSource(path=str(path), on_bad_row="skip")
    return FileSource(path=str(path), on_bad_row="skip", columns=None)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", ["alpaca", "hh"])
def test_trl_parity_on_real_pairs(kind: str, loss_type: str, tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("no SPO_DATA_DIR")
    spec = model_spec(attn_implementation="sdpa")
    folder = DATA / "stories260K"
    tokenizer = spec.tokenizer(folder)
    name = {"alpaca": "alpaca_eval_pairs.train.jsonl.gz", "hh": "hh_rlhf_harmless_base.part1.jsonl.gz"}[kind]
    pairs = some_pairs(source_of(kind, DATA / name), tokenizer, 512)
    model, reference = spec.policy(folder, seed=0), spec.start(folder)
    with torch.no_grad():  # away from the reference, where every margin would be 0
        for i, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    assert_parity(model, reference, tokenizer, pairs, loss_type, tmp_path)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", ["alpaca", "hh"])
def test_trl_parity_on_generated_pairs(kind: str, loss_type: str, tmp_path: Path) -> None:
    tokenizer = build("adds_bos")
    write = write_hh_like if kind == "hh" else write_alpaca_like
    pairs = some_pairs(source_of(kind, write(tmp_path / "pairs.jsonl.gz", 60, seed=0)), tokenizer, 512)
    model, reference = (
        tiny_llama(seed, vocab_size=len(tokenizer), scale=0.1, dtype=torch.float32, max_position_embeddings=512)
        for seed in (0, 1)
    )
    assert_parity(model.train(), reference, tokenizer, pairs, loss_type, tmp_path / "trl")
