"""Prompts that the regularizer samples for: those of a split, those without pairs, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from spo.data import DataError
from spo.data.prompt_file import PromptFile
from spo.notes import note
from spo.regularizers import Regularizer
from spo.stages.prepare import Prepared


def regularizer_prompts(cfg: DictConfig, prepared: Prepared, regularizer: Regularizer) -> Sequence[Sequence[int]]:
    """Return the token ids of the prompts that the regularizer samples for; none for those of the training split.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Data of the run.
        regularizer: Regularizer of the run.

    Raises:
        DataError: There is no prompt, or none that leaves room for a sample.
    """
    chosen = str(regularizer.prompts)  # A file may have a number for a name.
    if chosen == "train":
        return ()
    new = OmegaConf.select(cfg, "regularizer.max_new_tokens") or cfg.data.max_new_tokens
    if chosen == "selection":
        if not prepared.prompts["selection"]:
            raise DataError("regularizer.prompts=selection: the selection split does not have a prompt; choose train")
        return [prompt.ids for prompt in prepared.sampling_prompts("selection", new)]
    if chosen == "unlabeled":
        if not prepared.unlabeled:
            raise DataError(
                "regularizer.prompts=unlabeled: every prompt has a training pair in use; set data.num_pairs to fewer "
                "pairs, or data.source.num_unlabeled with data=stories"
            )
        return [prompt.ids for prompt in prepared.sampling_prompts("unlabeled", new)]
    columns = OmegaConf.select(cfg, "data.source.columns")
    prompts = PromptFile(chosen, columns, cfg.data.get("on_bad_row", "stop")).token_ids(prepared.renderer)
    room = prepared.renderer.max_length - new
    fitting = [ids for ids in prompts if len(ids) <= room]
    if not fitting:
        raise DataError(
            f"regularizer.prompts={chosen}: none of the {len(prompts)} prompts leaves room for {new} sampled tokens "
            f"within data.max_length={prepared.renderer.max_length}: set regularizer.max_new_tokens lower"
        )
    if missing := len(prompts) - len(fitting):
        sentence = f"{missing} of {len(prompts)} prompts leave no room for {new} sampled tokens and are not used"
        note("long_regularizer_prompts", f"regularizer.prompts={chosen}: {sentence}", missing)
    return fitting
