"""The experiments of the SPO paper: their arms, and the whole pipeline of each arm on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate

from spo.config.compose import compose, composer
from tests.commands import TINY, job, shared_cache
from tests.fixtures import write_alpaca_like
from tests.helpers import save_model

INPUT = {"stories": ["model.path=M"], "alpacafarm": ["model.path=M", "data.path=P"]}


@pytest.mark.parametrize("name", INPUT)
def test_arms_are_both_regularizers(name: str) -> None:
    with composer() as composed:
        hydra = composed([f"experiment=paper/{name}", *INPUT[name]]).hydra
    assert hydra.mode.name == "MULTIRUN" and hydra.sweep.dir.endswith(f"sweeps/paper/{name}")
    params = hydra.sweeper.params
    assert params.regularizer == "global_kl,local_kl" and params.seed == "1,2,3"
    assert all(method.startswith("spo") for method in params.method.split(","))


def test_settings_of_the_experiments() -> None:
    cfg = compose(["experiment=paper/alpacafarm", *INPUT["alpacafarm"], "optimizer.lr=1e-5"])
    assert (cfg.model.lora.r, cfg.reference._target_) == (64, "spo.models.AdapterOffReference")
    assert cfg.data.max_new_tokens == 300 and cfg.trainer.max_epochs == 1
    cfg = compose(["experiment=paper/stories", *INPUT["stories"], "optimizer.lr=1e-5"])
    assert cfg.sft.max_steps == 200 and cfg.model.lora is None
    assert cfg.judge._target_ == "spo.evaluation.judges.reward_judge"


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["global_kl", "local_kl"])
def test_stories_train_a_tiny_model(regularizer: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, tokenizer = instantiate(compose([]).model.initial)()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["experiment=paper/stories", TINY, f"model.path={tmp_path / 'model'}", f"regularizer={regularizer}"]
    words += ["model.default_sft_lr=0.01", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    metrics = job(tmp_path / "run", shared_cache(tmp_path_factory), *words)
    assert metrics["data/pairs_used"] > 0 and 0 <= metrics["eval/win_rate"] <= 1
    assert ("train/loss/regularizer" in metrics) and metrics["eval/kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "regularizer"), [("spo", "global_kl"), ("spo_weighted", "local_kl"), ("simpo", "none")]
)
def test_alpacafarm_trains_an_adapter_of_a_tiny_model(
    method: str, regularizer: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=512)
    pairs = write_alpaca_like(tmp_path / "pairs.jsonl.gz", prompts=40, seed=0)
    words = ["experiment=paper/alpacafarm", TINY, f"model.path={model}", f"data.path={pairs}", f"method={method}"]
    words += [f"regularizer={regularizer}", "trainer.max_epochs=null", "trainer.max_steps=2", "data.max_new_tokens=8"]
    metrics = job(tmp_path / "run", shared_cache(tmp_path_factory), *words)
    assert metrics["data/pairs_used"] > 0 and metrics["eval/kl"] >= 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
