"""Models, tokenizers and adapters that cannot be used are refused in words, and those that can be load in full."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.config.checks.folders import folder_problems
from spo.config.compose import compose
from spo.errors import JudgeError, UserError
from spo.evaluation.judges import RewardModelJudge
from spo.models import LoraSettings, ModelSpec
from spo.models.adapters import check_targets
from spo.models.library_errors import Origin, in_words
from spo.models.loading import check_vocabulary
from spo.models.saving import save_policy
from spo.notes import collect_notes
from spo.stages.prepare import prepare_run
from tests.commands import TINY, spo
from tests.helpers import model_spec, save_model, tiny_llama, tiny_tokenizer

Edit = Callable[[Path], object]
WEIGHTS = "model.safetensors"
IDS = torch.tensor([[1, 5, 9, 7]])
SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PICTURES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("loading") / "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return save_adapter(llama.parent / "adapter", llama)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def save_adapter(folder: Path, base: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def spec(folder: Path | str, **changes: Any) -> ModelSpec:
    return model_spec(path=str(folder), attn_implementation="auto", **changes)


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- edits of a good folder ----------------------------------------------------------------------------------------


def setting(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str = WEIGHTS) -> Edit:
    def edit(folder: Path) -> None:
        changed = {key: value.contiguous() for key, value in change(load_file(folder / name)).items()}
        save_file(changed, folder / name, metadata={"format": "pt"})

    return edit


def without(*parts: str) -> Edit:
    return tensors(lambda weights: {key: v for key, v in weights.items() if not any(part in key for part in parts)})


def extra(**added: Tensor) -> Edit:
    return tensors(lambda weights: weights | {key.replace("__", "."): value for key, value in added.items()})


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def removed(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda folder: (first(folder), second(folder))


def cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def sharded(folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / WEIGHTS).unlink(missing_ok=True)


def shard_missing(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def shard_not_listed(folder: Path) -> None:
    sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {key: file for key, file in index["weight_map"].items() if "layers.0" not in key}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))


def bert(folder: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    saved(folder, transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))


def classifier(folder: Path) -> None:
    saved(folder, transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES | {"num_labels": 1})))


def as_pickle(content: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return edit


QUANTIZED = {"quant_method": "gptq", "bits": 4}
UNUSABLE: dict[str, tuple[Edit, str]] = {
    "missing tensor": (without("layers.1.self_attn.q_proj"), r"1 tensor is missing \(model.layers.1.self_attn.q_proj"),
    "missing head": (without("lm_head"), r"1 tensor is missing \(lm_head.weight\)"),
    "missing embedding": (without("embed_tokens"), r"missing \(model.embed_tokens.weight\)"),
    "extra tensor": (
        extra(model__layers__0__self_attn__q_proj__bias=torch.zeros(16)),
        r"1 tensor is not part of the model \(model.layers.0.self_attn.q_proj.bias\)",
    ),
    "more layers": (setting(num_hidden_layers=3), r"9 tensors are missing \(model.layers.2"),
    "fewer layers": (setting(num_hidden_layers=1), r"9 tensors are not part of the model \(model.layers.1"),
    "hidden size": (setting(hidden_size=32), r"21 tensors have another shape \(lm_head.weight \[23, 16\] instead of"),
    "vocabulary": (setting(vocab_size=22), r"2 tensors have another shape"),
    "renamed": (
        tensors(lambda w: {f"module.{key}": v for key, v in w.items()}),
        r"21 tensors are missing .*and 21 ten",
    ),
    "shard not listed": (shard_not_listed, r"tensors are missing \(model.layers.0"),
    "encoder": (bert, r"in this BertLMHeadModel, a token depends on those after it"),
    "encoder's config": (setting(model_type="bert"), r"BertLMHeadModel that config.json describes"),
    "architecture": (setting(model_type="deberta"), r"AutoModelForCausalLM does not have the architecture Deberta"),
    "classifier": (classifier, r"lm_head.weight\), and 1 tensor .*this is a classifier or reward model"),
    "encoder-decoder": (setting(model_type="t5", is_encoder_decoder=True), r"t5 is an encoder-decoder model"),
    "unknown type": (setting(model_type="llama9"), r"`llama9` .*; install a newer transformers than"),
    "own code": (
        setting(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        r"comes with code of its own; set model.trust_remote_code=true",
    ),
    "quantized": (
        setting(quantization_config=QUANTIZED),
        r"weights are quantized \(gptq.*give the checkpoint",
    ),
    "quantized, unknown": (setting(quantization_config={"quant_method": "zip"}), r"weights are quantized \(zip"),
    "quantized, no method": (setting(quantization_config={"bits": 4}), r"weights are quantized \(None"),
    "pickle": (as_pickle({"path": Path("x")}), r"pytorch_model.bin cannot be read safely"),
    "cut off": (cut_off, r"cut off or are not safetensors; copy or download it again"),
    "shard missing": (shard_missing, r"a file of it is missing \(No such file"),
    "no weights": (removed(WEIGHTS), r"there are no weights in it"),
    "no config": (removed("config.json"), r"does not have a config.json that names a model_type"),
    "broken json": (text("config.json", "{"), r"one of its JSON files cannot be read"),
    "not a number": (
        tensors(lambda w: {key: v * float("nan") if "norm" in key else v for key, v in w.items()}),
        r"computes NaN for a short text",
    ),
    "unknown activation": (setting(hidden_act="nope"), r"the value 'nope' is not known"),
    "wrong type": (setting(hidden_size="16"), r"Field 'hidden_size' expected int, got str"),
    "image-text": (setting(model_type="qwen2_vl"), r"cannot load the text model of a Qwen2VL checkpoint by itself"),
    "image-text that loads as a whole": (setting(model_type="mllama"), r"cannot load the text model of a Mllama check"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_model_is_refused_in_one_sentence(name: str, copy: Path) -> None:
    edit, expected = UNUSABLE[name]
    edit(copy)
    with pytest.raises(UserError, match=expected) as caught:
        spec(copy).base(copy)
    assert str(caught.value).startswith(f"model.path={copy} cannot be ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


BUFFERS = {
    "model__layers__0__self_attn__rotary_emb__inv_freq": torch.zeros(4),
    "model__layers__0__attn__masked_bias": torch.zeros(()),
    "model__embeddings__position_ids": torch.zeros(1, 4),
    "mtp__layers__0__weight": torch.zeros(4),
}
USABLE: dict[str, Edit] = {
    "buffers": extra(**BUFFERS),
    "layers that predict further tokens": both(
        extra(model__layers__2__eh_proj__weight=torch.zeros(16, 32)), setting(num_nextn_predict_layers=1)
    ),
    "tied head": both(without("lm_head"), setting(tie_word_embeddings=True)),
    "shards": sharded,
    "pickled tensors": lambda folder: as_pickle(load_file(folder / WEIGHTS))(folder),
}


@pytest.mark.parametrize("name", USABLE)
def test_a_usable_model_loads(name: str, copy: Path, llama: Path) -> None:
    USABLE[name](copy)
    model = spec(copy).base(copy)
    original = load_file(llama / WEIGHTS)
    for key, value in model.state_dict().items():
        expected = "model.embed_tokens.weight" if name == "tied head" and key == "lm_head.weight" else key
        assert torch.equal(value, original[expected]), key


def test_a_folder_without_a_key_is_named_by_its_path(copy: Path) -> None:
    without("model.norm")(copy)
    with pytest.raises(UserError, match=f"^{copy} cannot be loaded: .*model.norm.weight"):
        model_spec(path="somewhere/else").base(copy)


def test_a_head_that_differs_from_the_embedding_stays_apart(copy: Path, llama: Path, tmp_path: Path) -> None:
    setting(tie_word_embeddings=True)(copy)
    with collect_notes() as notes:
        model = spec(copy).base(copy)
    assert notes == {"notes/untied_head": 1}
    assert torch.equal(model.state_dict()["lm_head.weight"], load_file(llama / WEIGHTS)["lm_head.weight"])
    save_policy(model, tiny_tokenizer(), tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["tie_word_embeddings"] is False


def test_dropout_that_a_config_declares_as_a_whole_number(tmp_path: Path) -> None:
    config = transformers.MptConfig(vocab_size=23, d_model=16, n_layers=1, n_heads=2)
    folder = saved(tmp_path / "mpt", transformers.MptForCausalLM(config))
    assert spec(folder).base(folder).config.attn_config.attn_pdrop == 0
    with pytest.raises(UserError, match=r"^model.dropout=0.1: the config of a mpt model .*set model.dropout=0$"):
        spec(folder).base(folder, dropout=0.1)


def test_an_architecture_that_contradicts_the_model_type_is_noted(copy: Path) -> None:
    setting(model_type="gemma")(copy)
    with collect_notes() as notes:
        assert type(spec(copy).base(copy)).__name__ == "GemmaForCausalLM"
    assert notes == {"notes/other_architecture": 1}


# --- what transformers turns into an ordinary model ------------------------------------------------------------------


def llava(folder: Path) -> Any:
    config = transformers.LlavaConfig(
        text_config={**SIZES, "model_type": "llama"},
        vision_config={**PICTURES, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=22,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mistral3(folder: Path) -> Any:
    """Tie the head in the config of the whole checkpoint, and not in that of the text model."""
    config = transformers.Mistral3Config(
        text_config={**SIZES, "model_type": "mistral"},
        vision_config={**PICTURES, "model_type": "pixtral"},
        image_token_index=22,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, mistral3])
def test_the_text_model_of_an_image_text_checkpoint_is_trained(make: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = make(tmp_path).eval()
    folder = saved(tmp_path / "whole", whole)
    with collect_notes() as notes:
        model = spec(folder).base(folder)
    assert notes == {"notes/text_model": 1}
    assert "Conditional" not in type(model).__name__
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=1e-6)
    save_policy(model, tiny_tokenizer(), tmp_path / "policy")
    again = spec(folder).base(tmp_path / "policy")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

    tensors(lambda w: {key: v for key, v in w.items() if "layers.1.mlp.up_proj" not in key})(folder)
    with pytest.raises(UserError, match=r"1 tensor is missing \(model.layers.1.mlp.up_proj.weight\)"):
        spec(folder).base(folder)


BLOCK = 8
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


def quantize(folder: Path) -> dict[str, Tensor]:
    """Store the matrices of the layers in FP8 with a scale per block, and return their values."""
    expected, stored = {}, {}
    for key, value in load_file(folder / WEIGHTS).items():
        if "proj" not in key:
            expected[key] = stored[key] = value
            continue
        rows, columns = value.shape
        blocks = value.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        expected[key] = (packed.float() * scale[:, None, :, None]).view(rows, columns)
        stored[key] = packed.view(rows, columns)
        stored[key.replace(".weight", ".weight_scale_inv")] = scale
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    setting(quantization_config=FP8)(folder)
    return expected


def test_fp8_weights_are_dequantized_and_saved_as_ordinary_ones(copy: Path, tmp_path: Path) -> None:
    expected = quantize(copy)
    with collect_notes() as notes:
        model = spec(copy).base(copy)
    assert notes == {"notes/dequantized": 1}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    save_policy(model, tiny_tokenizer(), tmp_path / "policy")
    assert load_file(tmp_path / "policy" / WEIGHTS).keys() == expected.keys()
    assert "quantization_config" not in json.loads((tmp_path / "policy" / "config.json").read_text())


def test_fp8_weights_without_scales_are_refused(copy: Path) -> None:
    quantize(copy)
    without("scale_inv")(copy)
    with pytest.raises(UserError, match=r"14 tensors lack their scales \(model.layers.0"):
        spec(copy).base(copy)


def test_the_loss_of_a_router_and_its_noise_are_off(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        router_jitter_noise=0.5,
    )
    folder = saved(tmp_path, transformers.MixtralForCausalLM(config))
    with collect_notes() as notes:
        policy: Any = spec(folder).policy(folder, seed=0)
    assert notes == {"notes/router_loss_off": 1}
    assert policy.config.output_router_logits is False
    with torch.no_grad():
        assert torch.equal(policy(IDS).logits, policy(IDS).logits)
        assert policy(IDS).router_logits is None

    lora = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    with collect_notes() as notes:
        spec(folder, lora=lora).policy(folder, seed=0)
    assert notes == {"notes/router_loss_off": 1, "notes/experts_not_adapted": 4}


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BloomConfig(vocab_size=23, hidden_size=16, n_layer=1, n_head=2)
    return saved(tmp_path_factory.mktemp("bloom"), transformers.BloomForCausalLM(config))


def test_a_model_without_sdpa_runs_with_its_own_default(bloom: Path, llama: Path) -> None:
    assert compose([]).model.attn_implementation == "auto"
    with collect_notes() as notes:
        assert spec(bloom).base(bloom).config._attn_implementation == "eager"
    assert notes == {"notes/attention_fallback": 1}
    with collect_notes() as notes:
        assert spec(llama).base(llama).config._attn_implementation == "sdpa"
    assert notes == {}


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "spda"])
def test_attention_that_a_person_chose_is_not_replaced(name: str, bloom: Path) -> None:
    with pytest.raises(UserError, match=r"set model\.attn_implementation=auto, or eager"):
        model_spec(path=str(bloom), attn_implementation=name).base(bloom)


# --- tokenizers ------------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "none": (removed("tokenizer.json", "tokenizer_config.json"), r"not have a tokenizer .*pip install sentencepiece"),
    "broken": (text("tokenizer.json", "{"), r"one of its JSON files cannot be read"),
    "small embedding": (setting(vocab_size=22), r"its tokenizer has 23 tokens, such as 'w22', .* has 22 rows"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_unusable_tokenizer_is_refused_in_one_sentence(name: str, copy: Path) -> None:
    edit, expected = TOKENIZERS[name]
    edit(copy)
    with pytest.raises(UserError, match=expected) as caught:
        spec(copy).tokenizer(copy)
    assert str(caught.value).startswith(f"model.path={copy} cannot be ") and "\n" not in str(caught.value)


def test_only_a_token_that_a_text_contains_must_fit_into_the_embedding() -> None:
    tokenizer, origin = tiny_tokenizer(), Origin("MODEL", "model.path")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(origin, tokenizer, 23)
    check_vocabulary(origin, tokenizer, 64)
    tokenizer.chat_template = "{{ '<image>' }}"
    with pytest.raises(UserError, match="24 tokens, such as '<image>', and its embedding has 23 rows"):
        check_vocabulary(origin, tokenizer, 23)
    tokenizer.chat_template = None
    tokenizer.pad_token = "<image>"
    with pytest.raises(UserError, match="23 rows"):
        check_vocabulary(origin, tokenizer, 23)


def test_the_context_of_a_text_model_is_that_of_its_text_config(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llava(tmp_path))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "w3", "chosen": " w4", "rejected": " w5"}\n')
    cfg = compose(["model=hf", f"model.path={folder}", "data=jsonl", f"data.path={pairs}", "data.max_length=65"])
    with pytest.raises(ValueError, match=r"data.max_length=65 is longer than the model's context of 64 tokens"):
        prepare_run(cfg)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_porj"], r"v_porj does not match any module of LlamaForCausalLM; did you mean v_proj\?"),
        (["q_proj", "c_attn"], r"c_attn does not match any module .*\(it has embed_tokens, q_proj, k_proj"),
        (["proj"], r"proj does not match any module"),
        ("q_proj", r"q_proj does not match .*; did you mean \[q_proj\]\?"),
        (r"*\.q_proj", r"not a regular expression"),
        ([], r"names no module"),
        (["q_proj", "self_attn"], r"peft does not adapt a LlamaAttention; choose from embed_tokens, q_proj, k_proj"),
    ],
)
def test_every_lora_target_must_match(targets: Any, expected: str, llama: Path) -> None:
    lora = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=targets)
    with pytest.raises(UserError, match=expected) as caught:
        spec(llama, lora=lora).policy(llama, seed=0)
    assert str(caught.value).startswith("model.lora.target_modules") and "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.q_proj", ["q_proj", "layers.1.mlp.up_proj"], ["lm_head"]])
def test_lora_targets_that_match_pass(targets: Any) -> None:
    check_targets(tiny_llama(), targets)


def adapter_setting(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    return edit


ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Edit, str]] = {
    "missing tensor": (
        tensors(lambda w: {key: v for key, v in w.items() if "layers.1.self_attn.v" not in key}, ADAPTER_WEIGHTS),
        r"2 tensors are missing .*layers.1.self_attn.v_proj.*choose the model it was made for",
    ),
    "extra tensor": (
        tensors(lambda w: w | {LORA_A.format(7): torch.zeros(2, 16)}, ADAPTER_WEIGHTS),
        r"1 tensor has no place in the model \(base_model.model.model.layers.7",
    ),
    "rank": (adapter_setting(r=4), r"q_proj.lora_A.default.weight is \[2, 16\] and not \[4, 16\]"),
    "other architecture": (adapter_setting(target_modules=["c_attn"]), r"choose the model that the adapter was made"),
    "classifier": (adapter_setting(task_type="SEQ_CLS"), r"this is a LORA adapter for SEQ_CLS"),
    "not a number": (
        tensors(lambda w: {key: v * float("nan") for key, v in w.items()}, ADAPTER_WEIGHTS),
        r"\d tensors have NaN or infinite numbers \(base_model.model.model.layers.0.*; copy it again",
    ),
    "missing module": (adapter_setting(modules_to_save=["lm_head"]), r"does not have the tensor base_model.model.lm_h"),
    "no weights": (removed(ADAPTER_WEIGHTS), r"cannot be loaded"),
    "broken json": (text("adapter_config.json", "{"), r"one of its JSON files cannot be read"),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(
    name: str, trained: bool, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit, expected = ADAPTERS[name]
    edit(folder)
    lora = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    adapted = spec(llama, lora=lora, adapter_path=str(folder))
    with pytest.raises(UserError, match=expected) as caught:
        _ = adapted.policy(llama, seed=0) if trained else adapted.start(llama)
    assert str(caught.value).startswith(f"model.adapter_path={folder} cannot be ") and "\n" not in str(caught.value)


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (without("layers.1.mlp"), r"3 tensors are missing \(model.layers.1.mlp"),
        (without("score"), r"score.weight\); this is not a trained classifier or reward model"),
        (setting(num_hidden_layers=1), r"9 tensors are not part of the model"),
        (cut_off, r"cut off or are not safetensors"),
    ],
)
def test_a_judge_with_random_weights_is_refused(edit: Edit, expected: str, copy: Path) -> None:
    classifier(copy)
    edit(copy)
    with pytest.raises(JudgeError, match=expected) as caught:
        reward_model(copy)._local.model  # noqa: B018
    assert str(caught.value).startswith(f"judge.path={copy} cannot be loaded: ")


def test_an_unused_head_of_a_reward_model_is_ignored(copy: Path) -> None:
    classifier(copy)
    extra(lm_head__weight=torch.zeros(23, 16))(copy)
    assert reward_model(copy)._local.model.config.num_labels == 1


def reward_model(folder: Path) -> RewardModelJudge:
    return RewardModelJudge(
        path=str(folder), dtype="float32", trust_remote_code=False, device="cpu", batch_size=2, max_length=None
    )


# --- before a library is imported ------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[Edit, str]] = {
    "cut off": (cut_off, r"model.safetensors is cut off: it has \d+ of \d+ bytes; copy or download it again"),
    "empty": (text(WEIGHTS, ""), r"model.safetensors is cut off or is not a safetensors file \(0 bytes\)"),
    "not safetensors": (text(WEIGHTS, "\x05" + "\0" * 7 + "[1,2]"), r"does not have the header of a safetensors file"),
    "pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), r"is a pointer of Git LFS"),
    "no weights": (removed(WEIGHTS), r"there are no weights in this folder"),
    "shard missing": (shard_missing, r"1 of \d+ shards of the weights are missing \(model-00002-of"),
    "broken index": (
        both(sharded, text("model.safetensors.index.json", "{}")),
        r"model.safetensors.index.json does not list the shards",
    ),
    "no config": (removed("config.json"), r"there is no config.json in this folder"),
    "broken json": (text("config.json", "{\n"), r"config.json is not valid JSON \(line 2: "),
    "list": (text("config.json", "[]"), r"config.json does not hold a JSON object"),
    "no type": (text("config.json", "{}"), r"config.json does not name a model_type"),
    "encoder-decoder": (setting(model_type="t5", is_encoder_decoder=True), r"t5 is an encoder-decoder model"),
    "integers": (
        tensors(lambda w: {key: v.to(torch.int8) if "up_proj" in key else v for key, v in w.items()}),
        r"stores model.layers.0.mlp.up_proj.weight as I8, and config.json does not say how it is quantized",
    ),
    "adapter": (
        text("adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
        r"holds an adapter, not a model; write model=hf_lora model.path=org/base model.adapter_path=",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_checked_before_a_library_reads_it(name: str, copy: Path) -> None:
    edit, expected = FOLDERS[name]
    edit(copy)
    [problem] = folder_problems("model.path", str(copy))
    assert problem.startswith(f"model.path={copy}: ")
    assert re.search(expected, problem), problem


@pytest.mark.parametrize("edit", [lambda folder: None, *USABLE.values()])
def test_a_usable_folder_passes_the_checks(edit: Edit, copy: Path, adapter: Path) -> None:
    edit(copy)
    assert list(folder_problems("model.path", str(copy))) == []
    assert list(folder_problems("model.adapter_path", str(adapter), "adapter_config.json")) == []


def test_a_misspelled_folder_suggests_one_beside_it(llama: Path) -> None:
    [problem] = folder_problems("model.path", f"{llama.parent}/lama")
    assert f"there is no such folder (seen from {Path.cwd()}); did you mean {llama}?" in problem


def test_a_folder_above_the_model_suggests_the_model(llama: Path) -> None:
    [problem] = folder_problems("model.path", str(llama.parent))
    assert problem.endswith(f"there is no config.json in this folder; did you mean {llama}?")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (without("layers.1.mlp"), r"spo: model.path=.* 3 tensors are missing"),
        (cut_off, r"cut off: it has \d+ of \d+ bytes"),
    ],
)
def test_the_command_refuses_an_unusable_model_without_a_traceback(
    edit: Edit, expected: str, copy: Path, tmp_path: Path
) -> None:
    edit(copy)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "w{i}", "chosen": " w4", "rejected": " w5"}}\n' for i in range(3, 23)))
    settings = ["data.max_length=32", "data.max_new_tokens=8", "data.min_pairs=8", "judge=none", TINY]
    words = ["train", "method=dpo", "model=hf", f"model.path={copy}", "data=jsonl", f"data.path={pairs}"]
    done = spo(*words, *settings, folder=tmp_path / "run", cache=tmp_path / "cache", status=1)
    assert re.search(expected, done.stderr) and "Traceback" not in done.stderr


# --- words of other errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("You are trying to access a gated repo.\nMake sure"), "restricted; accept its terms on its page"),
        (
            OSError("We couldn't connect to 'https://x' to load the files"),
            "the hub cannot be reached; check the spelling",
        ),
        (OSError("org/name is not a valid model identifier listed on"), "the hub does not have a model of this name"),
        (ImportError("tokenizers needs `foo`. Then more."), "tokenizers needs `foo`; install what it needs"),
        (RuntimeError("something new\nsecond line"), "something new; check the folder's files, or copy"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "pip install 'spo[peft]'"),
        (RuntimeError("x" * 900), "x ...; check the folder"),
        (RuntimeError(), "cannot be loaded: RuntimeError; check"),
    ],
)
def test_an_error_of_a_library_becomes_a_sentence(error: Exception, expected: str) -> None:
    with pytest.raises(UserError) as caught, in_words(Origin("org/name", "model.path")):
        raise error
    message = str(caught.value)
    assert message.startswith("model.path=org/name cannot be loaded: ") and expected in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("name", ["org/nowhere", "nowhere", "not a name!"])
def test_a_hub_name_without_a_copy_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f"^model.path={name} cannot be loaded: .*check the spelling"):
        spec(name).base(name)
