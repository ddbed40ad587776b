"""Artifacts of W&B: the saved policy, and the digests of the data that it learned from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import wandb

from spo.records import filenames
from spo.records.files import read_mapping, to_json
from spo.records.operational_keys import CHOICES
from spo.tracking.describe import RunDescription


def policy_artifact(directory: Path, run_id: str, metrics: Mapping[str, float]) -> wandb.Artifact:
    """Return the files of ``policy/``, with the final metrics and the digests of the files as metadata.

    The files are not copied, so an offline run needs them where they are until it is uploaded.

    Args:
        directory: Run directory.
        run_id: Id of the W&B run.
        metrics: Final metrics of the run.
    """
    digests = read_mapping(directory / filenames.POLICY_DIGESTS)
    artifact = wandb.Artifact(f"policy-{run_id}", type="model", metadata={"metrics": metrics, "sha256": digests})
    folder = directory / filenames.POLICY
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        artifact.add_file(str(file.absolute()), name, policy="immutable", skip_cache=True)
    return artifact


def data_artifact(description: RunDescription) -> wandb.Artifact:
    """Return the digests of the data of a run, without the data; equal digests are one version of the artifact.

    Args:
        description: Run with ``choices`` and ``provenance`` in its config.
    """
    provenance = description.provenance
    data, inputs = (provenance.get(name) or {} for name in ("data", "inputs"))
    digests = {"data_sha256": data.get("sha256"), **inputs}
    member = (description.config.get(CHOICES) or {}).get("data", "unnamed")
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"data-{member}")
    artifact = wandb.Artifact(name, type="dataset", metadata=digests)
    with artifact.new_file("digests.json") as file:
        file.write(to_json(digests, sort_keys=True))
    return artifact
