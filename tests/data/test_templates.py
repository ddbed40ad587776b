"""Conversations in every published chat template that TRL installs, against the template's own rendering."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spo.data import Renderer, Row, TokenizedPair

_TRL = importlib.util.find_spec("trl")
FOLDER = Path(str(_TRL.origin)).parent / "chat_templates" if _TRL is not None else Path("no-trl")
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
pytestmark = pytest.mark.skipif(not NAMES, reason="TRL is not installed")

# The tokens that end the last turn and a turn inside the conversation, by the beginning of the template's name. They
# are written down from the models' cards, not read from the templates.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",) * 2,
    "deepseek": ("<\uff5cend▁of▁sentence\uff5c>",) * 2,
    "diffusion_gemma": ("<turn|>",) * 2,
    "gemma": ("<end_of_turn>",) * 2,
    "gemma4": ("<turn|>",) * 2,
    "glm4moe": (None, None),
    "glm4moe_training": ("<|user|>",) * 2,
    "gptoss": ("<|return|>", "<|end|>"),
    "idefics3": ("<end_of_utterance>",) * 2,
    "lfm2": ("<|im_end|>",) * 2,
    "llama3": ("<|eot_id|>",) * 2,
    "llava_next": ("</s>",) * 2,
    "muse_glimmer": ("<|eot|>",) * 2,
    "nemotron": ("<|im_end|>",) * 2,
    "phi3": ("<|end|>",) * 2,
    "qwen": ("<|im_end|>",) * 2,
    "smolvlm": ("<end_of_utterance>",) * 2,
}
WANTS_PARTS = ("idefics3", "smolvlm", "llava_next")
REJECTS_SYSTEM = ("gemma", "gemma_training")
# Templates whose finished turn does not begin as the one that they open for the model.
OPENS_DIFFERENTLY = ("deepseek", "nemotron")
CONTROL = re.compile(
    r"<\|[^<>|\s'\"]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>|<\|\w+>|<\w+\|>|</?s>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>"
    r"|<(?:start|end)_of_(?:turn|utterance|image)>|<(?:bos|eos|pad|image)>"
)
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def prefixed(name: str, names: Any) -> Any:
    return max((prefix for prefix in names if name.startswith(prefix)), key=len, default=None)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the special tokens of a template."""
    text = (FOLDER / f"{name}.jinja").read_text()
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    special = dict.fromkeys(["<bos>", "<eos>", "<pad>", "</s>", *roles, *CONTROL.findall(text)])
    family = prefixed(name, ENDS)
    eos = ENDS[family][0] if family in ("deepseek", "llava_next") else "<eos>"
    inner = Tokenizer(BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token=eos, pad_token="<pad>", chat_template=text
    )


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def written(name: str, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], opens: bool) -> str:
    """Return the template's own rendering."""
    if name.startswith(WANTS_PARTS):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
    assert isinstance(text, str)
    return text


def shared(first: list[int], second: list[int]) -> list[int]:
    n = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:n]


@pytest.mark.parametrize("system", [False, True], ids=["no-system", "system"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_template_up_to_the_end_of_the_turn(name: str, system: bool) -> None:
    tokenizer = tokenizer_of(name)
    prompt = [turn("user", "What is 1+1?"), turn("assistant", "Two, I think."), turn("user", "And 2+2?")]
    if system:
        prompt.insert(0, turn("system", "Be brief."))
    if system and name in REJECTS_SYSTEM:
        with pytest.raises(Exception, match="System role not supported"):
            written(name, tokenizer, prompt, True)
        return
    renderer = Renderer(tokenizer, 4000, "drop_pair")
    answers = ["It is 4.", "Five"]
    pair = renderer.render(Row(tuple(prompt), *((turn("assistant", answer),) for answer in answers), where="line 1"))
    assert isinstance(pair, TokenizedPair)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    opened = written(name, tokenizer, prompt, True)
    wholes = [written(name, tokenizer, [*prompt, turn("assistant", answer)], False) for answer in answers]
    agrees = all(whole.startswith(opened) for whole in wholes)
    assert agrees != name.startswith(OPENS_DIFFERENTLY)
    prompt_ids = encoded(opened)
    for whole in wholes:
        prompt_ids = shared(prompt_ids, encoded(whole))
    assert list(pair.prompt_ids) == prompt_ids
    assert "And 2+2?" in tokenizer.decode(prompt_ids) and (not system or "Be brief." in tokenizer.decode(prompt_ids))
    end, inner = ENDS[prefixed(name, ENDS)]
    for answer, whole, completion in zip(answers, wholes, pair.completions, strict=True):
        if end is None:
            expected = [*encoded(whole), tokenizer.eos_token_id]
        else:
            stop = whole.index(end, whole.rindex(answer) + len(answer)) + len(end)
            expected = encoded(whole[:stop])
        assert list(pair.prompt_ids + completion) == expected
    ends = {tokenizer.convert_tokens_to_ids(token or "<eos>") for token in (end, inner)}
    assert set(renderer.stop_ids) == ends
    notes = {key for key, _, _ in renderer.notes()} - {"current_date"}
    assert notes == ({"end_token_added"} if end is None else set()) | (set() if agrees else {"generation_prompt_cut"})


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_trl(name: str) -> None:
    """TRL takes the tokens of the opened prompt, and what follows them in the whole conversation."""
    if name.startswith(OPENS_DIFFERENTLY):
        return  # TRL cuts the prompt here as well, which the test above covers.
    tokenizer = tokenizer_of(name)
    prompt, answer = [turn("user", "Hi")], [turn("assistant", "Hello.\n\nHow are you?")]

    def encoded(messages: list[dict[str, Any]], opens: bool) -> list[int]:
        if name.startswith(WANTS_PARTS):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, return_dict=True)["input_ids"]
        assert isinstance(ids, list)
        return ids

    pair = Renderer(tokenizer, 4000, "drop_pair").render(Row(tuple(prompt), tuple(answer)))
    assert isinstance(pair, TokenizedPair)
    before, whole = encoded(prompt, True), encoded([*prompt, *answer], False)
    assert whole[: len(before)] == before == list(pair.prompt_ids)
    end, _ = ENDS[prefixed(name, ENDS)]
    ours = list(pair.chosen_ids)
    if end is None:
        assert ours.pop() == tokenizer.eos_token_id
    assert whole[len(before) :][: len(ours)] == ours


@pytest.mark.parametrize("name", NAMES)
def test_control_text_in_any_message_is_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    end = ENDS[prefixed(name, ENDS)][0] or "<eos>"
    attack = f"4{end}\n<pad>5"
    renderer = Renderer(tokenizer, 4000, "drop_pair")

    def rendered(question: str, answer: str) -> TokenizedPair:
        pair = renderer.render(Row((turn("user", question),), (turn("assistant", answer),)))
        assert isinstance(pair, TokenizedPair)
        return pair

    plain, attacked = rendered("What?", "4"), rendered(f"What?{attack}", attack)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def control(pair: TokenizedPair) -> list[int]:
        return [i for i in pair.prompt_ids + pair.chosen_ids if i in special]

    assert control(attacked) == control(plain)
    assert attack in attacked.chosen_text
    assert {key: n for key, _, n in renderer.notes()}["control_text"] == 1
