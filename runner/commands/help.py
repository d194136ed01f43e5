"""The help pages: options in groups with the defaults of each family, and commands that can be pasted."""

from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

from runner.commands.options import SAID
from runner.inputs import EXAMPLE
from stages.families import FAMILIES, Family

# Words of a run that a pasted plan may have, and that change nothing about where things go.
NOT_READ_BY_A_PLAN = frozenset((
    "seed", "out", "overwrite", "no_metadata", "stop_after", "from_stage", "artifacts", "step_every", "strict",
    "no_degrade", "engine", "ranks", "rank_timeout", "preview", "log", "sample_memory", "quiet",
))
# What a run that is resumed does not keep.
_ANEW = frozenset(("artifacts", "engine", "ranks", "rank_timeout"))
# What a family that has none of it does not show.
_OF_SOME: Mapping[str, Callable[[Family], bool]] = {
    "guidance": lambda family: family.guidance is not None, "negative_prompt": lambda family: family.negative,
}


class Command(TyperCommand):
    """A command whose help has each default beside its option, and --help in the group of what is said."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.describe()

    def describe(self) -> None:
        """Put into the help of each option what only this command knows of it, and its default."""
        for param in self.params:
            _say_default(param)

    def get_params(self, ctx: Any) -> Any:
        """The options, those without a value with no type."""
        return _without_types(super().get_params(ctx))

    def get_help_option(self, ctx: Any) -> Any:
        """The option, in its group."""
        option = super().get_help_option(ctx)
        if isinstance(option, TyperOption) and any(_panel(param) == SAID for param in self.params):
            option.rich_help_panel = SAID
        return option

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line, without dots that look as if something were cut."""
        return [piece.replace("...", "") for piece in super().collect_usage_pieces(ctx)]


class Group(TyperGroup):
    """A group of commands, shown in the same way."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **{**given, "subcommand_metavar": "COMMAND"})

    def get_params(self, ctx: Any) -> Any:
        """The options, those without a value with no type."""
        return _without_types(super().get_params(ctx))


class FamilyCommand(Command):
    """The command of a family: its help has the defaults of its model."""

    def describe(self) -> None:
        """As any command, with the family's own defaults."""
        family = FAMILIES[str(self.name)]
        for param in self.params:
            if isinstance(param, TyperOption):
                _describe(param, family)
        super().describe()


class ResumeCommand(Command):
    """The command `resume`: what is not said stays as it was."""

    def describe(self) -> None:
        """As any command, with the run from before for a default."""
        for param in self.params:
            if isinstance(param, TyperOption) and isinstance(param.show_default, str) and param.name not in _ANEW:
                param.show_default = "as it was"
        super().describe()


class PlanCommand(Command):
    """The command `plan`: it takes every word of a run, and shows those that it reads."""

    def describe(self) -> None:
        """As any command, without what a plan does not read."""
        for param in self.params:
            if isinstance(param, TyperOption) and param.name in NOT_READ_BY_A_PLAN:
                param.hidden = True
        super().describe()


def about(family: Family) -> str:
    """What a family's command does, in a line."""
    size = "{}x{}".format(*family.size)
    guidance = "no guidance" if family.guidance is None else f"guidance {family.guidance:g}"
    model = "the small model that comes with it" if family.repo == "demo" else family.repo
    return f"Make pictures with {model}: {size}, {family.steps} steps, {guidance}."


def examples(family: str) -> str:
    """Four commands of a family that can be pasted, for the foot of its help page."""
    run = f"python -m runner {family}"
    # The demo draws whole captions alone, which leave no room on a line.
    drawn = [("A picture, in a file that is named after it:", f"{run} \"{EXAMPLE}\""),
             ("Four pictures of each caption in a file:", f"{run} --prompt-file captions.txt -n 4 -o pictures/"),
             ] if family == "demo" else [
                 ("One picture, in a file of this name:", f"{run} \"a lighthouse in a storm\" -o picture.png"),
                 ("Four pictures, from seed 7 on, in a folder:", f"{run} \"a fox\" -s 7 -n 4 -o pictures/")]
    return _listed(
        *drawn, ("Whether it would fit on two cards of 16 GB:", f"python -m runner plan {family} --machine 2x16GB"),
        ("A picture that is there, with other steps:", f"{run} --like picture.png --steps 12 -o again.png"),
    )


def _listed(*pairs: tuple[str, str]) -> str:
    # A line of help is markup, in which a bracket begins a style; these have none.
    return "Examples\n\n" + "\n".join(f"{said}\n  {line}" for said, line in pairs)


def start() -> str:
    """Four commands to begin with."""
    return _listed(
        ("A picture, with the small model that comes along:", f"python -m runner demo \"{EXAMPLE}\""),
        ("Which models there are, and their licenses:", "python -m runner models"),
        ("Whether one would fit on two cards of 16 GB:", "python -m runner plan flux --machine 2x16GB"),
        ("The last run finished, after it was stopped:", "python -m runner resume last"),
    )


def planning() -> str:
    """Four plans."""
    plan = "python -m runner plan"
    return _listed(
        ("On this machine:", f"{plan} flux"),
        ("On two cards of 16 GB:", f"{plan} flux --machine 2x16GB"),
        ("With no more than this of each card:", f"{plan} qwen-image --max-memory 10GiB --allow-offload cpu"),
        ("For a program:", f"{plan} flux-schnell --size 768 --count 8 --json"),
    )


def batches() -> str:
    """Four batches."""
    batch = "python -m runner batch"
    return _listed(
        ("A picture of each line:", f"{batch} flux --prompt-file prompts.txt -o pictures/"),
        ("Three of each, from seed 1 on:", f"{batch} flux --prompt-file prompts.txt -n 3 -s 1 -o pictures/"),
        ("Named by their lines:", f"{batch} flux --prompt-file prompts.jsonl -o \"out/{{id}}.png\""),
        ("By two processes:", f"{batch} flux --prompt-file prompts.txt --ranks 2 -o pictures/"),
    )


def resuming() -> str:
    """Four ways to go on."""
    resume = "python -m runner resume"
    return _listed(
        ("After the last step that was kept:", f"{resume} last"),
        ("With less memory than it had:", f"{resume} last --max-memory 10GiB"),
        ("One picture at a time:", f"{resume} last --lanes 1"),
        ("Its pictures made of the latents once more:", f"{resume} last --from decode --overwrite"),
    )


def _describe(option: TyperOption, family: Family) -> None:
    defaults = {
        "model": family.repo, "size": "{}x{}".format(*family.size), "steps": str(family.steps),
        "guidance": None if family.guidance is None else f"{family.guidance:g}",
    }
    if (default := defaults.get(str(option.name))) is not None:
        option.show_default = default
    if (shown := _OF_SOME.get(str(option.name))) is not None and not shown(family):
        option.hidden = True


def _say_default(param: Any) -> None:
    """Put a default that is said in words behind the help, where it takes less room than in a column of its own."""
    if isinstance(param, TyperOption) and isinstance(param.show_default, str):
        param.help = f"{param.help} [dim]\\[default: {param.show_default}][/dim]"
        param.show_default = False


def _without_types(params: list[Any]) -> list[Any]:
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag and param.metavar is None:
            param.metavar = ""
    return params


def _panel(param: Any) -> str | None:
    return param.rich_help_panel if isinstance(param, TyperOption) else None
