"""The stages before training on two processes: the same models, pairs and log-probs as in one, made once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from spo import processes
from spo.config.compose import compose
from spo.data import DataError
from spo.data.logps_store import LogpsStore, sequence_key
from spo.models.tiny import build_tokenizer
from spo.notes import collect_notes
from spo.processes import PeerLostError, gather, rank
from spo.records.cache import MANIFEST, cached
from spo.records.files import read_json, read_jsonl
from spo.sampling import sample
from spo.signals import Interrupted
from spo.stages import pairs, reference_model
from spo.stages.assemble import build_trainer
from spo.stages.from_config import resolve_values
from spo.stages.pairs import drawn_completions
from spo.stages.prepare import prepare_run
from spo.stages.reference_logps import cut_into_batches, fill
from tests.helpers import (
    BOS,
    EOS,
    PAD,
    PLAIN,
    model_spec,
    random_rows,
    run_on_two_ranks,
    save_model,
    small_model,
    tiny_llama,
)

Job = Callable[[Path], Any]


def in_two_processes(folder: Path, job: Job) -> list[Any]:
    """Run a job in two forked processes that have met, and return what each returns: a value or an error."""
    context: Any = multiprocessing.get_context("fork")
    running = [context.Process(target=_one_of_two, args=(number, folder, job)) for number in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in running] == [0, 0]
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def _one_of_two(number: int, folder: Path, job: Job) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
    store = f"file://{folder.absolute()}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    try:
        result = job(folder)
        processes.share(None)  # Neither leaves before the other is done.
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{number}.pt")
    os._exit(0)  # Without a farewell to the other process.


# --- the cache -----------------------------------------------------------------------------------------------------


def lengths_of_words(folder: Path | None) -> None:
    """Build an entry of the cache, with one word for each process."""
    lengths = gather([len(word) for word in processes.deal(["one", "three"])])
    if folder is not None:
        (folder / "content").write_text(json.dumps(lengths))


def build_thrice(folder: Path) -> list[Any]:
    """Ask for an entry that is missing, for the same, and for it again after damage; return path and builds of each."""
    found: list[Any] = []
    builds: list[Path | None] = []

    def build(entry: Path | None) -> None:
        builds.append(entry)
        lengths_of_words(entry)

    for ask in range(3):
        path = cached(folder / "cache", "kind", {"a": 1}, build)
        found.append((path, (path / "content").read_text(), [one is None for one in builds]))
        processes.share(None)
        if ask == 1 and rank() == 0:
            (path / "content").write_text("damaged")
        builds.clear()
    return found


def test_all_processes_build_an_entry_and_the_first_one_writes_it(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, build_thrice)
    path = tmp_path / "cache" / "kind" / first[0][0].name
    for found, is_other in ((first, False), (second, True)):
        assert found == [(path, "[3, 5]", [is_other]), (path, "[3, 5]", []), (path, "[3, 5]", [is_other])]
    assert {one.name for one in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}
    assert cached(tmp_path / "cache", "kind", {"a": 1}, lengths_of_words) == path  # The key is that of one process.


def failing_on(number: int) -> Job:
    """Return a job whose build fails in one process, before the processes share its result."""

    def job(folder: Path) -> None:
        def build(entry: Path | None) -> None:
            if entry is not None:
                (entry / "half").write_text("")
            if rank() == number:
                raise ValueError("no such thing")
            lengths_of_words(entry)

        try:
            cached(folder / "cache", "kind", {}, build)
        finally:
            if rank() == 0:
                torch.save([one.suffix for one in (folder / "cache" / "kind").iterdir()], folder / "left")

    return job


@pytest.mark.parametrize("number", [0, 1])
def test_failed_build_ends_all_processes_and_leaves_no_entry(number: int, tmp_path: Path) -> None:
    results = in_two_processes(tmp_path, failing_on(number))
    assert isinstance(results[number], ValueError) and isinstance(results[1 - number], PeerLostError)
    assert torch.load(tmp_path / "left") == [".lock"]


def test_cache_that_cannot_be_written_ends_all_processes(tmp_path: Path) -> None:
    def job(folder: Path) -> None:
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "cache" / "kind").touch()  # A file in place of the folder.
        cached(folder / "cache", "kind", {}, lengths_of_words)

    first, second = in_two_processes(tmp_path, job)
    assert not isinstance(first, PeerLostError) and isinstance(second, PeerLostError)


# --- the reference pass --------------------------------------------------------------------------------------------

ROWS = [(tuple(prompt), tuple(completion)) for prompt, completion in random_rows(31, seed=3)]
BATCH_TOKENS = 28


def filled(folder: Path) -> dict[str, Any]:
    """Fill the store of a folder, and return its log-probs, the rows of each write, and the number of passes."""
    store, model = LogpsStore(folder / "logps.sqlite", torch.float64), tiny_llama()
    writes: list[int] = []
    passes: list[None] = []

    def put(keys: Sequence[bytes], logps: torch.Tensor) -> None:
        writes.append(len(keys))
        LogpsStore.put(store, keys, logps)

    store.put = put  # type: ignore[method-assign]
    handle = model.register_forward_pre_hook(lambda *_: passes.append(None))
    fill(store, model, ROWS, PAD, PLAIN, BATCH_TOKENS)
    handle.remove()
    processes.share(None)
    logps = store.get([sequence_key(*row) for row in ROWS]).tolist()
    return {"logps": logps, "writes": writes, "passes": len(passes)}


def test_processes_share_the_reference_pass(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, filled)
    (tmp_path / "logps.sqlite").unlink()
    alone = filled(tmp_path)
    sizes = [len(batch) for batch in cut_into_batches(ROWS, BATCH_TOKENS, PLAIN)]
    assert len(sizes) % 2 == 1 and len(sizes) > 5  # The last round has no batch for the second process.
    assert first["logps"] == second["logps"] == alone["logps"] and math.nan not in alone["logps"]
    assert alone["writes"] == sizes and alone["passes"] == len(sizes)
    assert first["writes"] == [sum(sizes[i : i + 2]) for i in range(0, len(sizes), 2)] and not second["writes"]
    assert [first["passes"], second["passes"]] == [len(sizes) // 2 + 1, len(sizes) // 2]


# --- samples -------------------------------------------------------------------------------------------------------

PROMPTS = [(BOS, 3 + i, *range(4, 4 + i % 5)) for i in range(11)]
SAMPLING: Any = {
    "model": {},
    "data": {"max_new_tokens": 6, "seed": 0},
    "trainer": {"accelerator": "cpu"},
    "speed": {"sampler": "static"},
}
RENDERER: Any = SimpleNamespace(max_length=10, tokenizer=SimpleNamespace(pad_token_id=PAD))


def drawn(folder: Path) -> tuple[list[Any], list[int]]:
    """Draw a completion of each prompt, and return them with the number of rows of each batch of this process."""
    sizes: list[int] = []

    def counted(model: Any, prompts: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        return sample(model, prompts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "sample", counted)
        cfg = cast(DictConfig, OmegaConf.create(SAMPLING | {"paths": {"cache": str(folder / "cache")}}))
        spec = model_spec(dtype="float64")
        found = drawn_completions(cfg, spec, str(folder / "model"), RENDERER, PROMPTS, [EOS])
    return found, sizes


def test_processes_share_the_samples(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    first, second = in_two_processes(tmp_path, drawn)
    shutil.rmtree(tmp_path / "cache")
    alone, of_one = drawn(tmp_path)
    assert first[0] == second[0] == alone and len(set(alone)) > 5
    # Prompts with the same room for a completion are drawn together: eight short ones, and one longer in each length.
    lengths = [min(6, 10 - len(prompt)) for prompt in PROMPTS]
    groups = [lengths.count(room) for room in sorted(set(lengths))]
    assert of_one == groups and len(groups) > 1
    assert sum(first[1]) + sum(second[1]) == len(PROMPTS) and abs(sum(first[1]) - sum(second[1])) < 3


# --- supervised fine-tuning, and pairs of a source that samples them --------------------------------------------------

CASES = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "short": ("sft.batch_size=13",),  # The second batch of an epoch has a single story.
    "single": ("sft.batch_size=1",),
}
WORDS = (
    "+debug=tiny",
    "method=dpo",
    "judge=none",
    "logger=record",
    "model=hf",
    "model.dtype=float64",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "sft.max_steps=5",
    "sft.num_warmup_steps=1",
    "sft.batch_size=5",
    "data.source.num_sft=14",
    "data.source.limit=8",
    "data.max_length=512",
    "data.max_new_tokens=12",
)


def prepared(folder: Path, case: str, devices: int) -> dict[str, Any]:
    """Prepare a run, and return its notes and the number of processes that fine-tuned together."""
    cache = folder / str(devices) / case
    words = [*WORDS, *CASES[case], f"model.path={folder}/model", f"trainer.devices={devices}", f"paths.cache={cache}"]
    cfg = OmegaConf.to_container(compose(words, run_dir=folder), resolve=True)
    trainers: list[Trainer] = []

    def trainer(**settings: Any) -> Trainer:
        trainers.append(Trainer(**settings))
        return trainers[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        collect_notes() as notes,
        pytest.raises(DataError, match="none of the sampled pairs can be used"),  # After so few steps, no story ends.
    ):
        patch.setattr(reference_model, "Trainer", trainer)
        prepare_run(cast(DictConfig, OmegaConf.create(cfg)))
    return notes | {"processes": trainers[0].world_size}


def completions(cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the completions of a cache, by the digest of their prompts."""
    folders = [file.parent for file in (cache / "completions_for_pairs").glob(f"*/{MANIFEST}")]
    return {read_json(one / MANIFEST)["key"]["prompts"]: read_jsonl(one / pairs.ROWS_FILE) for one in folders}


