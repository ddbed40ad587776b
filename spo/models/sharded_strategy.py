"""The strategy that shards a policy over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from spo.models.sharded_state import load_shards, named_optimizer_state, read_whole, reshard_parts, write_state
from spo.processes import gather_objects
from spo.records.checkpoint_folders import RUN_KEY, write_manifest


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of a run, whose checkpoints are folders.

    Each process writes its own shards, and any number of processes reads these. Lightning would copy the shards of all
    weights and optimizer states to the host before it writes them, and would make the state of an optimizer by taking a
    step.
    """

    def __init__(self) -> None:
        super().__init__("auto", tensor_parallel_size=1, save_distributed_checkpoint=True)

    def setup_environment(self) -> None:
        """Let all processes share the weights, where Lightning would let those of a node have all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the shards of this process, without copies."""
        assert self.lightning_module is not None
        reshard_parts(self.lightning_module)
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the shards of this process by the names of parameters, without copies."""
        assert self.lightning_module is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return named_optimizer_state(self.lightning_module, plain)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint folder; all processes fail where one does.

        Args:
            checkpoint: Content of the checkpoint; that of the first process counts, but for the shards.
            filepath: Folder to write.
            storage_options: Not used.

        Raises:
            OSError: A process cannot write.
        """
        folder = Path(self.broadcast(filepath))
        failure: OSError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_state(checkpoint, folder, is_first=self.is_global_zero)
        except OSError as error:
            failure = error
        if found := next(filter(None, gather_objects(None if failure is None else failure.args)), None):
            raise failure or OSError(*found[:2], str(folder))
        write_manifest(folder, checkpoint["global_step"], checkpoint.get(RUN_KEY))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder, or a file of a run on one device or under DDP, into the shards of this process.

        Args:
            checkpoint_path: Path of the checkpoint.
            weights_only: Not used: nothing but plain values and tensors is ever read.
        """
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        return load_shards(self.lightning_module, self.optimizers, path, strict=self.lightning_module.strict_loading)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing, because :meth:`load_checkpoint` has loaded the weights."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Reader of checkpoints for one device and DDP, which each process has whole: folders of shards too."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return read_whole(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)
