"""The final evaluation, and a later one, use the loss and the reference that a run trained beside its policy."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from spo.config.compose import compose
from spo.errors import UserError
from spo.stages.evaluate import evaluate_command
from spo.stages.train import train
from tests.commands import rows

PLUGIN = """
    import torch
    from torch import nn

    from spo.losses import DPOLoss, LabelledLoss, Term
    from spo.models import FrozenReference


    class Scaled(DPOLoss, nn.Module):
        '''DPO whose rewards have a trained scale, with a metric of its own.'''

        extra_metrics = ("scaled/gap",)

        def __init__(self, label_smoothing=0.0):
            super().__init__(label_smoothing)
            nn.Module.__init__(self)
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.drop = nn.Dropout(0.5)

        def of_pairs(self, pair, *, alpha, beta):
            return self.scale * super().of_pairs(pair, alpha=alpha, beta=beta)

        def rewards(self, pair, *, alpha, beta):
            return tuple(self.scale * reward for reward in super().rewards(pair, alpha=alpha, beta=beta))

        def metrics(self, pair, /, *, alpha, beta):
            gap = self.drop(self.scale * pair.policy_chosen)
            return super().metrics(pair, alpha=alpha, beta=beta) | {"scaled/gap": gap}


    class Running(DPOLoss, nn.Module):
        '''DPO whose rewards are relative to a running mean.'''

        extra_metrics = ("running/steps",)

        def __init__(self, label_smoothing=0.0):
            super().__init__(label_smoothing)
            nn.Module.__init__(self)
            self.register_buffer("steps", torch.zeros(()))

        def update_statistics(self, pair):
            self.steps += 1

        def rewards(self, pair, *, alpha, beta):
            return tuple(reward * self.steps for reward in super().rewards(pair, alpha=alpha, beta=beta))

        def metrics(self, pair, /, *, alpha, beta):
            steps = self.steps.expand(len(pair))
            return super().metrics(pair, alpha=alpha, beta=beta) | {"running/steps": steps}


    class Prefix(DPOLoss):
        '''DPO with a metric from the tokens of policy and reference, which pairs of long completions do not have.'''

        terms = {"ratio": Term(lambda s: s.common_prefix(s.policy_tokens - s.reference_tokens), True)}
        extra_metrics = ("prefix/short",)

        def metrics(self, pair, /, *, alpha, beta):
            short = pair.terms["ratio"][0].where(pair.chosen_length < 3, torch.nan)
            return super().metrics(pair, alpha=alpha, beta=beta) | {"prefix/short": short}


    class Labelled(LabelledLoss):
        extra_metrics = ("labelled/gap", "labelled/never")

        def of_labels(self, logps, *, alpha, beta):
            return -((2 * logps.label - 1) * beta * (logps.policy - logps.reference)).sigmoid()

        def metrics(self, logps, /, *, alpha, beta):
            never = torch.full_like(logps.policy, torch.nan)
            own = {"labelled/gap": logps.policy.where(logps.label > 0.5, torch.nan), "labelled/never": never}
            return super().metrics(logps, alpha=alpha, beta=beta) | own


    class Following(FrozenReference):
        moves = True

        @torch.no_grad()
        def after_step(self, policy, step):
            for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(new, 0.5)
    """
CASES = {
    "dpo": [],
    "precomputed": ["reference=precomputed"],
    "bfloat16": ["trainer.precision=bf16-mixed", "model=tiny", "optimizer.lr=0.003", "sft.max_steps=20"],
    "scaled": ["method.loss._target_=evaluated_plugin.Scaled"],
    "running": ["method.loss._target_=evaluated_plugin.Running"],
    "prefix": ["method.loss._target_=evaluated_plugin.Prefix"],
    "following": ["reference._target_=evaluated_plugin.Following"],
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "evaluated_plugin.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def trained(folder: Path, *words: str) -> tuple[Path, dict[str, float]]:
    """Train on an enumerable language, whose selection and test split are the same pairs."""
    settings = ["experiment=exact/common", "method=dpo", "optimizer.lr=0.1", "trainer.max_steps=4", "judge=none"]
    settings += ["logger=record", f"paths.cache={folder / 'cache'}", *words]
    return folder / "run", train(compose(settings, run_dir=folder / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_final_evaluation_repeats_the_last_validation(name: str, plugin: Path) -> None:
    run, metrics = trained(plugin, *CASES[name])
    shared = [key for key in metrics if key.startswith("eval/") and f"val/{key[5:]}" in metrics]
    own = {"scaled": {"scaled/gap"}, "running": {"running/steps"}, "prefix": {"prefix/short"}}.get(name, set())
    assert {key[5:] for key in shared} >= {"rewards/margins", "rewards/accuracies", *own}
    last = [row for row in rows(run / "history.jsonl") if "val/rewards/margins" in row][-1]
    allowed = [word.partition("=")[2] for word in CASES[name] if "plugin" in word]
    # In bfloat16, other batches round in other ways.
    again = evaluate_command(run, [] if name == "bfloat16" else ["data.eval_batch_size=7"], allowed)
    for key in shared:
        if key[5:].startswith(("rewards/", *own)):
            assert last[f"val/{key[5:]}"] == pytest.approx(metrics[key], abs=1e-5), key
            assert again[key] == pytest.approx(metrics[key], abs=1e-5), key
    assert metrics["eval/rewards/margins"] > 1e-4
    if name == "running":  # An evaluation does not count as a step.
        assert metrics["eval/running/steps"] == again["eval/running/steps"] == 4
    if name == "following":
        assert metrics["eval/kl"] > 0 and not json.loads((run / "metrics.json").read_text()).keys() & {"exact/tv"}
        (run / "reference.safetensors").unlink()
        with pytest.raises(UserError, match=r"reference\.safetensors is missing"):
            evaluate_command(run, [], allowed)


@pytest.mark.slow
def test_labelled_completions_have_the_metrics_of_single_completions(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, metrics = trained(plugin, "~method.loss.label_smoothing", "method.loss._target_=evaluated_plugin.Labelled")
    panel = capsys.readouterr().out.partition("learning rate")[0]
    assert "test completions" in panel and "completions, about" in panel and "pairs" not in panel
    of_pairs = {
        f"{split}/{name}" for split in ("train", "val", "eval") for name in ("rewards/margins", "labelled/never")
    }
    assert not metrics.keys() & of_pairs and not any("calibration" in key for key in metrics)
    assert metrics["val/rewards/chosen"] > metrics["val/rewards/rejected"]
    assert metrics["eval/labelled/gap"] == pytest.approx(metrics["val/labelled/gap"], abs=1e-5)
    assert metrics["exact/entropy"] > 0 and "exact/tv" not in metrics
    again = evaluate_command(run, [], ["evaluated_plugin.Labelled"])
    assert again["eval/labelled/gap"] == pytest.approx(metrics["eval/labelled/gap"], abs=1e-6)


@pytest.mark.slow
def test_moved_reference_does_not_move_what_samples_are_compared_with(plugin: Path) -> None:
    _, metrics = trained(plugin, *CASES["following"])
    _, plain = trained(plugin / "other", "reference=frozen")
    # The loss reads a reference near the policy, so its margins are smaller.
    assert metrics["eval/rewards/margins"] < 0.7 * plain["eval/rewards/margins"]
    assert metrics["eval/reference/entropy"] == plain["eval/reference/entropy"]