@pytest.mark.slow
def test_two_processes_prepare_what_one_does(tmp_path: Path) -> None:
    """All cases share one pair of processes."""
    small_model(0, vocab_size=300, n_positions=512, initializer_range=0.1).save_pretrained(tmp_path / "model")
    build_tokenizer(300, 50, seed=0).save_pretrained(tmp_path / "model")
    run_on_two_ranks(__name__, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert all(found[case]["processes"] == 2 and "notes/sft_not_dealt" not in found[case] for case in ("ddp", "fsdp"))
    assert found["single"]["processes"] == 1 and "notes/sft_not_dealt" in found["single"]
    for case in CASES:
        assert "notes/sft_not_dealt" not in prepared(tmp_path, case, devices=1)
        two, one = (tmp_path / devices / case for devices in "21")
        [of_two], [of_one] = ([*(cache / "sft").glob("*/model.safetensors")] for cache in (two, one))
        assert of_two.parent.name == of_one.parent.name  # The key of the cache does not name the processes.
        weights, right = load_file(of_two), load_file(of_one)
        assert weights.keys() == right.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-10)
        drawn = completions(one)
        assert completions(two) == drawn and len(drawn) == 3  # splits


# --- signals -------------------------------------------------------------------------------------------------------


def test_trainers_of_a_run_leave_signals_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler of TERM would wait for the other process, which may be in another place."""
    handlers: list[Any] = []

    def fit(trainer: Trainer, *_: object, **__: object) -> None:
        trainer._signal_connector.register_signal_handlers()
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "fit", fit)
    words = [*WORDS, "model=tiny", f"paths.cache={tmp_path}/cache", "trainer.devices=1", "trainer.max_steps=4"]
    cfg = resolve_values(compose(words, run_dir=tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    for start in (lambda: prepare_run(cfg), lambda: build_trainer(cfg, [], []).fit(LightningModule())):
        with pytest.raises(Interrupted):
            start()
    assert handlers == [before, before]


if __name__ == "__main__":
    [out] = map(Path, sys.argv[1:])
    processes.join("cpu")
    both = {case: prepared(out, case, devices=2) for case in CASES}
    if rank() == 0:
        torch.save(both, out / "found.pt")
