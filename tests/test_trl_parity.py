"""Our losses against those of TRL: its own trainers and collators, on the same tokens and the same weights."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from spo.data import FileSource, HHSource, Renderer, TokenizedPair
from spo.data.collate import collate
from spo.models import FrozenReference
from spo.resources import conf_dir
from spo.types import LabelledLogps
from tests.helpers import FAST, PLAIN, make_module, model_spec, random_pairs, tiny_llama, tiny_tokenizer

pytest.importorskip("trl", reason="trl is not installed")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SPO_DATA_DIR", ROOT / "../shared/data"))
NAMES = {"alpaca": "alpaca_eval_pairs.train.jsonl.gz", "hh": "hh_rlhf_harmless_base.part1.jsonl.gz"}
SPEEDS = {"packed": replace(FAST, max_logits=50_000), "padded": PLAIN}


@dataclass(frozen=True)
class Arm:
    """A loss of TRL, and the method that is the same.

    Attributes:
        trainer: Trainer of TRL.
        theirs: Attributes of the trainer that select the loss.
        method: Method of ours.
        ours: Options of its loss.
        beta: Beta of both.
        factor: Their loss over ours.
        max_tokens: Tokens to which completions are cut. TRL adds log-probs in float32, whose error on long completions
            is above the tolerance, and which some losses magnify.
    """

    trainer: str
    theirs: dict[str, Any]
    method: str
    ours: dict[str, Any] = field(default_factory=dict)
    beta: float = 0.1
    factor: float = 1.0
    max_tokens: int = 32

    @property
    def loss_types(self) -> list[str]:
        found = self.theirs.get("loss_types", self.theirs.get("loss_type", []))
        return [found] if isinstance(found, str) else found


def dpo(loss_type: str, method: str, ours: dict[str, Any] | None = None, **changes: Any) -> Arm:
    """Return an arm of DPOTrainer; ``changes`` are fields of the arm or else attributes of the trainer."""
    names = {"beta", "factor", "max_tokens"} & changes.keys()
    theirs = {"loss_types": [loss_type]} | {key: value for key, value in changes.items() if key not in names}
    return Arm("dpo", theirs, method, ours or {}, **{name: changes[name] for name in names})


TOKENS_OF_STEP = {"nll_mean": "batch"}  # TRL averages the likelihood over all tokens of a step.
MIXED = [("dpo", "DPOLoss", 0.8), ("nca", "NCALoss", 0.3)]
ARMS = {
    "sigmoid": dpo("sigmoid", "dpo"),
    "hinge": dpo("hinge", "hinge"),
    "ipo": dpo("ipo", "ipo"),
    "exo_pair": dpo("exo_pair", "exo", {"label_smoothing": 1e-3}, label_smoothing=1e-3),
    "nca_pair": dpo("nca_pair", "nca"),
    "robust": dpo("robust", "rdpo", {"label_smoothing": 0.1}, label_smoothing=0.1),
    # Theirs is the sum of the two completions of a pair, and ours the mean over completions.
    "bco_pair": dpo("bco_pair", "bco", {"shift": False}, factor=2.0),
    "sppo_hard": dpo("sppo_hard", "sppo", {"reduction": "sum"}),
    "aot": dpo("aot", "aot", {"label_smoothing": 0.1}, label_smoothing=0.1),
    "aot_unpaired": dpo("aot_unpaired", "aot_unpaired"),
    "apo_zero": dpo("apo_zero", "apo_zero"),
    "apo_down": dpo("apo_down", "apo_down"),
    "discopop": dpo("discopop", "discopop", {"temperature": 0.2}, max_tokens=8),
    # ORPO (almost) without its odds ratio is the likelihood alone.
    "sft": dpo("sft", "orpo", TOKENS_OF_STEP, beta=1e-12),
    "sigmoid_norm": dpo("sigmoid_norm", "dpo_length_normalized", beta=2.0),
    "forward_kl": dpo("sigmoid", "f_dpo", {"divergence": "forward_kl"}, f_divergence_type="forward_kl", max_tokens=8),
    "js": dpo("sigmoid", "f_dpo", {"divergence": "js"}, f_divergence_type="js_divergence"),
    "alpha": dpo(
        "sigmoid",
        "f_dpo",
        {"divergence": "alpha", "divergence_alpha": 0.7},
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7,
        max_tokens=8,
    ),
    "ld_alpha": dpo("sigmoid", "ld_dpo", {"tail_weight": 0.3}, ld_alpha=0.3),
    "use_weighting": dpo("sigmoid", "wpo", use_weighting=True),
    "sigmoid+sft": Arm(
        "dpo",
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "dpo_nll",
        {"nll_weight": 0.5, **TOKENS_OF_STEP},
    ),
    "sigmoid+nca_pair": Arm(
        "dpo",
        {"loss_types": ["sigmoid", "nca_pair"], "loss_weights": [weight for *_, weight in MIXED]},
        "mix",
        {
            "losses": {name: {"_target_": f"spo.losses.{loss}"} for name, loss, _ in MIXED},
            "weights": {name: weight for name, _, weight in MIXED},
        },
    ),
    "cpo": Arm("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.7}, "cpo", {"nll_weight": 0.7, **TOKENS_OF_STEP}),
    # The preference term of CPO is alpha times SPO with alpha = beta.
    "cpo_preference": Arm("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, "spo", beta=0.2, factor=0.2),
    "cpo_hinge": Arm("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}, "rso_hinge", beta=0.05),
    "simpo": Arm(
        "cpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
        "simpo",
        {"gamma_beta_ratio": 0.5},
        beta=2.0,
    ),
    "orpo": Arm("orpo", {}, "orpo", TOKENS_OF_STEP),
    "kto": Arm(
        "kto",
        {"loss_type": "kto", "calculate_KL": True, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        "kto",
        {"desirable_weight": 1.2, "undesirable_weight": 0.8},
    ),
    # Theirs is a mean over completions, and ours over pairs.
    "apo_zero_unpaired": Arm("kto", {"loss_type": "apo_zero_unpaired", "calculate_KL": False}, "apo_zero", factor=0.5),
    # The gold response of TPO is the chosen completion here.
    "tpo": Arm("tpo", {"loss_type": "sigmoid", "tpo_alpha": 0.7}, "cpo", {"nll_weight": 0.7, **TOKENS_OF_STEP}),
    "tpo_l": Arm(
        "tpo",
        {"loss_type": "tpo-l", "tpo_alpha": 0.0, "tpo_l_gamma": 1.0},
        "simpo",
        {"gamma_beta_ratio": 0.5},
        beta=2.0,
    ),
    "tpo_hinge": Arm("tpo", {"loss_type": "hinge", "tpo_alpha": 0.0}, "rso_hinge", beta=0.05),
}
WITHOUT_A_METHOD = {("cpo", "ipo"), ("tpo", "ipo")}
"""Losses of TRL that are not methods here: IPO without a reference."""
MADE_WITH: dict[str, dict[str, Any]] = {
    "dpo": {"use_weighting": True, "discopop_tau": 0.2},
    "cpo": {"loss_type": "simpo"},
}
"""Arguments with which a trainer reads and computes what every arm needs."""
BEGINNING = {"use_weighting": False, "loss_weights": [1.0]}
METRICS = {
    "sigmoid": ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies"),
    "ipo": ("logps/chosen", "logps/rejected"),  # TRL's rewards are sums for IPO too.
}


def trainer_class(name: str) -> tuple[type, type]:
    """Return a trainer of TRL and the class of its arguments."""
    import trl
    from trl.experimental import cpo, orpo, tpo

    return {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
        "tpo": (tpo.TPOTrainer, tpo.TPOConfig),
    }[name]


@dataclass
class Setup:
    """Rows, two models and the trainers of TRL, which the tests share because making them takes longest.

    Attributes:
        pairs: Rows.
        tokenizer: Tokenizer of the models.
        model: Policy of ours; TRL has a copy.
        reference: Reference of both.
        folder: Folder for the trainers.
    """

    pairs: list[TokenizedPair]
    tokenizer: Any
    model: nn.Module
    reference: nn.Module
    folder: Path
    trainers: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    """Trainers with the attributes that they begin with, by name."""

    @cached_property
    def pad(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def trainer(self, arm: Arm) -> Any:
        """Return a trainer as a user makes it, with the attributes of the arm; tests pass batches by hand."""
        if arm.trainer not in self.trainers:
            made = self.make_trainer(arm.trainer)
            self.trainers[arm.trainer] = (made, vars(made) | BEGINNING)
        trainer, attributes = self.trainers[arm.trainer]
        unknown = arm.theirs.keys() - attributes.keys()
        assert not unknown, f"{arm.trainer} does not read {unknown}"
        vars(trainer).update(attributes | arm.theirs | {"beta": arm.beta})
        return trainer

    def make_trainer(self, name: str) -> Any:
        from datasets import Dataset

        trainer, config = trainer_class(name)
        fixed: dict[str, Any] = {
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        fixed |= {"output_dir": str(self.folder), "disable_dropout": True, "max_length": 2048}
        options = config(**fixed, **MADE_WITH.get(name, {}))
        text = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "reference": ["d"]}
        rows = {
            "kto": {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]},
            "tpo": text,
        }.get(name, {key: text[key] for key in ("prompt", "chosen", "rejected")})
        given: dict[str, Any] = {"train_dataset": Dataset.from_dict(rows), "processing_class": self.tokenizer}
        if name in ("dpo", "kto"):
            given["ref_model"] = copy.deepcopy(self.reference)
        return trainer(copy.deepcopy(self.model), args=options, **given)

    def rows(self, arm: Arm) -> list[TokenizedPair]:
        """Return the pairs, cut as the arm needs them."""
        pairs = [
            replace(
                pair,
                chosen_ids=pair.chosen_ids[: arm.max_tokens],
                rejected_ids=(pair.rejected_ids or ())[: arm.max_tokens],
            )
            for pair in self.pairs
        ]
        if arm.trainer == "orpo":
            # TRL's likelihood counts the tokens of the prompt, all but the first, so it must be the only one.
            return [
                replace(
                    pair,
                    prompt_ids=pair.prompt_ids[:1],
                    chosen_ids=(*pair.prompt_ids[1:], *pair.chosen_ids),
                    rejected_ids=(*pair.prompt_ids[1:], *(pair.rejected_ids or ())),
                )
                for pair in pairs
            ]
        return pairs

    def ours(self, arm: Arm, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss and the metrics of our module, whose gradients are then in the policy."""
        loss = loss_of(arm.method, arm.ours)
        module = make_module(
            self.model,
            loss=loss,
            reference=FrozenReference(),
            reference_model=self.reference,
            alpha=arm.beta,
            beta=arm.beta,
            speed=SPEEDS[layout].resolve_for(self.model),
        )
        rows = self.rows(arm)
        if loss.inputs is LabelledLogps:
            rows = labelled(rows)
        self.model.zero_grad()
        scored = module.pairs.score(collate(rows, range(len(rows)), self.pad)).inputs_of(module.loss)
        losses, metrics = module.pairs.losses(scored, 0)
        losses.mean().backward()
        return losses.mean(), metrics

    def theirs(self, arm: Arm) -> tuple[Tensor, dict[str, float], nn.Module]:
        """Return the loss and the metrics of TRL, and its copy of the policy with the gradients."""
        trainer = self.trainer(arm)
        trainer.model.zero_grad()
        if arm.trainer in ("cpo", "orpo"):
            batch = trainer.data_collator([concatenated(row) for row in self.rows(arm)])
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        else:
            trainer._metrics["train"].clear()
            if hasattr(trainer.data_collator, "include_reference"):
                trainer.data_collator.include_reference = trainer.tpo_alpha != 0
            examples = {"kto": labelled_examples}.get(arm.trainer, paired_examples)(self.rows(arm))
            loss = trainer._compute_loss(trainer.model, trainer.data_collator(examples), return_outputs=False)
        loss.backward()
        logged = getattr(trainer, "_metrics", {"train": {}})["train"]
        return loss, {key: values[0] for key, values in logged.items()}, trainer.model


