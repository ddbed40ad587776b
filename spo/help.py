"""Help of the command line: what each command does, its usage and examples, and the config groups.

It imports nothing slow, so that ``spo --help`` is printed at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from spo.config.groups import config_folders, group_members, methods_by_group


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: Line of the command in the list of commands.
        usage: How it is called.
        text: Help text of the command.
        examples: Command lines to copy.
        groups: Whether it takes config groups.
    """

    summary: str
    usage: str
    text: str
    examples: Sequence[str]
    groups: bool = False


def help_of(name: str | None, arguments: Sequence[str]) -> str:
    """Return the help of a command, ``None`` for that of all of them."""
    if name is None:
        width = max(map(len, COMMANDS))
        lines = [
            "usage: spo COMMAND ...",
            "",
            "Aligns language models to preferences, with SPO and other methods, on one footing.",
            "",
            "commands:",
            *(f"  {key:{width}}  {command.summary}" for key, command in COMMANDS.items()),
            "",
            *_groups_help(arguments),
            "examples:",
            *(f"  {command.examples[0]}" for command in COMMANDS.values()),
            "",
            "spo COMMAND --help explains each.",
        ]
        return "\n".join(lines)
    command = COMMANDS[name]
    lines = [f"usage: {command.usage}", "", textwrap.dedent(command.text).strip(), ""]
    if command.groups:
        lines += _groups_help(arguments)
    return "\n".join([*lines, "examples:", *(f"  {example}" for example in command.examples)])


def _groups_help(arguments: Sequence[str]) -> list[str]:
    folders = config_folders(option(arguments, "--config-dir", "-cd"))
    groups = group_members(folders)
    width = max(map(len, groups), default=0)
    lines = ["config groups, chosen as GROUP=MEMBER (debug: +debug=MEMBER); any key as GROUP.KEY=VALUE:"]
    for group, members in groups.items():
        parts = [", ".join(members)]
        if group == "method":
            parts = [f"{heading}: {', '.join(some)}" for heading, some in methods_by_group(folders).items()]
        for number, part in enumerate(parts):
            lines += textwrap.wrap(
                part,
                100,
                initial_indent=f"  {group if number == 0 else '':{width}}  ",
                subsequent_indent=" " * (width + (6 if group == "method" else 4)),
                break_on_hyphens=False,
            )
    return [*lines, ""]


