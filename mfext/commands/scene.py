"""The data of one run of `grow` or `continual`: what the base knows, what each stage learns, what is only watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mfext.commands.models import OpenedModel
from mfext.commands.setting import check_domains, load_domains, records_of, tokenizer_of
from mfext.config import Recipe, TrainingConfig
from mfext.domains.domain import Domain
from mfext.domains.tokenizer import Tokenizer
from mfext.errors import InputError
from mfext.report.terminal import Console


@dataclass(frozen=True)
class Lesson:
    """One stage after the base: its number, its name (also its generation's), what it learns, with what budget."""

    stage: int
    name: str
    new: tuple[Domain, ...]
    training: TrainingConfig


@dataclass(frozen=True)
class Scene:
    """`start` is the base's stage: 0, or 1 where row 0 is the random weights that the first domain pretrained."""

    tokenizer: Tokenizer
    start: int
    known: tuple[Domain, ...]
    lessons: tuple[Lesson, ...]
    bystanders: tuple[Domain, ...]

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The columns of the matrix: the base's domains, then the learned ones in order, then the bystanders."""
        learned = [domain for lesson in self.lessons for domain in lesson.new]
        every = {domain.name: domain for domain in (*self.known, *learned, *self.bystanders)}
        return tuple(every.values())

    def known_before(self, lesson: Lesson) -> tuple[Domain, ...]:
        """What was learned before a stage, the base's domains first, each once."""
        earlier = [domain for other in self.lessons if other.stage < lesson.stage for domain in other.new]
        return tuple({domain.name: domain for domain in (*self.known, *earlier)}.values())


def set_scene(recipe: Recipe, base: OpenedModel, stream: Sequence[Domain], start: int, console: Console) -> Scene:
    """Load and check everything a run reads. Raises InputError where splits overlap or names clash."""
    references = recipe.old_domains or tuple(record.reference for record in records_of(base.metadata))
    if not references:
        console.warn(
            "the base's folder names no domains: forgetting is measured only on those given with old_domains=[...]"
        )
    known = load_domains(references, console)
    bystanders = load_domains([each for each in recipe.bystanders if each not in references], console)
    taken = {each.name for each in (*stream, *known)}
    scene = Scene(
        tokenizer_of(base, recipe.tokenizer),
        start,
        known,
        lessons_of(recipe, known, stream, start, [each.name for each in base.model.config.generations]),
        tuple(each for each in bystanders if each.name not in taken),
    )
    check_domains(scene.domains)
    return scene


def lessons_of(
    recipe: Recipe, known: Sequence[Domain], stream: Sequence[Domain], start: int, taken: Sequence[str]
) -> tuple[Lesson, ...]:
    """The stages after the base; `taken` are the generations it has.

    `joint` learns everything at once, the base's domains too, in one stage with the whole stream's budget of tokens.
    """
    if recipe.method == "joint":
        together = tuple({domain.name: domain for domain in (*known, *stream)}.values())
        budget = replace(recipe.training, tokens=recipe.training.tokens * len(stream))
        return (Lesson(start + 1, "joint", together, budget),)
    names = lesson_names([domain.name for domain in stream], taken)
    return tuple(
        Lesson(stage, name, (domain,), recipe.training)
        for stage, (name, domain) in enumerate(zip(names, stream, strict=True), start + 1)
    )


def lesson_names(domains: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """A name for each stage: its domain's, or NAME-2, NAME-3, ... where that one is taken."""
    counts, names = Counter(taken), []
    for domain in domains:
        counts[domain] += 1
        names.append(domain if counts[domain] == 1 else f"{domain}-{counts[domain]}")
    return tuple(names)


def refuse_known(new: Domain, base: OpenedModel) -> None:
    """InputError where the base has learned `new` already."""
    if new.name in {record.name for record in records_of(base.metadata)}:
        raise InputError(f"the base already knows '{new.name}'", "domain", "choose a domain it has not learned")
