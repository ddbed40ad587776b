"""Names of the files and folders in directories of runs, sweeps and iterations, and their only list in the code.

The files of ``conf/callbacks/`` repeat those names that a callback takes as its path.
"""

from __future__ import annotations

# Files of a run directory.
CONFIG = "config.yaml"  # the configuration as plain values
COMPOSED = "composed.yaml"  # the configuration with its interpolations, from which a resumed run starts
IDENTITY = "identity.json"
PROVENANCE = "provenance.json"
METRICS = "metrics.json"
HISTORY = "history.jsonl"
SAMPLES = "samples.jsonl"
SELECTION_SAMPLES = "samples.selection.jsonl"
VALIDATION_SAMPLES = "samples.validation.jsonl"
COEFFICIENTS = "coefficients.json"
POLICY_DIGESTS = "policy.json"  # SHA-256 of each file of the saved policy, and of the two files below
LOSS = "loss.safetensors"  # parameters and buffers of the loss
REFERENCE = "reference.safetensors"  # weights of a reference that moved
HEALTH = "health.json"
BAD_ROWS = "bad_rows.jsonl"
EXTRAPOLATION = "extrapolation.json"  # factor and digests of the models that the policy was extrapolated from
FACTOR_SEARCH = "search.json"  # factors that a search tried, with what it measured
FAILURE = "failure.json"
REPORT = "report.html"
WANDB_RUN = "wandb_run.json"
RUN_LOCK = ".lock"

# Folders of a run directory.
POLICY = "policy"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"

# Files in the folder of checkpoints.
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
CHECKPOINT_MANIFEST = "checkpoint.json"  # in a checkpoint that is a folder: step, run, and checksums of its files

# Files and folders of a sweep directory.
SWEEP = "sweep.json"
SWEEP_LOCK = ".sweep.lock"
PROCESS = ".process"  # beginning of the name of a file that stands for a running process of a job
STOP = ".stop"  # no further job begins
OPTIMIZATION = "optimization.json"
OPTIMIZATION_LOCK = ".optuna.lock"
COMPARISON = "comparison"

# Files and folders of an iteration's directory.
ITERATION = "iterate.json"
EXTRAPOLATED = "extrapolated"  # run directory within that of a round: the policy beyond the trained one


def earlier_metrics(steps: int) -> str:
    """Return the name that ``metrics.json`` gets when a run that finished at ``steps`` is continued."""
    return f"metrics.{steps}.json"


def round_directory(number: int) -> str:
    """Return the name of the run directory of a round in the directory of its iteration, such as ``round-1``."""
    return f"round-{number}"
