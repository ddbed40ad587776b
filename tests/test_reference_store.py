"""Stored reference log-probs: exact, shared by processes, written at once, and never silently wrong."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from spo.callbacks import Checkpoint
from spo.data import DataError, PreparedPairs, TokenizedPair
from spo.data.collate import collate
from spo.data.logps_store import LogpsStore, sequence_key
from spo.forward.probe import enable_packing
from spo.forward.speed import Speed
from spo.losses import DPOLoss
from spo.models import CachedReference, FrozenReference, PrecomputedReference
from spo.stages.prepare import Prepared
from spo.stages.reference_logps import cut_into_batches, logps_store, precomputed_logps
from tests.helpers import (
    FAST,
    PAD,
    PLAIN,
    Spied,
    completion_logps,
    make_data,
    make_module,
    make_trainer,
    model_spec,
    random_pairs,
    save_model,
    sequences,
    tiny_llama,
    tiny_tokenizer,
)

PAIRS = random_pairs(30, seed=0)
CFG = OmegaConf.create(
    {
        "model": {},
        "trainer": {"precision": "32-true", "accelerator": "cpu"},
        "speed": {key: value for key, value in asdict(PLAIN).items() if key != "probed"},
    }
)
PACKED = OmegaConf.merge(CFG, {"speed": {"packing": True, "share_prompts": True, "completion_only": True}})
BATCH_TOKENS = 60


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), scale=0.2)


def prepared(
    folder: Path,
    train: Sequence[TokenizedPair] = PAIRS[:24],
    selection: Sequence[TokenizedPair] = PAIRS[24:],
    **spec: Any,
) -> Prepared:
    pairs = PreparedPairs(list(train), list(selection), [], {}, [])
    return Prepared(model_spec(**spec), str(folder), str(folder), tiny_tokenizer(), None, pairs, {}, [], None)  # type: ignore[arg-type]


def scored(
    cache: Path, data: Prepared, batch_tokens: int = BATCH_TOKENS, cfg: Any = CFG
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return the tables, and the numbers of sequences that were found and computed."""
    reference = PrecomputedReference(str(cache), batch_tokens)
    tables = precomputed_logps(cfg, data, reference)  # type: ignore[arg-type]
    return tables, (reference.found, reference.computed)


