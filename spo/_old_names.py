"""Names of version 0.1 that have moved. They stay importable for one release: old run directories hold them."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Old dotted path of a module or attribute -> its new path. Packages above an old path do not need an entry. A module
# that was split does not need one either: its attributes are listed. A name that moved out of a module that still
# exists cannot be listed, since Python asks finders for missing modules only.
OLD_NAMES: dict[str, str] = {
    "spo.comparison.checks": "spo.comparison.refusals",
    "spo.comparison.command": "spo.stages.compare",
    "spo.comparison.figures": "spo.pages.comparison_figures",
    "spo.comparison.html": "spo.pages.comparison_page",
    "spo.comparison.output": "spo.pages.comparison_files",
    "spo.comparison.terminal": "spo.pages.comparison_table",
    "spo.comparison.statistics": "spo.stats",
    "spo.data.prepare": "spo.data.splits",
    "spo.data.sources.FileSource": "spo.data.files.FileSource",
    "spo.data.sources.HHSource": "spo.data.files.HHSource",
    "spo.data.sources.HubSource": "spo.data.hub.HubSource",
    "spo.data.sources.NoPreference": "spo.data.tables.NoPreference",
    "spo.data.sources.RankedFileSource": "spo.data.ranked.RankedFileSource",
    "spo.data.sources.TableSource": "spo.data.tables.TableSource",
    "spo.data.sources.data_files": "spo.data.readers.data_files",
    "spo.data.sources.read_records": "spo.data.readers.read_records",
    "spo.data.sources.shared_messages": "spo.data.prompts.count_shared_messages",
    "spo.data.sources.shared_text": "spo.data.prompts.shared_prompt_length",
    "spo.evaluation.draws": "spo.evaluation.completions",
    "spo.evaluation.evaluate": "spo.evaluation.assess",
    "spo.evaluation.intervals": "spo.stats",
    "spo.metrics.Calibration": "spo.metrics.calibration.Calibration",
    "spo.metrics.SumsAndCounts": "spo.metrics.sums.SumsAndCounts",
    "spo.models.packing": "spo.forward.packing",
    "spo.reports.charts": "spo.pages.charts",
    "spo.reports.dashboard": "spo.pages.dashboard",
    "spo.reports.html": "spo.pages.run_page",
    "spo.reports.record.RunRecord": "spo.records.run.RunRecord",
    "spo.reports.record.load_yaml": "spo.records.files.load_yaml",
    "spo.reports.record.read_alarms": "spo.records.run.read_alarms",
    "spo.reports.record.read_run": "spo.records.run.read_run",
    "spo.reports.selfcontained": "spo.pages.selfcontained",
    "spo.reports.terminal": "spo.pages.panels",
    "spo.reports.wording.INTERVAL": "spo.metrics.catalogue.INTERVAL_ENDS",
    "spo.reports.wording.clean": "spo.wording.clean",
    "spo.reports.wording.duration": "spo.wording.duration",
    "spo.reports.wording.finite": "spo.wording.finite",
    "spo.reports.wording.label": "spo.metrics.catalogue.label",
    "spo.reports.wording.number": "spo.wording.number",
    "spo.reports.wording.shorten": "spo.wording.shorten",
    "spo.reports.wording.unit": "spo.metrics.catalogue.unit",
    "spo.reports.wording.verdict_word": "spo.wording.verdict_word",
    "spo.reports.wording.win_rate_in_words": "spo.wording.describe_win_rate",
    "spo.runtime.cache.cached": "spo.records.cache.cached",
    "spo.runtime.cache.digest": "spo.records.digests.digest",
    "spo.runtime.cache.path_digest": "spo.records.digests.path_digest",
    "spo.runtime.checks": "spo.config.checks",
    "spo.runtime.config": "spo.config.compose",
    "spo.runtime.errors": "spo.errors",
    "spo.runtime.evaluate": "spo.stages.evaluate",
    "spo.runtime.groups": "spo.config.groups",
    "spo.runtime.inspect": "spo.pages.rows",
    "spo.runtime.nodes": "spo.config.nodes",
    "spo.runtime.plan": "spo.config.plan",
    "spo.runtime.prepare": "spo.stages.prepare",
    "spo.runtime.reference_logps": "spo.stages.reference_logps",
    "spo.runtime.rundir.Status": "spo.runs.claim.Status",
    "spo.runtime.rundir.claim": "spo.runs.claim.claim",
    "spo.runtime.rundir.code_version": "spo.records.digests.code_version",
    "spo.runtime.rundir.command_line": "spo.secrets.command_line",
    "spo.runtime.rundir.differences": "spo.runs.identity.differences",
    "spo.runtime.rundir.finish": "spo.runs.claim.finish",
    "spo.runtime.rundir.flatten": "spo.records.files.flatten",
    "spo.runtime.rundir.git_state": "spo.runs.provenance.git_state",
    "spo.runtime.rundir.identity": "spo.runs.identity.identity",
    "spo.runtime.rundir.is_finished": "spo.runs.claim.is_finished",
    "spo.runtime.rundir.is_first_process": "spo.processes.is_first_process",
    "spo.runtime.rundir.is_locked": "spo.runs.claim.is_locked",
    "spo.runtime.rundir.load_config": "spo.runs.saved_config.load_config",
    "spo.runtime.rundir.read_failure": "spo.runs.claim.read_failure",
    "spo.runtime.rundir.read_json": "spo.records.files.read_json",
    "spo.runtime.rundir.resolved": "spo.runs.saved_config.resolved",
    "spo.runtime.rundir.resumed_config": "spo.runs.resume.resumed_config",
    "spo.runtime.rundir.sweep_dir": "spo.runs.processes.sweep_dir",
    "spo.runtime.rundir.write_failure": "spo.runs.claim.write_failure",
    "spo.runtime.rundir.write_json": "spo.records.files.write_json",
    "spo.runtime.rundir.write_provenance": "spo.runs.provenance.write_provenance",
    "spo.runtime.search.Objective": "spo.config.search_space.Objective",
    "spo.runtime.search.OptunaSweeper": "spo.runs.optuna_sweeper.OptunaSweeper",
    "spo.runtime.search.Space": "spo.config.search_space.Space",
    "spo.runtime.search.problems": "spo.config.search_space.problems",
    "spo.runtime.search.register": "spo.runs.optuna_sweeper.register",
    "spo.runtime.sweep.Entry": "spo.records.sweep.SweepJob",
    "spo.runtime.sweep.Ledger": "spo.runs.ledger.Ledger",
    "spo.runtime.sweep.show": "spo.pages.sweep_table.print_sweep",
    "spo.runtime.terminal": "spo.stages.quiet",
    "spo.runtime.train": "spo.stages.train",
    "spo.runtime.unread": "spo.config.coefficients",
    "spo.runtime.verify": "spo.stages.verify",
    "spo.speed": "spo.forward.speed",
    "spo.tracking.record": "spo.callbacks.history",
}


class OldNames:
    """Finder and loader that import a name of :data:`OLD_NAMES` as the object at its new path."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for an old name or a package above one, ``None`` for every other name."""
        if not name.startswith("spo.") or not any(f"{old}.".startswith(f"{name}.") for old in OLD_NAMES):
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Return ``None``: Python makes an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Make the empty module a package of old names, or replace it by the object at the new path."""
        name = module.__name__
        if name in OLD_NAMES:  # The import returns the entry of sys.modules, so both names are one object.
            sys.modules[name] = _resolve(name)
        else:
            module.__getattr__ = lambda attribute: _resolve(f"{name}.{attribute}")  # type: ignore[method-assign]


def _resolve(old: str) -> Any:
    if old not in OLD_NAMES:
        package, _, name = old.rpartition(".")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    from pkgutil import resolve_name

    words = f"{old} has moved to {OLD_NAMES[old]}; version 0.3 will drop the old name"
    warnings.warn(words, DeprecationWarning, stacklevel=3)
    return resolve_name(OLD_NAMES[old])


# Appended, so that it is asked only for names that no other finder knows.
sys.meta_path.append(OldNames())
