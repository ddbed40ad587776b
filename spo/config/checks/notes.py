"""Notes about settings that are allowed, yet are probably not what a person means."""

from __future__ import annotations

from omegaconf import DictConfig

from spo.config.checks.targets import CheckedParts
from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.config.nodes import select
from spo.metrics.catalogue import find_logged

HALF_PRECISION = ("bfloat16", "float16")


def warnings(cfg: DictConfig) -> list[str]:
    """Return a sentence for each setting that is allowed but has no effect, or another one than its name suggests."""
    regularizer = CheckedParts(cfg).regularizer
    name, unused = select(cfg, "method.name"), unused_coefficients(cfg)
    notes = []
    if "alpha" in unused and _is_changed(cfg, "alpha", "data.default_alpha"):
        notes.append(f"{name} does not read alpha: what you set it to has no effect")
    if "beta" in unused and _is_changed(cfg, "beta", "method.default_beta"):
        notes.append(f"nothing reads beta in {name} with this regularizer: what you set it to has no effect")
    adjusted = [name for name in COEFFICIENTS if name not in unused]
    for key in (*adjusted, "reference"):
        every, steps = select(cfg, f"{key}.every"), select(cfg, "trainer.max_steps")
        if every is not None and steps is not None and every > steps:
            effect = "it never moves, as if it were frozen" if key == "reference" else f"{key} is never adjusted"
            notes.append(f"{key}.every={every} is more than trainer.max_steps={steps}: {effect}")
    warmup, steps = select(cfg, "scheduler.num_warmup_steps"), select(cfg, "trainer.max_steps")
    if warmup is not None and steps is not None and warmup >= max(steps, 2):
        notes.append(
            f"scheduler.num_warmup_steps={warmup}, but the run has {steps} steps: the learning rate does not reach "
            f"optimizer.lr={select(cfg, 'optimizer.lr')}"
        )
    if getattr(regularizer, "probe_metric", None) is not None and select(cfg, "probe.num_prompts") == 0:
        notes.append(
            "probe.num_prompts=0 leaves the regularizer out of val/loss: it is measured on the probe's samples"
        )
    if getattr(regularizer, "estimator", None) == "k1":
        notes.append(
            "regularizer.estimator=k1 measures the KL and does not regularize: its gradient is zero in expectation; "
            "tokenwise, unbiased and k2 have a gradient of the KL"
        )
    dtype = str(select(cfg, "model.dtype"))
    if dtype in HALF_PRECISION and select(cfg, "model.lora") is None:  # Adapters are in float32.
        notes.append(
            f"model.dtype={dtype} trains the weights in {dtype}, where small updates round away; "
            "model.dtype=float32 trainer.precision=bf16-mixed computes in bfloat16 and keeps the weights in float32"
        )
    if select(cfg, "model.adapter_path") is not None:
        notes.append("model.adapter_path brings its own rank, scale and targets: model.lora.* is not read")
    monitor, mode = (select(cfg, f"callbacks.checkpoint.{name}") for name in ("monitor", "mode"))
    better = getattr(find_logged(str(monitor)), "better", None)
    if (best := {"higher": "max", "lower": "min"}.get(str(better))) not in (None, mode):
        notes.append(
            f"callbacks.checkpoint.mode={mode} keeps the worst {monitor}, of which {better} is better: set "
            f"callbacks.checkpoint.mode={best}"
        )
    return notes


def _is_changed(cfg: DictConfig, group: str, default_key: str) -> bool:
    default = select(cfg, default_key)
    return select(cfg, group) is not None and select(cfg, f"{group}.value") != (0.1 if default is None else default)