def rows_of(pairs: Sequence[TokenizedPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return list(dict.fromkeys((pair.prompt_ids, c) for pair in pairs for c in pair.completions))


ALL = len(rows_of(PAIRS))


@pytest.fixture
def forwards() -> Iterator[list[int]]:
    """Yield a list that grows by one with every forward pass of a language model."""
    seen: list[int] = []

    def count(module: nn.Module, _: Any) -> None:
        if type(module).__name__ == "LlamaModel":
            seen.append(1)

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    yield seen
    handle.remove()


# --- the store -----------------------------------------------------------------------------------------------------


def test_store_returns_exact_values(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        store = LogpsStore(tmp_path / f"{dtype}.sqlite", dtype)
        values = torch.tensor([-1 / 3, -1e-40, -123456.789, 0.0, -torch.inf], dtype=dtype)
        keys = [sequence_key((1,), (i,)) for i in range(5)]
        assert store.get(keys).isnan().all() and store.get([]).shape == (0,)
        store.put(keys[:4], values[:4])
        store.put(keys[4:], values[4:])
        again = LogpsStore(store.file, dtype).get([*keys[::-1], b"unknown"])
        assert again.dtype == dtype and torch.equal(again[:-1], values.flip(0)) and again[-1].isnan()


def test_store_keeps_the_first_value_and_ignores_nan(tmp_path: Path) -> None:
    store = LogpsStore(tmp_path / "store.sqlite", torch.float32)
    store.put([b"a"], torch.tensor([-1.0]))
    store.put([b"a", b"b", b"c"], torch.tensor([-2.0, torch.nan, -3.0]))
    assert store.get([b"a", b"c"]).tolist() == [-1, -3] and store.get([b"b"]).isnan().all()


def test_sequence_key_depends_on_prompt_completion_and_their_boundary() -> None:
    same = [(1, 2), (3, 4)]
    others = [((1,), (2, 3, 4)), ((1, 2, 3), (4,)), ((1, 2), (3,)), ((1, 2), (3, 5)), ((2, 1), (3, 4)), ((), ())]
    keys = {sequence_key(*row) for row in others}
    assert len(keys) == len(others) and sequence_key(*same) not in keys
    assert sequence_key(*same) == sequence_key([1, 2], [3, 4])
    batch = collate(PAIRS[:5], range(5), PAD)
    assert batch.keys == [sequence_key(*row) for row in zip_rows(batch.sequences)]
    assert batch.to("cpu").keys == batch.keys


def zip_rows(found: Any) -> list[tuple[list[int], list[int]]]:
    prompts = [ids[:n] for ids, n in zip(found.input_ids.tolist(), found.prompt_length.tolist(), strict=True)]
    return list(zip(prompts, found.completions(), strict=True))


def test_store_never_returns_a_wrong_value_after_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 30
    keys = [sequence_key((1,), (i,)) for i in range(40)]
    whole = LogpsStore(tmp_path / "whole.sqlite", torch.float32)
    whole.put(keys, values)
    content, generator = whole.file.read_bytes(), random.Random(0)
    hit = content.index(struct.pack(">d", values[7].item()))  # as SQLite writes a number
    noticed = 0
    for place in [hit + 6, *(generator.randrange(len(content)) for _ in range(150))]:
        store = LogpsStore(tmp_path / "store.sqlite", torch.float32)
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        store.file.write_bytes(damaged)
        caplog.clear()
        try:
            found = store.get(keys)
        except DataError as error:
            assert "store.sqlite cannot be read or written" in str(error) and "set reference.cache_dir" in str(error)
            continue
        assert torch.equal(found[~found.isnan()], values[~found.isnan()])
        if "are damaged: computing them again" in caplog.text:
            noticed += 1
            assert found.isnan().all() and (tmp_path / "store.damaged").read_bytes() == damaged
            store.put(keys, values)
            assert torch.equal(store.get(keys), values)
        else:
            assert place != hit + 6
    assert noticed > 5


@pytest.mark.parametrize("content", [b"no database at all" * 100, "half"])
def test_store_moves_a_damaged_file_aside(content: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LogpsStore(tmp_path / "store.sqlite", torch.float32)
    keys = [sequence_key((1,), (i,)) for i in range(500)]
    store.put(keys, torch.arange(500.0))
    written = store.file.read_bytes()
    store.file.write_bytes(written[: len(written) // 2] if content == "half" else content)
    store.put(keys[:1], torch.tensor([5.0]))
    assert store.get(keys[:2]).nan_to_num(-1).tolist() == [5, -1]
    assert "are damaged" in caplog.text


@pytest.mark.parametrize("row", [False, True], ids=["cut", "one row"])
def test_concurrent_processes_move_a_damaged_file_aside_once(row: bool, tmp_path: Path) -> None:
    keys = [sequence_key((1,), (i,)) for i in range(40)]
    values = torch.arange(-40.0, 0) - 0.5

    def work(store: LogpsStore, ready: Any) -> None:
        ready.wait()
        known = store.get(keys)
        store.put(keys, values)
        assert torch.equal(known[~known.isnan()], values[~known.isnan()]) and torch.equal(store.get(keys), values)

    def fresh(trial: int) -> LogpsStore:
        store = LogpsStore(tmp_path / str(trial) / "store.sqlite", torch.float64)
        store.put(keys, values)
        content = store.file.read_bytes()
        good = struct.pack(">d", values[7].item())  # as SQLite writes a number
        damaged = content.replace(good, bytes(8)) if row else content[: len(content) // 2]
        assert damaged != content
        store.file.write_bytes(damaged)
        return store

    for trial in range(10):
        store = fresh(trial)
        ready = multiprocessing.get_context("fork").Barrier(3)
        processes = [in_a_process(lambda store=store, ready=ready: work(store, ready)) for _ in range(3)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert torch.equal(store.get(keys), values)
    for trial in range(10, 20):
        store, threads = fresh(trial), 3
        with ThreadPoolExecutor(threads) as pool:
            ready = threading.Barrier(threads)
            for done in [pool.submit(work, store, ready) for _ in range(threads)]:
                done.result(60)
        assert torch.equal(store.get(keys), values)


def test_store_reports_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = LogpsStore(tmp_path / "file" / "store.sqlite", torch.float32)
    with pytest.raises(
        DataError, match=r"file/store\.sqlite cannot be read or written \(.*a folder\): move it away, or set"
    ):
        store.get([b"a"])


# --- the pass ------------------------------------------------------------------------------------------------------


Ids = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(Ids, Ids), min_size=1, max_size=40, unique=True),
    budget=st.integers(1, 60),
    speed=st.sampled_from([PLAIN, FAST, replace(FAST, share_prompts=False)]),
)
def test_batches_keep_prompts_together_within_the_token_limit(rows: list[Any], budget: int, speed: Speed) -> None:
    batches = list(cut_into_batches(rows, budget, speed))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        laid_out = replace(speed, probed=True).arrange(sequences(batch))
        ids = laid_out.input_ids if laid_out.packed is None else laid_out.packed.input_ids
        assert ids.numel() <= budget or len(batch) == 1
    widths = [max(len(prompt) + len(completion) for prompt, completion in batch) for batch in batches]
    assert widths[0] == max(len(prompt) + len(completion) for prompt, completion in rows)
    for prompt, _ in rows:
        own = [completion for other, completion in rows if other == prompt]
        room = budget // (len(prompt) + max(map(len, own)))
        places = {i for i, batch in enumerate(batches) for other, _ in batch if other == prompt}
        assert len(places) <= -(-len(own) // max(room, 1))


@pytest.mark.parametrize("cfg", [CFG, PACKED], ids=["padded", "packed"])
def test_precomputed_logps_match_the_model(cfg: Any, model_folder: Path, tmp_path: Path) -> None:
    tables, counts = scored(tmp_path, prepared(model_folder), cfg=cfg)
    assert counts == (0, ALL)
    model = model_spec().start(model_folder)
    for pairs, table in ((PAIRS[:24], tables["train"]), (PAIRS[24:], tables["selection"])):
        assert table.shape == (len(pairs), 2) and table.dtype == torch.float32
        for pair, found in zip(pairs, table, strict=True):
            alone = [completion_logps(model, sequences([(pair.prompt_ids, c)])) for c in pair.completions]
            torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5 * max(map(len, pair.completions)))


def test_precomputed_logps_of_one_batch_match_to_rounding(model_folder: Path, tmp_path: Path) -> None:
    model = model_spec().start(model_folder)
    together = scored(tmp_path / "whole", prepared(model_folder, PAIRS, []), 10**6)[0]
    [batch] = cut_into_batches(rows_of(PAIRS), 10**6, PLAIN)
    values = dict(zip(batch, completion_logps(model, sequences(batch)), strict=True))
    expected = torch.stack([torch.stack([values[p.prompt_ids, c] for c in p.completions]) for p in PAIRS])
    torch.testing.assert_close(together["train"], expected, rtol=0, atol=1e-6)
    assert set(together) == {"train"}


def test_stored_logps_are_not_computed_again(model_folder: Path, tmp_path: Path, forwards: list[int]) -> None:
    whole, _ = scored(tmp_path, prepared(model_folder))
    assert len(forwards) > 5
    forwards.clear()
    again, counts = scored(tmp_path, prepared(model_folder))
    assert counts == (ALL, 0) and not forwards
    assert all(torch.equal(again[split], whole[split]) for split in whole)
    # A part of the pairs, in another order and other splits.
    part, counts = scored(tmp_path, prepared(model_folder, PAIRS[26:22:-1], PAIRS[3:5]))
    assert counts[1] == 0 and torch.equal(part["train"][3], whole["train"][23])
    # A superset, in which some completions belong to known prompts.
    more = [*PAIRS, *random_pairs(4, seed=9), replace(PAIRS[2], chosen_ids=(*PAIRS[2].chosen_ids[:-1], 4, 2))]
    wide, counts = scored(tmp_path, prepared(model_folder, more, []))
    assert counts == (ALL, len(rows_of(more)) - ALL) and counts[1] > 1
    assert torch.equal(wide["train"][:24], whole["train"]) and not wide["train"].isnan().any()


def test_changed_token_recomputes_only_its_sequence(model_folder: Path, tmp_path: Path) -> None:
    scored(tmp_path, prepared(model_folder))
    pair = PAIRS[7]
    changed = replace(pair, rejected_ids=(*pair.rejected_ids[:-2], 9, *pair.rejected_ids[-1:]))
    assert scored(tmp_path, prepared(model_folder, [*PAIRS[:7], changed, *PAIRS[8:]], []))[1] == (ALL - 1, 1)
    changed = replace(pair, prompt_ids=(*pair.prompt_ids, 9))
    assert scored(tmp_path, prepared(model_folder, [*PAIRS[:7], changed, *PAIRS[8:]], []))[1] == (ALL - 2, 2)


def test_store_file_depends_on_weights_tokenizer_dtype_and_layout(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(
        cfg: Any = CFG, folder: Path = model_folder, speed: Speed = FAST, device: str = "cpu", **spec: Any
    ) -> Path:
        return logps_store(cfg, prepared(folder, **spec), str(tmp_path), speed, torch.device(device)).file

    other = save_model(tmp_path / "other", scale=0.2, seed=1)
    retokenized = save_model(tmp_path / "retokenized", scale=0.2)
    (retokenized / "tokenizer.json").write_text((retokenized / "tokenizer.json").read_text() + " ")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    files = [
        file(),
        file(folder=other),
        file(folder=retokenized),
        file(dtype="bfloat16"),
        file(attn_implementation="sdpa"),
        file(adapter_path=str(adapter)),
        file(OmegaConf.merge(CFG, {"trainer": {"precision": "bf16-mixed"}})),
        file(speed=PLAIN),
        file(speed=replace(FAST, share_prompts=False)),
        file(speed=replace(FAST, packing=False)),
        file(device="cuda"),
    ]
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"spo.stages.reference_logps.{package}.__version__", "0.0")
            files.append(file())
    assert len(set(files)) == len(files) and file() == files[0]
    assert file(speed=replace(FAST, probed=True)) == file(device="cpu:0") == files[0]
    assert file(speed=replace(PLAIN, share_prompts=True)) == file(speed=PLAIN)  # without packing no prompt is shared
    wide = logps_store(CFG, prepared(model_folder, dtype="float64"), str(tmp_path), FAST, torch.device("cpu"))
    assert wide.dtype == torch.float64
    scored(tmp_path, prepared(model_folder))
    assert scored(tmp_path, prepared(other))[1] == (0, ALL)


def test_precomputed_logps_pad_shorter_lists_with_nan(model_folder: Path, tmp_path: Path) -> None:
    lists = [replace(PAIRS[0], worse_ids=((8, 2), (9, 9, 2))), PAIRS[1], replace(PAIRS[2], worse_ids=((7, 2),))]
    table = scored(tmp_path, prepared(model_folder, lists, []))[0]["train"]
    assert table.isnan().tolist() == [[False] * 4, [False, False, True, True], [False, False, False, True]]
    batch = collate(lists, [0, 1, 2], PAD, table)
    model = model_spec().start(model_folder)
    assert batch.reference_logps is not None
    torch.testing.assert_close(batch.reference_logps, completion_logps(model, batch.sequences), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_precomputed_logps_cover_further_completions(size: int, model_folder: Path, tmp_path: Path) -> None:
    lists = [replace(PAIRS[0], worse_ids=((8, 2), (9, 9, 2))), PAIRS[1], PAIRS[2]]
    extra = [{"a": PAIRS[i - 1].chosen_ids, "b": lists[i].chosen_ids if i == 1 else (7, i + 4, 2)} for i in range(3)]
    lists = [replace(one, extra=own) for one, own in zip(lists, extra, strict=True)]
    table = scored(tmp_path, prepared(model_folder, lists, []))[0]["train"]
    assert table.shape == (3, 4 + 2) and table.isnan().sum() == 4
    model = model_spec().start(model_folder)
    # A batch may lack the longest list of the split.
    batch = collate(lists[-size:], range(3)[-size:], PAD, table)
    assert batch.reference_logps is not None
    torch.testing.assert_close(batch.reference_logps, completion_logps(model, batch.sequences), rtol=0, atol=1e-5)


def test_cached_logps_cover_further_completions(tmp_path: Path) -> None:
    pairs = [replace(PAIRS[0], extra={"a": (7, 8, 2)}), replace(PAIRS[1], extra={"a": (9, 2)})]
    reference, model = CachedReference(str(tmp_path)), tiny_llama(3)
    reference.attach(lambda: model)
    reference.use_store(lambda folder, speed, device: LogpsStore(Path(folder) / "a.sqlite", torch.float64))
    batch = collate(pairs, [0, 1], PAD)
    first = reference.pair_logps(batch, model, PLAIN)
    reference.model = None  # the second time, all of them come from the store
    torch.testing.assert_close(reference.pair_logps(batch, model, PLAIN), first, rtol=0, atol=0)
    torch.testing.assert_close(first, completion_logps(model, batch.sequences))


def test_precomputed_logps_report_a_reference_that_returns_nan(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    model: Any = tiny_llama(dtype=torch.float32)
    token = PAIRS[0].prompt_ids[-1]  # The short text that a model is tried with when it is loaded does not have it.
    nn.init.constant_(model.get_input_embeddings().weight[token], torch.nan)
    model.save_pretrained(folder)
    broken = sum(token in (*prompt, *completion[:-1]) for prompt, completion in rows_of(PAIRS))
    assert 0 < broken < ALL
    with pytest.raises(DataError, match=rf"no number \(NaN\) as the log-probability of {broken} of {ALL} sequences"):
        scored(tmp_path, prepared(folder))


# --- killed and concurrent processes -------------------------------------------------------------------------------


def in_a_process(work: Callable[[], None]) -> multiprocessing.Process:
    process: Any = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_pass_resumes_without_repeating_batches(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = scored(tmp_path / "straight", prepared(model_folder))
    batches = list(cut_into_batches(rows_of(PAIRS), BATCH_TOKENS, PLAIN))
    put = LogpsStore.put

    def killed() -> None:
        written: list[int] = []

        def put_thrice(store: LogpsStore, keys: Any, logps: Any) -> None:
            put(store, keys, logps)
            written.append(1)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        LogpsStore.put = put_thrice  # type: ignore[method-assign]
        scored(tmp_path / "killed", prepared(model_folder))

    process = in_a_process(killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    computed: list[bytes] = []

    def spied(store: LogpsStore, keys: Any, logps: Any) -> None:
        computed.extend(keys)
        put(store, keys, logps)

    monkeypatch.setattr(LogpsStore, "put", spied)
    tables, counts = scored(tmp_path / "killed", prepared(model_folder))
    done = sum(len(batch) for batch in batches[:3])
    assert counts == (done, ALL - done) and 0 < done < ALL
    assert computed == [sequence_key(*row) for batch in batches[3:] for row in batch]  # no batch twice
    assert all(torch.equal(tables[split], straight[split]) for split in straight)


def test_concurrent_processes_share_one_pass(model_folder: Path, tmp_path: Path) -> None:
    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            tables, counts = scored(tmp_path / "shared", prepared(model_folder), batch_tokens=16)
            torch.save({**tables, "counts": counts}, tmp_path / name)

        return run

    processes = [in_a_process(work(str(i))) for i in range(3)]
    for process in processes:
        process.join(60)
    results = [torch.load(tmp_path / str(i), weights_only=True) for i in range(3)]
    assert sorted(result["counts"] for result in results) == [(0, ALL), (ALL, 0), (ALL, 0)]
    assert all(torch.equal(result["train"], results[0]["train"]) for result in results)


# --- training ------------------------------------------------------------------------------------------------------


def trained(
    folder: Path, reference: FrozenReference | None = None, steps: int = 6, resume: str | None = None, **changes: Any
) -> tuple[Spied, list[float]]:
    """Train with DPO on the first twelve pairs, three steps per epoch; return the module and the loss of each step."""
    module = make_module(
        tiny_llama(0, scale=0.2),
        loss=DPOLoss(),
        reference=reference or FrozenReference(),
        reference_model=tiny_llama(1, scale=0.2),
        beta=1.0,
        lr=0.05,
    )
    losses: list[float] = []
    kept = module.train_metrics.update

    def update(values: dict[str, Any]) -> None:
        losses.extend([float(values["loss"])] if "loss" in values else [])
        kept(values)

    module.train_metrics.update = update  # type: ignore[method-assign]
    settings = {key: changes.pop(key) for key in ("num_workers", "reference_logps") if key in changes}
    data = make_data(PAIRS[:12], PAIRS[12:17], max_steps=steps, batch_size=4, **settings)
    trainer = make_trainer(folder, max_steps=steps, **{"val_check_interval": 6, **changes})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, losses


def cached(file: Path) -> CachedReference:
    reference = CachedReference("unused")
    reference.store = LogpsStore(file, torch.float64)
    return reference


def weights(module: Spied) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


def counted(reference: CachedReference) -> list[int]:
    """Return a list that receives the number of rows of each forward pass of the reference from now on."""
    seen: list[int] = []
    attach = reference.attach

    def attach_and_watch(load: Callable[[], nn.Module]) -> None:
        attach(load)
        model: Any = reference.model
        assert enable_packing(model) is None  # it runs a forward pass, too
        model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    reference.attach = attach_and_watch  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_precomputed_and_live_references_train_alike(workers: int, tmp_path: Path) -> None:
    live, losses = trained(tmp_path, num_workers=workers)
    model = tiny_llama(1, scale=0.2)
    with torch.no_grad():
        tables = {
            split: torch.stack(
                [completion_logps(model, sequences([(p.prompt_ids, c) for c in p.completions])) for p in pairs]
            )
            for split, pairs in (("train", PAIRS[:12]), ("selection", PAIRS[12:17]))
        }
    ahead, ahead_losses = trained(tmp_path, num_workers=workers, reference_logps=tables)
    reference = cached(tmp_path / "store.sqlite")
    seen = counted(reference)
    stored, stored_losses = trained(tmp_path, reference, num_workers=workers)
    assert len(losses) == 6 and len(set(losses)) == 6
    for other_losses, other in ((ahead_losses, ahead), (stored_losses, stored)):
        assert other_losses == pytest.approx(losses, abs=1e-6)  # Llama computes its norms in float32
        torch.testing.assert_close(weights(other), weights(live), rtol=0, atol=1e-6)
    assert stored_losses[:3] == losses[:3]  # in the first epoch both score the same batches
    # Three steps and one validation: the second epoch reads the store.
    assert len(seen) == 4
    everything = [sequence_key(*row) for row in rows_of(PAIRS[:17])]
    assert not LogpsStore(tmp_path / "store.sqlite", torch.float64).get(everything).isnan().any()

    seen.clear()
    reference = cached(tmp_path / "store.sqlite")
    seen = counted(reference)
    _, again = trained(tmp_path, reference, num_workers=workers)
    assert not seen and again == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("speed", [PLAIN, FAST], ids=["padded", "packed"])
def test_cached_reference_computes_only_unknown_sequences(speed: Speed, tmp_path: Path) -> None:
    reference, model = cached(tmp_path / "store.sqlite"), tiny_llama(1)
    seen = counted(reference)
    reference.attach(lambda: model)
    assert reference.store is not None
    batch = collate(PAIRS[:6], range(6), PAD)
    assert batch.keys is not None
    expected = completion_logps(model, batch.sequences).detach()
    reference.store.put(batch.keys[2:5], torch.tensor([-100.0, -200.0, -300.0]))
    expected[2:5] = torch.tensor([-100.0, -200.0, -300.0], dtype=torch.float64)
    speed = speed.resolve_for(model)
    batch = collate(PAIRS[:6], range(6), PAD, arrange=speed.arrange)
    for forwards in ([1 if speed.packing else len(expected) - 3], []):
        seen.clear()
        found = reference.pair_logps(batch, nn.Linear(1, 1), speed)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert seen == forwards and not found.requires_grad


def test_cached_reference_locks_the_store_for_unseen_sequences_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two transactions for a new batch, one for a batch that another process has stored, none afterwards."""
    transactions: list[str] = []
    transact = LogpsStore.transact

    def counted_transact(store: LogpsStore, work: Any, *, reads: bool = False) -> Any:
        transactions.append("read" if reads else "write")
        return transact(store, work, reads=reads)

    model = tiny_llama(1)
    first, second = cached(tmp_path / "store.sqlite"), cached(tmp_path / "store.sqlite")
    batch = collate(PAIRS[:6], range(6), PAD)
    monkeypatch.setattr(LogpsStore, "transact", counted_transact)
    for reference, expected in ((first, ["read", "write"]), (second, ["read"])):
        reference.attach(lambda: model)
        found = [reference.pair_logps(batch, model, PLAIN) for _ in range(3)]
        assert transactions == expected
        torch.testing.assert_close(found[0], completion_logps(model, batch.sequences).detach(), rtol=0, atol=1e-12)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        transactions.clear()


def test_processes_that_score_a_sequence_at_once_take_the_first_value(tmp_path: Path) -> None:
    """From the step on in which they score it, so that a resumed run computes what the unbroken one did."""
    reference, model = cached(tmp_path / "store.sqlite"), tiny_llama(1)
    reference.attach(lambda: model)
    batch = collate(PAIRS[:2], range(2), PAD)
    store, keys = reference.store, batch.keys
    assert store is not None and keys is not None
    others = torch.arange(len(keys), dtype=torch.float64)

    def meanwhile(*_: Any) -> None:
        store.put(keys, others)

    model.register_forward_hook(meanwhile)
    for _ in range(2):
        assert torch.equal(reference.pair_logps(batch, model, PLAIN), others)


def test_cached_reference_opens_the_store_of_the_resolved_layout(tmp_path: Path) -> None:
    reference, asked = CachedReference("unused"), []

    def open_store(speed: Speed, device: torch.device) -> LogpsStore:
        asked.append((speed, device.type))
        return LogpsStore(tmp_path / "store.sqlite", torch.float64)

    reference.open_store = open_store
    module, _ = trained(tmp_path, reference, steps=2)
    assert asked == [(replace(FAST, probed=True), "cpu")] == [(module.speed, "cpu")]
    keys = collate(PAIRS[:12], range(12), PAD).keys or []
    assert reference.store is not None and not reference.store.get(keys).isnan().all()


def test_stored_values_reach_the_loss(tmp_path: Path) -> None:
    store = LogpsStore(tmp_path / "store.sqlite", torch.float64)
    for pair in PAIRS[:17]:
        keys = [sequence_key(pair.prompt_ids, c) for c in pair.completions]
        store.put(keys, torch.tensor([300.0, -200.0]))
    _, losses = trained(tmp_path, cached(store.file), steps=1)
    _, sound = trained(tmp_path, steps=1)
    assert losses[0] > 400 and sound[0] < 20


def test_resumed_run_with_a_cached_reference_is_bit_identical(tmp_path: Path) -> None:
    straight, losses = trained(tmp_path, cached(tmp_path / "straight.sqlite"), steps=8)
    saver = Checkpoint(str(tmp_path / "checkpoints"), "val/loss", "min")
    file = tmp_path / "resumed.sqlite"
    trained(tmp_path, cached(file), steps=2, enable_checkpointing=True, callbacks=[saver], val_check_interval=2)
    # Validation has filled the store of the first run with the selection pairs.
    assert LogpsStore(file, torch.float64).get(collate(PAIRS[12:17], range(5), PAD).keys or []).isnan().sum() == 0
    resumed, rest = trained(tmp_path, cached(file), steps=8, resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert rest == losses[2:]
    assert torch.equal(weights(resumed), weights(straight))
