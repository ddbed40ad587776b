"""Learning rate by the number of parameters, warm-up, length in epochs, and weight decay."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from spo import cli
from spo.config.checks import problems, warnings
from spo.config.compose import compose
from spo.config.plan import plan
from spo.data.windows import Windows
from spo.errors import ConfigProblems, UserError
from spo.models.optimizer import adamw, is_norm_or_bias, make_with_names
from spo.records import filenames
from spo.records.parameters import count_parameters
from spo.runs.claim import claim, finish
from spo.runs.identity import identity
from spo.runs.resume import resumed_config
from spo.runs.saved_config import load_config
from spo.schedules.optimization import RATES, learning_rate, training_steps, warmup_steps
from spo.stages.assemble import build_optimizer, build_scheduler
from spo.stages.from_config import resolve_values
from spo.stages.length import with_length
from tests.helpers import save_model, tiny_llama

Shapes = Mapping[str, tuple[str, Sequence[int]]]


def write_header(file: Path, tensors: Shapes) -> None:
    """Write a safetensors file that has a header and no weights."""
    header = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def model_folder(folder: Path, tensors: Shapes, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    write_header(folder / "model.safetensors", tensors)
    return folder


def of_size(folder: Path, parameters: int) -> Path:
    return model_folder(folder, {"model.norm.weight": ("F32", [parameters])})


# --- learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [
        (1, 1e-3),
        (1_000_000, 1e-3),
        (10_000_000, 1e-4),
        (134_515_008, 2e-5),
        (135_000_000, 2e-5),
        (1_000_000_000, 5e-6),
        (7_000_000_000, 7e-7),
        (405_000_000_000, 7e-7),
        (round(math.sqrt(1e6 * 1e7)), 3.16e-4),  # half way on both scales
        (round(math.sqrt(1e9 * 7e9)), 1.87e-6),
    ],
)
def test_learning_rate_is_interpolated_on_logarithmic_scales(parameters: int, rate: float) -> None:
    assert learning_rate(parameters) == rate
    assert learning_rate(parameters, lora=True) == pytest.approx(10 * rate, rel=1e-2)


def test_learning_rate_falls_with_size() -> None:
    rates = [learning_rate(round(10**power)) for power in (5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5, 10)]
    assert rates == sorted(rates, reverse=True) and rates[1:-1] == sorted(set(rates[1:-1]), reverse=True)
    assert [learning_rate(round(size)) for size, _ in RATES] == [rate for _, rate in RATES]


def test_configuration_holds_the_number(tmp_path: Path) -> None:
    path = of_size(tmp_path / "model", 135_000_000)
    full, lora = (compose([f"model={name}", f"model.path={path}"]) for name in ("hf", "hf_lora"))
    assert (full.model.num_parameters, full.optimizer.lr, lora.optimizer.lr) == (135_000_000, 2e-5, 2e-4)
    own = compose(["model=hf", f"model.path={path}", "+model.lora={_target_: spo.models.LoraSettings}"])
    assert own.optimizer.lr == 2e-4
    path.rename(tmp_path / "moved")  # a number, not a reference to files
    assert OmegaConf.to_container(full.model)["default_lr"] == full.model.default_lr == 2e-5  # type: ignore[index, call-overload]


def test_explicit_learning_rate_wins(tmp_path: Path) -> None:
    model = ["model=hf", f"model.path={of_size(tmp_path / 'model', 10**9)}"]
    assert compose([*model, "optimizer.lr=3e-4"]).optimizer.lr == 3e-4
    assert compose([*model, "model.default_lr=3e-4"]).optimizer.lr == 3e-4
    assert compose([*model, "model.num_parameters=10000000"]).optimizer.lr == 1e-4


def test_equal_numbers_make_equal_identities(tmp_path: Path) -> None:
    model = [
        "model=hf",
        f"model.path={of_size(tmp_path / 'model', 10**9)}",
        "data=jsonl",
        f"data.path={tmp_path / 'x'}",
    ]
    given, again, counted = (
        identity(compose([*model, *more], run_dir=tmp_path / "run"))
        for more in (["optimizer.lr=5e-6"], ["optimizer.lr=0.000005"], [])
    )
    assert given == again == counted
    assert identity(compose([*model, "optimizer.lr=1e-6"], run_dir=tmp_path / "run")) != given


def test_shipped_models_keep_their_learning_rates() -> None:
    assert compose(["data.regime=null"]).optimizer.lr == compose(["method=sft"]).optimizer.lr == 1e-3
    assert compose(["data=enumerable", "model=tabular"]).optimizer.lr == 0.5


@pytest.mark.parametrize("method", ["spo", "dpo", "ipo"])
@pytest.mark.parametrize("regime", ["stories", "few_pairs", "narrow"])
def test_methods_know_their_best_setting_of_a_regime(method: str, regime: str, tmp_path: Path) -> None:
    cfg = compose([f"method={method}", f"data.regime={regime}", "regularizer=local_kl"])
    best = cfg.method.best_on[regime]
    assert (cfg.optimizer.lr, cfg.beta.value) == (best.lr, best.beta)
    assert cfg.regularizer.weight == best.get("weight", "beta")
    general = compose([f"method={method}", "data.regime=null", "regularizer=local_kl"])
    assert (general.optimizer.lr, general.beta.value) != (best.lr, best.beta)
    size = of_size(tmp_path / "model", 10_000_000)
    # The rate of a model with a path follows from its size, in every regime.
    hf = compose([f"method={method}", "model=hf", f"model.path={size}", f"data.regime={regime}"])
    assert hf.optimizer.lr == 1e-4 and hf.beta.value == best.beta


def test_cfg_shows_the_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = of_size(tmp_path / "model", 10_000_000)
    assert cli.main(["train", "--cfg", "job", "model=hf", f"model.path={path}", "data=jsonl"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert OmegaConf.to_container(shown.model)["default_lr"] == 1e-4  # type: ignore[index, call-overload]
    assert cli.main(["train", "--cfg", "job", "model=hf"]) == 0  # model.path=???


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("???", "model.path is not set: a Hugging Face folder or hub name (model.path=...)"),
        ("nowhere/at/all", "model.path=nowhere/at/all: there is no such folder"),
    ],
)
def test_missing_model_is_the_only_problem(path: str, words: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    with pytest.raises(ConfigProblems) as raised:
        plan(["model=hf", f"model.path={path}", "data=jsonl", f"data.path={data}"])
    assert str(raised.value).startswith(f"the configuration has a problem:\n  - {words}")


def test_model_that_cannot_be_counted_needs_a_learning_rate(tmp_path: Path) -> None:
    folder, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    data.write_text("{}")
    common = ["model=hf", "data=jsonl", f"data.path={data}"]
    [problem] = problems(compose([*common, f"model.path={folder}"]))
    assert problem == (
        f"model.path={folder}: its parameters, on which the learning rate depends, cannot be counted, because the "
        "folder does not hold model.safetensors or its shards; save the model with save_pretrained, or set optimizer.lr"
    )
    [problem] = problems(compose([*common, "model.path=someone/not-in-the-cache"]))
    assert "it is not in the local cache; download it with `hf download someone/not-in-the-cache`" in problem
    for given in ("optimizer.lr=1e-5", "model.default_lr=1e-5", "model.num_parameters=1000000"):
        assert not [one for one in problems(compose([*common, f"model.path={folder}", given])) if "counted" in one]
    cfg = resolve_values(compose([*common, f"model.path={folder}", "optimizer.lr=1e-5"]))
    assert cfg.model.default_lr is None


# --- number of parameters ------------------------------------------------------------------------------------------

HEAD, EMBEDDING = ("lm_head.weight", ("F32", [10, 4])), ("model.embed_tokens.weight", ("F32", [10, 4]))


@pytest.mark.parametrize(
    ("tensors", "config", "count"),
    [
        (dict([HEAD, EMBEDDING]), {}, 80),
        (dict([HEAD, EMBEDDING]), {"tie_word_embeddings": True}, 40),
        ({"a": ("BF16", [3, 5]), "scalar": ("F64", [])}, {}, 16),
        ({"h.0.attn.bias": ("F32", [1, 1, 64, 64]), "a": ("F16", [2]), "rotary.inv_freq": ("F32", [4])}, {}, 2),
        ({"position_ids": ("I64", [512]), "ids": ("I64", [512]), "a": ("F16", [2])}, {}, 2),
        # FP8 with scales; two MXFP4 weights in a byte; eight GPTQ weights in 32 bits; NF4 of bitsandbytes.
        ({"a.weight": ("F8_E4M3", [4, 4]), "a.weight_scale_inv": ("F32", [1, 1])}, {"quant_method": "fp8"}, 16),
        ({"a_blocks": ("U8", [2, 3, 16]), "a_scales": ("U8", [2, 3])}, {"quant_method": "mxfp4"}, 192),
        (
            {
                "a.qweight": ("I32", [4, 8]),
                "a.qzeros": ("I32", [1, 1]),
                "a.scales": ("F16", [1, 8]),
                "g_idx": ("I32", [9]),
            },
            {"quant_method": "gptq", "bits": 4},
            256,
        ),
        (
            {"a.weight": ("U8", [8, 1]), "a.weight.absmax": ("F32", [3]), "a.weight.quant_state.nf4": ("U8", [9])},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            16,
        ),
        (
            {"a.weight": ("I8", [8, 2]), "a.SCB": ("F32", [8])},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            16,
        ),
        (
            {
                "model.language_model.a": ("F32", [5]),
                "model.vision_tower.a": ("F32", [900]),
                "lm_head.weight": ("F32", [2]),
            },
            {"text_config": {}},
            7,
        ),
    ],
)
def test_parameters_are_counted_once_and_buffers_are_not(
    tmp_path: Path, tensors: Shapes, config: dict[str, Any], count: int
) -> None:
    settings = {"quantization_config": config} if "quant_method" in config else config
    assert count_parameters(str(model_folder(tmp_path / "model", tensors, **settings))) == count


def test_count_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    for tied in (False, True):
        folder = save_model(tmp_path / str(tied), tie_word_embeddings=tied)
        model = tiny_llama(tie_word_embeddings=tied)
        assert count_parameters(str(folder)) == sum(parameter.numel() for parameter in model.parameters())


def test_shards_count_once_and_other_files_do_not(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", {"a": ("F32", [3])})
    for number, tensors in enumerate(({"a": ("F32", [3]), "b": ("F32", [4])}, {"b": ("F32", [4]), "c": ("F32", [5])})):
        write_header(folder / f"model-0000{number}-of-00002.safetensors", tensors)  # both hold b
    write_header(folder / "consolidated.safetensors", {"all": ("F32", [12])})
    assert count_parameters(str(folder)) == 3  # transformers loads the single file first
    (folder / "model.safetensors").unlink()
    shards = {"a": 0, "b": 1, "c": 1}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert count_parameters(str(folder)) == 12
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert count_parameters(str(folder)) is None


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs", b"\xff" * 32, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"]
)
def test_damaged_header_is_not_counted(tmp_path: Path, content: bytes) -> None:
    folder = model_folder(tmp_path / "model", {})
    assert count_parameters(str(folder)) is None  # no weights at all
    (folder / "model.safetensors").write_bytes(content)
    assert count_parameters(str(folder)) is None


def test_model_of_the_hub_is_counted_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    model_folder(repository / "snapshots" / "abc", {"a": ("F32", [7])})
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert count_parameters("some/model") == 7
    assert count_parameters("some/other") is None and count_parameters("not//a name") is None


def test_counting_does_not_import_torch(tmp_path: Path) -> None:
    path = of_size(tmp_path / "model", 10**9)
    code = (
        f"import sys; from spo import compose; c = compose(['model=hf', 'model.path={path}']); "
        "assert c.optimizer.lr == 5e-6 and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "steps", "number"),
    [(10, 100, 10), (0, 100, 0), (1, 100, 1), (0.1, 100, 10), (0.29, 100, 29), (0.1, 9, 0), (0.5, 5, 2), (0.0, 5, 0)],
)
def test_warmup_is_a_number_or_a_share(warmup: float, steps: int, number: int) -> None:
    assert warmup_steps(warmup, steps) == number


@pytest.mark.parametrize("member", ["cosine", "linear", "constant"])
def test_share_reaches_the_schedule(member: str) -> None:
    cfg = compose([f"scheduler={member}", "scheduler.num_warmup_steps=0.25", "trainer.max_steps=8"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_scheduler(cfg)(optimizer)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0] and (rates[3] == 1.0 if member == "constant" else 0.5 < rates[3] < 1.0)


def test_default_warmup_suits_short_and_long_runs() -> None:
    for steps, number in ((1, 0), (5, 0), (100, 10), (10_000, 1_000)):
        assert warmup_steps(compose([f"trainer.max_steps={steps}"]).scheduler.num_warmup_steps, steps) == number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1.5", "must be a whole number, or at least 0 and below 1; a number below 1 is a share of the steps"),
        ("-1", "must be at least 0, or at least 0 and below 1; a number below 1 is a share of the steps"),
        (
            "null",
            "must be a whole number, or a number, at least 0 and below 1; a number below 1 is a share of the steps",
        ),
        (
            "ten",
            "must be a whole number, or a number, at least 0 and below 1; a number below 1 is a share of the steps",
        ),
    ],
)
@pytest.mark.parametrize("group", ["scheduler", "sft"])
def test_bad_warmup_is_explained(group: str, value: str, words: str) -> None:
    assert problems(compose([f"{group}.num_warmup_steps={value}"])) == [f"{group}.num_warmup_steps={value}: {words}"]


def test_warmup_as_long_as_the_run_is_noted() -> None:
    assert not warnings(compose(["trainer.max_steps=20", "scheduler.num_warmup_steps=10"]))
    [note] = warnings(compose(["trainer.max_steps=20", "scheduler.num_warmup_steps=20"]))
    assert note == (
        "scheduler.num_warmup_steps=20, but the run has 20 steps: the learning rate does not reach optimizer.lr=0.002"
    )


# --- length --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "pairs", "batch", "steps"),
    [
        ((100, None), 50, 8, 100),
        ((None, 1), 50, 8, 7),
        ((None, 1), 48, 8, 6),
        ((None, 1), 5, 32, 1),
        ((None, 2), 50, 8, 14),
        ((None, 0.5), 50, 8, 4),
        ((None, 0.07), 1000, 10, 7),  # 0.07 * 100 is 7.000000000000001 in binary
        ((5, 1), 50, 8, 5),
        ((100, 1), 50, 8, 7),
    ],
)
def test_limit_that_ends_first_gives_the_length(
    limits: tuple[int | None, float | None], pairs: int, batch: int, steps: int
) -> None:
    assert training_steps(*limits, pairs, batch) == steps


def test_epoch_is_that_of_the_windows() -> None:
    for pairs, batch, devices in ((50, 8, 1), (50, 8, 4), (48, 8, 2), (5, 8, 2), (5, 8, 8)):
        lengths = torch.ones(pairs, dtype=torch.long).numpy()
        windows = Windows(lengths, lengths, True, batch, seed=0, world_size=devices)
        steps = training_steps(None, 1, pairs, batch)
        seen = [int(i) for step in range(steps) for i in windows.window(step)]
        assert steps == windows.per_epoch and len(set(seen)) == len(seen) == pairs


def test_without_a_limit_there_is_no_length() -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps and trainer\.max_epochs are both null"):
        training_steps(None, None, 50, 8)
    assert problems(compose(["trainer.max_steps=null"])) == ["trainer.max_steps=null: set it, or trainer.max_epochs"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_epochs=0", "must be a positive number, or null"),
        ("trainer.max_epochs=-1", "must be a positive number, or null"),
        ("trainer.max_epochs=all", "must be a positive number, or null"),
    ],
)
def test_bad_number_of_epochs_is_explained(override: str, words: str) -> None:
    assert problems(compose([override])) == [f"{override}: {words}"]


def test_default_number_of_steps_gives_way_to_epochs() -> None:
    assert compose().trainer.max_steps == 100
    assert compose(["trainer.max_epochs=3"]).trainer.max_steps is None
    assert compose(["trainer.max_epochs=3", "trainer.max_steps=50"]).trainer.max_steps == 50
    assert compose(["+debug=tiny"]).trainer.max_steps == 4
    assert compose(["+debug=tiny", "trainer.max_epochs=3"]).trainer.max_steps is None


def test_configuration_in_epochs_passes_the_checks() -> None:
    assert problems(compose(["trainer.max_epochs=1", "alpha=linear", "beta=target_kl", "beta.target=1"])) == []


def claimed_for_epochs(run_dir: Path, *overrides: str) -> Any:
    cfg = compose(["trainer.max_epochs=1", "trainer.devices=1", "trainer.accelerator=cpu", *overrides], run_dir=run_dir)
    with claim(run_dir, cfg):
        pass
    return cfg


def test_length_reaches_everything_that_depends_on_it(tmp_path: Path) -> None:
    cfg = claimed_for_epochs(tmp_path, "alpha=linear", "beta=cosine", "data.batch_size=8")
    known = with_length(cfg, 50)
    assert (known.trainer.max_steps, known.scheduler.num_training_steps, known.alpha.steps, known.beta.steps) == (
        7,
    ) * 4
    recorded = OmegaConf.load(tmp_path / "config.yaml")
    assert recorded.trainer.max_steps == recorded.scheduler.num_training_steps == load_config(tmp_path).alpha.steps == 7
    with claim(tmp_path, cfg) as status:  # the same command
        assert status.value == "unfinished"
    with claim(tmp_path, resumed_config(tmp_path, [])) as status:
        assert status.value == "unfinished"
    assert with_length(resumed_config(tmp_path, []), 50).trainer.max_steps == 7


def test_finished_run_resumes_for_more_epochs(tmp_path: Path) -> None:
    with_length(claimed_for_epochs(tmp_path, "data.batch_size=8"), 50)
    finish(tmp_path, {"a": 1.0})
    with claim(tmp_path, resumed_config(tmp_path, [])) as status:
        assert status.value == "finished"
    for fewer in ("trainer.max_epochs=0.5", "trainer.max_steps=3"):
        with pytest.raises(UserError, match="is finished at 7 steps"):
            resumed_config(tmp_path, [fewer])
    cfg = resumed_config(tmp_path, ["trainer.max_epochs=2"])
    assert (tmp_path / filenames.earlier_metrics(7)).exists() and with_length(cfg, 50).trainer.max_steps == 14
    with claim(tmp_path, cfg) as status:
        assert status.value == "unfinished"


def test_resume_checks_its_limits_together(tmp_path: Path) -> None:
    claimed_for_epochs(tmp_path)
    with pytest.raises(ConfigProblems, match=r"trainer\.max_steps=null: set it, or trainer\.max_epochs"):
        resumed_config(tmp_path, ["trainer.max_epochs=null"])
    cfg = resumed_config(tmp_path, ["trainer.max_epochs=null", "trainer.max_steps=3"])
    assert (cfg.trainer.max_steps, with_length(cfg, 50).trainer.max_steps) == (3, 3)


# --- weight decay --------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    plain = {
        "lr": 0.1,
        "betas": [0.9, 0.99],
        "eps": 1e-8,
        "weight_decay": 0.5,
        "decay_norm_and_bias": False,
        "fused": None,
    }
    return plain | changes


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def test_norms_and_biases_are_not_decayed() -> None:
    model = tiny_llama(attention_bias=True)
    before = {name: parameter.detach().clone() for name, parameter in named(model)}
    optimizer = adamw(named(model), **settings())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradients, decay is all that happens
    for name, parameter in named(model):
        spared = "norm" in name or name.endswith("bias")
        factor = 1.0 if spared else 1 - 0.1 * 0.5
        assert torch.equal(parameter, before[name]) == (spared or not before[name].any()), name
        torch.testing.assert_close(parameter, before[name] * factor)
    assert {name for name, _ in named(model) if "norm" in name} and {name for name, _ in named(model) if "bias" in name}


def test_stacked_biases_of_experts_are_recognized_by_name() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    assert is_norm_or_bias("mlp.experts.gate_up_proj_bias", matrix) and is_norm_or_bias("model.norm.weight", vector)
    assert not is_norm_or_bias("mlp.experts.gate_up_proj", matrix) and not is_norm_or_bias("embed.weight", matrix)


def test_one_group_where_the_decay_is_the_same_for_all() -> None:
    model = tiny_llama()
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    for changes in ({"weight_decay": 0.0}, {"decay_norm_and_bias": True}):
        optimizer = adamw(named(model), **settings(**changes))
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(named(model))]
        state = plain.state_dict()
        optimizer.load_state_dict(state)  # as in a checkpoint of version 0.1.0
        assert [p.data_ptr() for p in optimizer.param_groups[0]["params"]] == [p.data_ptr() for p in model.parameters()]
    assert len(adamw(named(model), **settings()).param_groups) == 2


def test_configuration_builds_the_groups() -> None:
    model = tiny_llama()
    for overrides, groups in (([], 1), (["optimizer.weight_decay=0.1"], 2), (["optimizer=sgd"], 1)):
        cfg = compose(overrides)
        optimizer = build_optimizer(cfg, model)(list(model.parameters()))
        assert len(optimizer.param_groups) == groups and optimizer.param_groups[0]["lr"] == cfg.optimizer.lr
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named(model))
    decayed = build_optimizer(compose(["optimizer.weight_decay=0.1"]), model)(list(model.parameters()))
    assert [group["weight_decay"] for group in decayed.param_groups] == [0.1, 0.0]


def test_names_are_looked_up_when_the_optimizer_is_made() -> None:
    model, made = nn.Linear(2, 2), list[str]()

    def make(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        made.extend(name for name, _ in params)
        return adamw(params, **settings())

    model.weight = nn.Parameter(torch.zeros(2, 2))  # as sharding does
    make_with_names(make, {"": model}, list(model.parameters()))
    assert made == ["weight", "bias"]
