"""The random state that layers such as dropout draw from, for an exact resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spo import processes
from spo.seeds import derive_seed


def gather_random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Return the random state of each process by the type of a device. All processes call this.

    Args:
        device: Device of the policy.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return processes.gather_objects(state)


def restore_random_state(states: Sequence[Mapping[str, Tensor]], device: torch.device, *seed: object) -> None:
    """Restore the random state of this process.

    A process that was not there when the states were saved gets a state of its own.

    Args:
        states: Random state of each process, see :func:`gather_random_states`.
        device: Device of the policy.
        seed: Values from which a further process derives its state, with its rank.
    """
    if processes.rank() >= len(states):
        torch.manual_seed(derive_seed("random state", *seed, processes.rank()))
        return
    state = states[processes.rank()]
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
