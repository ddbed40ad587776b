"""Tokens and masks, on tokenizers of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo.data import DataError, Dropped, Renderer, Row, RowError, TokenizedPair, prompt_id
from tests.data.tokenizers_built_here import BEGINS_WITH_BOS, ENDS_IN_EOS, KINDS, SPECIALS, build

TOKENIZERS = {kind: build(kind) for kind in KINDS}


def render(renderer: Renderer, *texts: str, **row: object) -> TokenizedPair:
    pair = renderer.render(Row(*texts, **row))  # type: ignore[arg-type]
    assert isinstance(pair, TokenizedPair)
    return pair


def tokens(renderer: Renderer, ids: tuple[int, ...] | None) -> str:
    return " ".join(renderer.tokenizer.convert_ids_to_tokens(list(ids or ())))


GOLDEN = {
    "adds_bos": ("<s> on ?", "Ġthe Ġ cat </s>", "Ġ on </s>"),
    "no_bos": ("on ?", "Ġthe Ġ cat </s>", "Ġ on </s>"),
    "eos_is_pad": ("<s> on ?", "Ġthe Ġ cat </s>", "Ġ on </s>"),
    "bos_is_eos_not_added": ("<s> on ?", "Ġthe Ġ cat <s>", "Ġ on <s>"),
    "bos_is_eos_is_pad": ("<s> on ?", "Ġthe Ġ cat <s>", "Ġ on <s>"),
    "prepend": ("<s> ▁ o n ?", "▁the ▁ c a t <s>", "▁ o n <s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_match_stored_ones(kind: str) -> None:
    renderer = Renderer(TOKENIZERS[kind], 64, "drop_pair")
    # "on? on" would merge "?" with the space, so the prompt's end must be seen in the rejected text as well.
    merged = render(renderer, "on?", " the cat", " on")
    plain = render(renderer, "on?", " the cat", "on")
    prompt, chosen, rejected = GOLDEN[kind]
    if kind == "prepend":
        assert (tokens(renderer, merged.prompt_ids), tokens(renderer, merged.chosen_ids)) == (prompt, chosen)
        assert tokens(renderer, merged.rejected_ids) == rejected
        assert not merged.boundary_moved
    else:
        # The merged tail of the prompt belongs to both completions.
        assert tokens(renderer, merged.prompt_ids) == prompt.removesuffix(" ?")
        assert tokens(renderer, merged.chosen_ids) == "? " + chosen
        assert tokens(renderer, merged.rejected_ids) == "?Ġ " + rejected.removeprefix("Ġ ")
        assert merged.boundary_moved
    assert (tokens(renderer, plain.prompt_ids), tokens(renderer, plain.chosen_ids)) == (prompt, chosen)
    assert tokens(renderer, plain.rejected_ids) == rejected.removeprefix("Ġ ").removeprefix("▁ ")
    assert not plain.boundary_moved


TEXT = st.text(
    st.one_of(st.sampled_from("the on?cat \nhéー𝄞"), st.characters(exclude_categories=["Cs"])), max_size=20
).filter(lambda text: not any(special in text for special in SPECIALS))


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT.filter(bool), chosen=TEXT.filter(bool), rejected=TEXT.filter(bool))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_decode_to_the_text_with_one_bos_and_one_eos(kind: str, prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = TOKENIZERS[kind]
    pair = Renderer(tokenizer, 10_000, "drop_pair").render(Row(prompt, chosen, rejected))
    if kind == "no_bos" and pair == Dropped("no_prompt_token", ""):
        return  # Every token of the prompt merged with the completions, whether or not these are identical.
    if chosen == rejected:
        assert pair == Dropped("identical", "")
        return
    assert isinstance(pair, TokenizedPair)
    bos = [] if kind == "no_bos" else [tokenizer.bos_token_id]
    for text, completion in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        whole = tokenizer.backend_tokenizer.encode(prompt + text, add_special_tokens=False).ids
        assert list(pair.prompt_ids + completion) == [*bos, *whole, tokenizer.eos_token_id]  # type: ignore[operator]
        # Ordinary text never yields these ids, so their number over the whole sequence is exact.
        assert not set(whole) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
        if not pair.boundary_moved:
            assert Renderer(tokenizer, 9, "drop_pair").decode(completion) == text  # type: ignore[arg-type]
    assert pair.boundary_moved == (
        list(pair.prompt_ids) != list(Renderer(tokenizer, 9, "drop_pair").prompt_ids(prompt))
    )
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == (prompt, chosen, rejected)


def test_text_with_bos_and_eos_gets_no_second_ones() -> None:
    renderer = Renderer(TOKENIZERS["adds_bos"], 64, "drop_pair")
    pair = render(renderer, "<s>on?", "cat</s>\n", "on</s></s>")
    assert tokens(renderer, pair.prompt_ids) == "<s> on ?"
    assert (tokens(renderer, pair.chosen_ids), tokens(renderer, pair.rejected_ids)) == ("cat </s>", "on </s>")
    assert pair.chosen_text == "cat"
    assert renderer.render(Row("on?", "</s>", "on", where="x")) == Dropped("empty", "x")


def test_empty_prompt_needs_a_bos() -> None:
    pair = render(Renderer(TOKENIZERS["adds_bos"], 64, "drop_pair"), "", "cat", "on")
    assert pair.prompt_ids == (1,)
    message = "line 7: column 'prompt': the prompt is empty, and the tokenizer does not have a BOS"
    with pytest.raises(RowError, match=message):
        Renderer(TOKENIZERS["no_bos"], 64, "drop_pair").render(Row("", "cat", "on", where="line 7"))
    with pytest.raises(DataError, match="does not have a BOS"):
        Renderer(TOKENIZERS["no_bos"], 64, "drop_pair").prompt_ids("")
    # "t" + "he" is one token: without a BOS nothing would stand before the first completion token.
    assert Renderer(TOKENIZERS["no_bos"], 64, "drop_pair").render(Row("t", "h", "x")) == Dropped("no_prompt_token", "")


def test_supervised_rows_have_one_completion() -> None:
    pair = render(Renderer(TOKENIZERS["adds_bos"], 64, "drop_pair"), "on?", "cat")
    assert pair.rejected_ids is None and pair.rejected_text is None
    assert pair.completions == (pair.chosen_ids,)


# -------------------------------------------------------------------------------------------------- conversations

USER = {"role": "user", "content": "on?"}
CAT, ON = {"role": "assistant", "content": "cat"}, {"role": "assistant", "content": " s"}


def chat(
    kind: str, template: str | None, prompt: tuple[dict[str, str], ...] = (USER,)
) -> tuple[Renderer, TokenizedPair]:
    renderer = Renderer(build(kind, template), 200, "drop_pair")
    pair = renderer.render(Row(prompt, (CAT,), (ON,), where="line 3"))
    assert isinstance(pair, TokenizedPair)
    return renderer, pair


def decoded(renderer: Renderer, ids: tuple[int, ...] | None) -> str:
    return renderer.tokenizer.decode(list(ids or ()), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["adds_bos", "no_bos", "eos_is_pad", "bos_is_eos_is_pad"])
def test_template_may_end_in_eos_and_newline(kind: str) -> None:
    eos = TOKENIZERS[kind].eos_token
    renderer, pair = chat(kind, ENDS_IN_EOS.replace("</s>", eos))
    # The template decides, even if the tokenizer adds a BOS to other input.
    assert decoded(renderer, pair.prompt_ids) == f"[user]on?{eos}\n[assistant]"
    assert decoded(renderer, pair.chosen_ids) == f"cat{eos}"
    # A completion whose last letter also stands inside the EOS token's own text.
    assert decoded(renderer, pair.rejected_ids) == f" s{eos}"
    assert (pair.chosen_text, pair.rejected_text) == ("cat", " s")


@pytest.mark.parametrize("kind", ["adds_bos", "bos_is_eos_not_added", "bos_is_eos_is_pad"])
def test_template_may_begin_with_bos_and_lack_eos(kind: str) -> None:
    renderer, pair = chat(kind, BEGINS_WITH_BOS)
    eos = TOKENIZERS[kind].eos_token
    assert decoded(renderer, pair.prompt_ids) == "<s>(user) on? (assistant) "
    assert decoded(renderer, pair.chosen_ids) == f"cat {eos}"
    assert decoded(renderer, pair.rejected_ids) == f"s {eos}"


def test_conversations_of_several_turns_render() -> None:
    renderer, pair = chat("adds_bos", ENDS_IN_EOS, (USER, CAT, USER))
    assert decoded(renderer, pair.prompt_ids) == "[user]on?</s>\n[assistant]cat</s>\n[user]on?</s>\n[assistant]"
    two = renderer.render(Row((USER,), (CAT, USER, CAT), (ON,)))
    assert isinstance(two, TokenizedPair)
    assert decoded(renderer, two.chosen_ids) == "cat</s>\n[user]on?</s>\n[assistant]cat</s>"
    assert renderer.prompt_ids((USER,)) == two.prompt_ids
    # After an assistant's turn no further one is opened.
    follow = renderer.render(Row((USER, CAT), (USER, CAT), (USER, ON)))
    assert isinstance(follow, TokenizedPair)
    assert decoded(renderer, follow.prompt_ids) == "[user]on?</s>\n[assistant]cat</s>\n"


def test_template_may_open_a_turn_unlike_a_finished_one() -> None:
    template = ENDS_IN_EOS.replace("[assistant]{% endif %}", "[assistant]hm{% endif %}")
    renderer, pair = chat("adds_bos", template)
    assert decoded(renderer, pair.prompt_ids) == "[user]on?</s>\n[assistant]"
    assert decoded(renderer, pair.chosen_ids) == "cat</s>"


def test_missing_or_rejecting_template_raises() -> None:
    with pytest.raises(DataError, match=r"line 3: .*does not have a chat template.*Use the model's"):
        chat("adds_bos", None)
    with pytest.raises(RowError, match=r"rejects the messages: only users\. .*data.chat_template=F"):
        chat("adds_bos", "{{ raise_exception('only users.') }}")


# ----------------------------------------------------------------------------------------------------- truncation

# One token each: 5 of prompt, then 4 and 9 of completions; with BOS and EOS 11 and 16.
LONG = Row("bdfgh", "klmp", "qrsuvwxyz", where="here")


def truncated(truncation: str, max_length: int, row: Row = LONG) -> tuple[str, str, str] | Dropped:
    renderer = Renderer(TOKENIZERS["adds_bos"], max_length, truncation)  # type: ignore[arg-type]
    pair = renderer.render(row)
    if isinstance(pair, Dropped):
        return pair
    for completion in pair.completions:
        assert len(pair.prompt_ids) + len(completion) <= max_length
    assert pair.truncated == (max_length < 16)
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    for text, ids in zip((pair.prompt_text, pair.chosen_text, pair.rejected_text), parts, strict=True):
        assert text == renderer.tokenizer.decode(list(ids or ()), skip_special_tokens=True)
    return tuple(renderer.tokenizer.decode(list(ids or ())) for ids in parts)  # type: ignore[return-value]


def test_truncation_policies_cut_or_drop() -> None:
    whole = ("<s>bdfgh", "klmp</s>", "qrsuvwxyz</s>")
    for policy in ("drop_pair", "trim_completion", "trim_prompt"):
        assert truncated(policy, 16) == whole
    assert truncated("drop_pair", 15) == Dropped("too_long", "here")

    # Cut at its EOS, then into the text; the other keeps its EOS until the budget reaches it.
    assert truncated("trim_completion", 15) == ("<s>bdfgh", "klmp</s>", "qrsuvwxyz")
    assert truncated("trim_completion", 11) == ("<s>bdfgh", "klmp</s>", "qrsuv")
    assert truncated("trim_completion", 10) == ("<s>bdfgh", "klmp", "qrsu")
    assert truncated("trim_completion", 7) == ("<s>bdfgh", "k", "q")
    assert truncated("trim_completion", 6) == Dropped("prompt_too_long", "here")
    assert truncated("trim_completion", 8, Row("bdfgh", "kld", "klm", where="x")) == Dropped("identical", "x")

    assert truncated("trim_prompt", 15) == ("<s>dfgh", "klmp</s>", "qrsuvwxyz</s>")
    assert truncated("trim_prompt", 12) == ("<s>h", "klmp</s>", "qrsuvwxyz</s>")
    assert truncated("trim_prompt", 11) == Dropped("completion_too_long", "here")


def test_trim_prompt_keeps_a_bos_that_the_template_wrote() -> None:
    renderer = Renderer(build("adds_bos", BEGINS_WITH_BOS), 12, "trim_prompt")
    pair = renderer.render(Row((USER,), (CAT,), (ON,)))
    assert isinstance(pair, TokenizedPair) and pair.truncated
    # "cat" + space + EOS leave 9 of 12 tokens: BOS and the last 8 of the prompt.
    assert decoded(renderer, pair.prompt_ids) == "<s>sistant) "[:3] + "istant) "


@settings(max_examples=60, deadline=None)
@given(TEXT.filter(bool), TEXT.filter(bool), TEXT.filter(bool), st.integers(2, 40))
@pytest.mark.parametrize("policy", ["drop_pair", "trim_completion", "trim_prompt"])
def test_truncation_treats_all_completions_alike(
    policy: str, prompt: str, chosen: str, rejected: str, limit: int
) -> None:
    whole = Renderer(TOKENIZERS["prepend"], 10_000, "drop_pair").render(Row(prompt, chosen, rejected))
    pair = Renderer(TOKENIZERS["prepend"], limit, policy).render(Row(prompt, chosen, rejected))  # type: ignore[arg-type]
    if isinstance(whole, Dropped) or isinstance(pair, Dropped):
        return
    longest = max(len(pair.prompt_ids) + len(completion) for completion in pair.completions)
    assert longest <= limit and (longest == limit or not pair.truncated)
    budget = limit - len(pair.prompt_ids)
    for before, after in zip(whole.completions, pair.completions, strict=True):
        assert after == before[:budget] and after
    assert pair.prompt_ids[0] == 1
    assert whole.prompt_ids[1:][-len(pair.prompt_ids) + 1 :] == pair.prompt_ids[1:]


def test_invalid_arguments_raise() -> None:
    with pytest.raises(DataError, match="choose drop_pair, trim_completion, trim_prompt"):
        Renderer(TOKENIZERS["adds_bos"], 10, "trim")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="max_length=1"):
        Renderer(TOKENIZERS["adds_bos"], 1, "drop_pair")
    endless = build("adds_bos")
    endless.eos_token = None
    with pytest.raises(DataError, match="does not have an EOS token"):
        Renderer(endless, 10, "drop_pair")


def test_prompt_ids_do_not_depend_on_the_tokenizer() -> None:
    rows = [render(Renderer(TOKENIZERS[kind], 64, "drop_pair"), "on?", "cat", "on") for kind in KINDS]
    assert {pair.prompt_id for pair in rows} == {prompt_id("on?")} and len(prompt_id("on?")) == 16
    assert prompt_id((USER,)) != prompt_id((CAT,))