def loss_of(method: str, options: dict[str, Any]) -> Any:
    """Make the loss of a method as its yaml describes it, with options."""
    node = OmegaConf.load(conf_dir() / "method" / f"{method}.yaml").loss
    for key, value in options.items():
        assert key in node, f"{method} does not have the option {key}"
        node[key] = value
    return instantiate(node)


def labelled(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return both completions of each pair as rows of their own, each with a completion of another prompt."""
    both = [
        replace(pair, chosen_ids=ids, rejected_ids=None, rejected_text=None, label=label)
        for pair in pairs
        for ids, label in ((pair.chosen_ids, 1.0), (pair.rejected_ids or (), 0.0))
    ]
    return [replace(row, extra={"mismatched": both[(i + 2) % len(both)].chosen_ids}) for i, row in enumerate(both)]


def paired_examples(pairs: Sequence[TokenizedPair]) -> list[dict[str, Any]]:
    """Return rows for the collators of DPO and TPO."""
    return [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids or ()),
            "reference_ids": list(pair.chosen_ids),
        }
        for pair in pairs
    ]


def labelled_examples(pairs: Sequence[TokenizedPair]) -> list[dict[str, Any]]:
    """Return rows for the collator of KTO."""
    return [
        {
            "prompt_ids": list(row.prompt_ids),
            "completion_ids": list(row.chosen_ids),
            "KL_completion_ids": list(row.extra["mismatched"]),
            "label": bool(row.label),
        }
        for row in labelled(pairs)
    ]


def concatenated(pair: TokenizedPair) -> dict[str, Any]:
    """Return a row for the collator of CPO and ORPO."""
    row: dict[str, Any] = {}
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids or ())):
        row[f"{name}_input_ids"] = [*pair.prompt_ids, *ids]
        row[f"{name}_attention_mask"] = [1] * len(row[f"{name}_input_ids"])
        row[f"{name}_labels"] = [-100] * len(pair.prompt_ids) + list(ids)
    return row


def assert_parity(setup: Setup, name: str, layout: str) -> None:
    """Compare the loss, the metrics and the gradient of every parameter."""
    arm = ARMS[name]
    ours, metrics = setup.ours(arm, layout)
    theirs, logged, model = setup.theirs(arm)
    assert arm.factor * ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for key in METRICS.get(name, ()):
        assert metrics[key].mean().item() == pytest.approx(logged[key], rel=1e-5, abs=1e-4), key
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, p in setup.model.named_parameters():
        assert (p.grad is None) == (key not in wanted)
        if p.grad is not None:
            size = float(wanted[key].norm())
            assert size > 0 and float((arm.factor * p.grad - wanted[key]).norm()) < 1e-5 * size, key


def some_pairs(source: Any, tokenizer: Any, limit: int) -> list[TokenizedPair]:
    """Six pairs that fit, of different prompts and lengths, without soft labels, which TRL does not have."""
    renderer = Renderer(tokenizer, limit, "drop_pair")
    pairs: dict[str, TokenizedPair] = {}
    for row in source.rows(lambda prompts, n: []):
        rendered = renderer.render(row) if len(pairs) < 6 else None
        if isinstance(rendered, TokenizedPair):
            pairs[rendered.prompt_id] = replace(rendered, preference=None)
    assert len({len(pair.chosen_ids) for pair in pairs.values()}) > 4
    return list(pairs.values())


def moved(reference: nn.Module) -> nn.Module:
    """Return a policy away from the reference, where every margin would be 0.

    The models are in float64, in which our side is precise; TRL computes logits and what follows in float32.
    """
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Return a setup of random pairs and a tiny model."""
    reference = tiny_llama(0)
    pairs, folder = random_pairs(6, seed=1), tmp_path_factory.mktemp("generated")
    return Setup(pairs, tiny_tokenizer(), moved(reference).train(), reference, folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setup]:
    """Return a function from the name of a data set to a setup of its pairs and the stories260K model."""
    if not DATA.is_dir():
        pytest.skip("no SPO_DATA_DIR")
    spec, folder = model_spec(attn_implementation="sdpa"), DATA / "stories260K"
    tokenizer = spec.tokenizer(folder)
    reference = spec.start(folder).double()
    model = moved(reference).train().requires_grad_()
    made: dict[str, Setup] = {}

    def setup_of(kind: str) -> Setup:
        if kind not in made:
            source: Any = (
                HHSource(path=str(DATA / NAMES[kind]), on_bad_row="skip")
                if kind == "hh"
                else FileSource(path=str(DATA / NAMES[kind]), on_bad_row="skip", columns=None)
            )
            pairs, first = some_pairs(source, tokenizer, 256), next(iter(made.values()), None)
            made[kind] = Setup(pairs, tokenizer, model, reference, tmp_path_factory.mktemp(kind))
            if first is not None:  # The trainers do not depend on the pairs.
                made[kind].trainers = first.trainers
        return made[kind]

    return setup_of


def test_every_loss_of_trl_is_compared() -> None:
    """The losses are those that TRL's own code names, so that a new one fails here."""
    import trl
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.tpo import TPOTrainer

    methods: dict[str, Any] = {
        "dpo": trl.DPOTrainer._compute_loss,
        "kto": trl.KTOTrainer._compute_loss,
        "cpo": CPOTrainer.cpo_loss,
        "tpo": TPOTrainer._compute_loss,
    }
    named = {
        (trainer, found)
        for trainer, method in methods.items()
        for found in re.findall(r'loss_type == "([^"]+)"', inspect.getsource(method))
    }
    compared = {(arm.trainer, loss_type) for arm in ARMS.values() for loss_type in arm.loss_types}
    assert len(named) > 20 and named == compared | WITHOUT_A_METHOD and not compared & WITHOUT_A_METHOD


@pytest.mark.parametrize("layout", SPEEDS)
@pytest.mark.parametrize("name", ARMS)
def test_trl_parity_on_generated_pairs(name: str, layout: str, generated: Setup) -> None:
    assert_parity(generated, name, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [("alpaca", "packed"), ("hh", "padded")])
@pytest.mark.parametrize("name", ARMS)
def test_trl_parity_on_real_pairs(name: str, kind: str, layout: str, real: Callable[[str], Setup]) -> None:
    assert_parity(real(kind), name, layout)