def option(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of an option, ``None`` if it is not given."""
    for position, word in enumerate(arguments):
        if word in names:
            return arguments[position + 1] if position + 1 < len(arguments) else None
        if word.partition("=")[0] in names and "=" in word:
            return word.partition("=")[2]
    return None


COMMANDS = {
    "train": Command(
        "align a model and evaluate it",
        "spo train [GROUP=MEMBER] [KEY=VALUE] ... [-m] [--cfg job] [--config-dir DIR]\n"
        "       spo train --resume RUN_DIR [trainer.max_steps=N] [logger.KEY=VALUE] [strategy=MEMBER] ... "
        "[--allow NAME]",
        """
        Makes or loads the reference model, aligns it with a method, and evaluates the result on held-out prompts.
        The run directory gets the model, the metrics, the samples and report.html. Without arguments it uses a
        built-in model and data set, and runs on any computer without a network.

        -m, --multirun    one run for each combination of values: method=spo,dpo seed=1,2
        --cfg job         print the configuration instead of running it (--resolve fills in references)
        --config-dir DIR  a folder with your own members of the groups below
        --resume RUN_DIR  resume an interrupted run, or train for more steps; an unfinished run also takes another
                          judge=MEMBER or evaluation.KEY=VALUE
        --allow NAME      with --resume: let the directory use NAME, as in spo evaluate --help
        --hydra-help      Hydra's own flags, all of which work

        Plain numbers work for alpha and beta: alpha=0.5 is alpha=constant alpha.value=0.5.
        """,
        [
            "spo train",
            "spo train model=hf model.path=MODEL data=jsonl data.path=PAIRS.jsonl",
            "spo train method=dpo beta=0.1 seed=1",
            "spo train -m method=spo,dpo,ipo seed=1,2",
            "spo train --resume outputs/runs/RUN trainer.max_steps=300",
        ],
        groups=True,
    ),
    "iterate": Command(
        "train in rounds, each from the policy of the one before it",
        "spo iterate iteration=MEMBER [rounds=N] [GROUP=MEMBER] [KEY=VALUE] ... [-m] [--cfg job] [--config-dir DIR]",
        """
        Trains an iteration: each round samples completions of the policy, scores them with the judge, and trains on
        the pairs. Round 0 makes and evaluates the first model. The directory of the iteration gets a run directory for
        each round, iterate.json and report.html. Running the same command again resumes it.

        rounds=N          number of rounds, short for iteration.rounds=N
        -m, --multirun    one iteration for each combination of values: iteration=dpo,sppo seed=1,2
        --cfg job         print the configuration instead of running it
        --config-dir DIR  a folder with your own members of the groups below

        hydra.run.dir=DIR names the directory (hydra.sweep.dir=DIR with -m), and rerun=true starts again. All overrides
        of spo train work.
        """,
        [
            "spo iterate iteration=dpo",
            "spo iterate iteration=sppo rounds=2 model=hf model.path=MODEL data=jsonl data.path=PAIRS.jsonl",
            "spo iterate -m iteration=dpo,spo seed=1,2",
        ],
        groups=True,
    ),
    "evaluate": Command(
        "evaluate the policy of a run again",
        "spo evaluate RUN_DIR [KEY=VALUE] ... [--allow NAME] ... [--config-dir DIR]",
        """
        Samples answers to test prompts from policy and reference, and compares them, with other settings or data.

        A directory may come from somebody else. Of what it names, only the parts of spo and a few of torch,
        transformers, and lightning run. Code that you name yourself, in an override or in --config-dir, runs too.

        --allow NAME      let the directory use NAME: a _target_, a module with all its targets, or a path to write to
        --config-dir DIR  a folder with your own members of the config groups
        """,
        [
            "spo evaluate outputs/runs/RUN evaluation.num_prompts=512",
            "spo evaluate outputs/runs/RUN data=jsonl data.path=PAIRS.jsonl",
        ],
    ),
    "extrapolate": Command(
        "go beyond an aligned model, away from the model before alignment",
        "spo extrapolate SFT ALIGNED (--factor NUMBER | --search [--select KEY]) --out DIR [KEY=VALUE] ... "
        "[--allow NAME] ... [--config-dir DIR]",
        """
        Writes the weights ALIGNED + factor * (ALIGNED - SFT), without training, and evaluates them against SFT like a
        run: DIR is a run directory, and its policy/ a model folder. SFT and ALIGNED are run directories or model
        folders; the word reference, in place of SFT, is the reference of the run ALIGNED.

        Data, evaluation and judge are those of the run ALIGNED, and KEY=VALUE changes them as in spo evaluate --help.
        Between two model folders, KEY=VALUE chooses them as in spo train, and without any, only weights are written.

        --factor NUMBER   how far to go: 0 is ALIGNED itself, -1 is SFT, a number in between interpolates
        --search          find the factor with the best score on selection prompts
        --select KEY      the score of the search: val/win_rate by default, or else val/reward
        --out DIR         directory of the result
        --allow NAME      let the directory ALIGNED use NAME, as in spo evaluate --help
        --config-dir DIR  a folder with your own members of the config groups
        """,
        [
            "spo extrapolate reference outputs/runs/RUN --factor 0.5 --out outputs/runs/RUN-further",
            "spo extrapolate reference outputs/runs/RUN --search --out outputs/runs/RUN-searched",
            "spo extrapolate SFT_FOLDER ALIGNED_FOLDER --factor 0.3 --out extrapolated",
        ],
    ),
    "compare": Command(
        "compare the methods of a sweep",
        "spo compare SWEEP_OR_RUN ... [--by KEY[,KEY...]] [--out DIR] [--metric KEY] [--select KEY] [--baseline NAME] "
        "[--anyway]",
        """
        Reads run directories, finds the best setting of each method on the selection split, and compares those on the
        test split. Writes a table with intervals over seeds and prompts, the significant differences, and a page with
        figures. Refuses an unfair comparison: unequal numbers of settings, missing seeds, mixed data, unfinished runs.
        Warns of a best setting on the edge of what was tried. A method whose runs chose different members of a config
        group, such as two regularizers, is compared as one method for each.

        --by KEY[,KEY...]  what is compared, instead of methods: the values of config groups (method, regularizer,
                           reference, ...) or of keys (data.num_pairs, optimizer.lr, ...)
        --out DIR          folder of the results; by default comparison/ next to the runs
        --metric KEY       the key of metrics.json that ranks methods; by default eval/win_rate
        --select KEY       the key that selects settings; by default val/win_rate, or what the runs have instead
        --baseline NAME    compare each method with this one, instead of each with each; with --by, a group as the
                           table names it, such as "spo, local_kl"
        --anyway           compare although it is unfair, and mark this in every output
        """,
        [
            "spo compare outputs/sweeps/baselines",
            "spo compare outputs/sweeps/baselines --baseline dpo --out results",
            "spo compare outputs/sweeps/ablation --by method,regularizer",
        ],
    ),
    "sample": Command(
        "print completions of a prompt, from a run or a model folder",
        'spo sample RUN "PROMPT" [-n 4] [--seed 0] [--temperature T] [--top-p P] [--max-new-tokens N] [--json]\n'
        "       [--against reference|RUN|FOLDER] [--principle TEXT [--ratio 2] [--nucleus NAME]] [--best-of N]\n"
        "       [--plain] [KEY=VALUE] ... [--allow NAME] ... [--config-dir DIR]",
        """
        Samples completions from the policy of a run, or from the folder of a Hugging Face model. For a chat model, the
        prompt is a user's message. Completion i has the seed SEED + i, and does not depend on the others. The prompt is
        taken as it is typed; - reads it from the standard input.

        -n N               number of completions; 4 by default
        --seed SEED        seed of the first completion
        --temperature T    temperature; 0 takes the likeliest token, the default is that of the run's evaluation
        --top-p P          draw from the smallest set of likeliest tokens whose probability reaches P
        --max-new-tokens N limit of tokens in a completion; the default is that of the run's evaluation
        --json             print one array of {prompt, completion, tokens, seed}, and nothing else
        --against OTHER    sample from another model too: reference (that of the run), another run, or a model folder
        --principle TEXT   decode by Linear Alignment, which amplifies what the principle in the prompt changes
        --ratio K          strength of the principle: 2 by default, 0 for no more than its place in the prompt
        --nucleus NAME     logits that choose the set of --top-p: principled (default) or contrast
        --best-of N        draw N completions for each one that is printed, and keep the best by the judge of the run
        --plain            give the prompt as plain text, even to a chat model
        --allow NAME       let the directory use NAME, as in spo evaluate --help
        --config-dir DIR   a folder with your own members of the config groups

        KEY=VALUE works for a run as in spo evaluate --help, such as judge=MEMBER with --best-of, and for a model folder
        as in spo train --help.
        """,
        [
            'spo sample outputs/runs/RUN "Mia the fox lived by the sea."',
            'spo sample outputs/runs/RUN "Mia the fox lived by the sea." -n 2 --against reference --json',
        ],
    ),
    "chat": Command(
        "talk with a run or a model folder in the terminal",
        "spo chat RUN [--against reference|RUN|FOLDER] [--seed 0] [--temperature T] [--top-p P] [--max-new-tokens N]\n"
        "       [--plain] [KEY=VALUE] ... [--allow NAME] ... [--config-dir DIR]",
        """
        Answers each line that you type, token by token, until the input ends (Ctrl-D). With --against, another model
        answers after it. A chat model sees its own conversation so far; any other model sees the line alone. Blanks at
        the ends of a line are removed.

        /reset             start a new conversation
        /quit              end
        --against OTHER    let another model answer too: reference (that of the run), another run, or a model folder
        --seed SEED        seed of the first answer; answer t has the seed SEED + t

        The other options are those of spo sample.
        """,
        ["spo chat outputs/runs/RUN", "spo chat outputs/runs/RUN --against reference"],
    ),
    "report": Command(
        "write report.html of a run or an iteration again",
        "spo report RUN_DIR|ITERATION_DIR [--spec NAME|FILE]",
        """
        Writes the page from the files of the directory; the run or the iteration need not be finished.

        --spec NAME|FILE  the curves to draw for a run: a dashboard of conf/dashboard, or your own yaml file
        """,
        [
            "spo report outputs/runs/RUN",
            "spo report outputs/runs/RUN --spec my_dashboard.yaml",
            "spo report outputs/iterations/NAME",
        ],
    ),
    "dashboard": Command(
        "make a W&B workspace or report for the runs of a project",
        "spo dashboard ENTITY/PROJECT [RUN_DIR ...] [--report] [--method NAMES] [--group-by KEY] [--spec NAME|FILE]",
        """
        Saves a dashboard as a new view of a W&B project: a workspace, or a report to edit and share. It needs an API
        key and pip install 'spo[dashboards]'. spo report draws the same dashboard without W&B. What a given run logged
        beyond the dashboard, such as metrics of your own loss, gets panels too. Losses and implicit rewards of
        different methods are never on one axis: name one method for a workspace with them, or several for a report.

        --report          a report instead of a workspace
        --method NAMES    show the runs of these methods (W&B's job type), such as spo,dpo, and their losses
        --group-by KEY    one line, a mean with a band, for each value of a configuration key
        --spec NAME|FILE  a dashboard of conf/dashboard, or your own yaml file
        """,
        ["spo dashboard ENTITY/spo outputs/runs/RUN", "spo dashboard ENTITY/spo --report --group-by method.name"],
    ),
    "inspect": Command(
        "show the rows of a data set as tokens, masks and text",
        "spo inspect [data=MEMBER] [model=MEMBER] [KEY=VALUE] ... [--limit N] [--json FILE] [--config-dir DIR]",
        """
        Prints pairs exactly as the model sees them in training, and counts the used, dropped and truncated ones.

        --limit N         number of rows to print; 3 by default
        --json FILE       write a list of all rows of all splits to FILE: where, split, prompt_ids, chosen_ids,
                          rejected_ids, stop_ids, and the texts
        """,
        ["spo inspect data=jsonl data.path=PAIRS.jsonl model=hf model.path=MODEL"],
        groups=True,
    ),
    "methods": Command(
        "list the methods, or explain one of them",
        "spo methods [NAME] [--data KIND] [--no-reference] [--json FILE] [--config-dir DIR]",
        """
        Prints a table of the methods in groups: title, needs, kind of data, and how far each formula was checked. With
        a name it prints a page: what the method changes against DPO, when to use it, its formula, its keys with their
        defaults, its source, and what spo verify does with it.

        NAME              the method to explain, as in method=NAME
        --data KIND       list only methods that read this kind of data: pairs, unpaired (single completions with
                          labels) or ranked (lists)
        --no-reference    list only methods whose loss does not need a reference model; a regularizer may need one
        --json FILE       also write what is printed as JSON
        --config-dir DIR  a folder with your own methods (DIR/method/NAME.yaml), which are listed too
        """,
        ["spo methods", "spo methods dpo", "spo methods --data unpaired", "spo methods --no-reference"],
    ),
    "verify": Command(
        "train every method to the optimum its paper proves",
        "spo verify [METHOD ...] [--full] [--json FILE] [--config-dir DIR]",
        """
        Trains every method of the config group on a language small enough to enumerate, as a table of logits and as a
        transformer. Compares each policy with the optimum of its objective: in closed form if the method states one,
        solved numerically otherwise. Ends with status 1 if a policy misses its optimum.

        METHOD ...        only these methods; by default all of them
        --full            the whole grid of alpha and beta instead of two settings per method
        --json FILE       also write the rows of the table as JSON
        --config-dir DIR  a folder with your own methods (DIR/method/NAME.yaml), which are verified too
        """,
        ["spo verify", "spo verify --config-dir my_conf --json verified.json"],
    ),
    "clean": Command(
        "list and remove caches and what killed processes left",
        "spo clean [paths.outputs=DIR] [paths.cache=DIR] [--older-than DAYS] [--delete]",
        """
        Lists the entries of the cache by kind, with their size and last use, and temporary files whose process is
        dead. Removes nothing without --delete. Runs make the entries that they need again. Records of runs and the
        stored answers of judges, which may have cost money, are never removed.

        --delete           remove what is listed
        --older-than DAYS  only what was not used for so many days
        """,
        ["spo clean", "spo clean --older-than 30 --delete"],
    ),
}
