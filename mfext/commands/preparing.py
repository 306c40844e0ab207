"""What each method needs before a stage trains: its model, its stream of text, what it holds on to.

Everything is made from the committed stages, the domains and the seed, so a resumed stage is prepared alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mfext.commands.growing import Grown, Texts, grow_model, reservoir_of, restore_growth
from mfext.commands.models import open_model
from mfext.commands.scene import Lesson, Scene
from mfext.commands.setting import pack_train
from mfext.config import MethodName, Recipe
from mfext.domains.domain import Domain, reservoir
from mfext.domains.packing import pack
from mfext.domains.replay_stream import ReplayStream
from mfext.domains.stream import TokenStream
from mfext.errors import InputError
from mfext.growth.apply import apply_plan
from mfext.growth.growable import growable
from mfext.growth.plan import new_blocks, plan_expansion, plan_growth
from mfext.model.language_model import LanguageModel
from mfext.paths import cache_folder
from mfext.report.terminal import Console
from mfext.store import Run, Stage
from mfext.training.exchange import Stream
from mfext.training.methods.concentrate import Concentrate
from mfext.training.methods.ewc import Ewc, accumulate, fisher
from mfext.training.methods.expand import Expand
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext.training.methods.independent import Independent
from mfext.training.methods.joint import Joint
from mfext.training.methods.lora import Lora, add_adapters
from mfext.training.methods.lwf import Lwf
from mfext.training.methods.method import Method, starts_from_base
from mfext.training.methods.replay import Replay


@dataclass(frozen=True)
class Work:
    """What a stage is prepared from."""

    recipe: Recipe
    scene: Scene
    lesson: Lesson
    opened: Run
    console: Console

    def stage(self, index: int) -> Stage:
        """A committed stage of the run."""
        found = find_stage(self.opened, index)
        assert found is not None, f"stage {index} was committed before"
        return found

    @property
    def origin(self) -> Stage:
        """The stage this one starts from: the one before, or the base where the method never goes on."""
        from_base = starts_from_base(self.recipe.method)
        return self.stage(self.scene.start if from_base else self.lesson.stage - 1)


@dataclass(frozen=True)
class Prepared:
    """A stage ready to train. `kept` is old text to be stored with the stage, per domain."""

    model: LanguageModel
    method: Method
    stream: Stream
    grown: Grown = field(default_factory=lambda: Grown({}, {}))
    kept: Texts = field(default_factory=dict)


def find_stage(opened: Run, index: int) -> Stage | None:
    """The committed stage with this number."""
    return next((stage for stage in opened.stages() if stage.index == index), None)


def prepare(work: Work) -> Prepared:
    """The stage as its method wants it. Raises InputError where the method cannot work on this model."""
    return _PREPARE[work.recipe.method](work, open_model(work.origin.folder).model)


def text_of(work: Work, domains: Sequence[Domain]) -> TokenStream:
    """The stage's own order of some domains' train splits."""
    training = work.lesson.training
    return TokenStream(
        [pack_train(each, work.scene.tokenizer) for each in domains],
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=work.recipe.seed,
        stage=work.lesson.stage,
    )


def _full(work: Work, model: LanguageModel) -> Prepared:
    return Prepared(model, Full(), text_of(work, work.lesson.new))


def _independent(work: Work, model: LanguageModel) -> Prepared:
    return Prepared(model, Independent(), text_of(work, work.lesson.new))


def _joint(work: Work, model: LanguageModel) -> Prepared:
    return Prepared(model, Joint(), text_of(work, work.lesson.new))


def _grow(work: Work, plain: LanguageModel) -> Prepared:
    model = growable(plain)
    recipe, old = work.recipe, work.scene.known_before(work.lesson)
    stream, kept = text_of(work, work.lesson.new), reservoir_of(recipe, old)
    plan = plan_growth(model.config, recipe.growth, work.lesson.name)
    latest = work.opened.latest_progress(work.lesson.stage)
    if latest is None:
        grown = grow_model(model, plan, recipe, stream, kept, work.console)
    else:
        grown = restore_growth(model, plan, latest.tensors, latest.state)
    return Prepared(model, Grow(), stream, grown, kept)


def _replay(work: Work, model: LanguageModel) -> Prepared:
    settings, recipe, training = work.recipe.replay, work.recipe, work.lesson.training
    old = work.scene.known_before(work.lesson)
    if not old:
        raise InputError("method=replay has nothing to replay", "the base names no domain", "give old_domains=[...]")
    kept = {each.name: reservoir(each.train, settings.buffer_share, settings.buffer_bytes, recipe.seed) for each in old}
    buffer = TokenStream(
        [pack(texts, work.scene.tokenizer, cache_folder() / "tokens") for texts in kept.values()],
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=recipe.seed,
        stage=work.lesson.stage,
    )
    stream = ReplayStream(text_of(work, work.lesson.new), buffer, settings.rate)
    return Prepared(model, Replay(), stream, kept=kept)


def _ewc(work: Work, model: LanguageModel) -> Prepared:
    settings = work.recipe.ewc
    importance: Mapping[str, Tensor] | None = None
    for stage, domains in _history(work):
        earlier = open_model(work.stage(stage).folder).model
        earlier.requires_grad_(True)
        for number, domain in enumerate(domains):
            found = fisher(earlier, _windows(work, domain))
            importance = accumulate(importance, found, 1.0 if number else settings.decay)
    if importance is None:
        raise InputError("method=ewc has nothing to hold on to", "the base names no domain", "give old_domains=[...]")
    anchor = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Prepared(model, Ewc(anchor, importance, settings.strength), text_of(work, work.lesson.new))


def _history(work: Work) -> Iterator[tuple[int, tuple[Domain, ...]]]:
    """Every stage before this one, and what it learned."""
    yield work.scene.start, work.scene.known
    yield from ((lesson.stage, lesson.new) for lesson in work.scene.lessons if lesson.stage < work.lesson.stage)


def _windows(work: Work, domain: Domain) -> Iterator[Mapping[str, Tensor]]:
    """Single windows of a domain's train split."""
    stream = TokenStream(
        [pack_train(domain, work.scene.tokenizer)],
        sequence_length=work.lesson.training.sequence_length,
        batch_size=1,
        seed=work.recipe.seed,
        stage=work.lesson.stage,
    )
    return (stream.batch(step) for step in range(work.recipe.ewc.windows))


def _lwf(work: Work, model: LanguageModel) -> Prepared:
    teacher, settings = open_model(work.origin.folder).model, work.recipe.lwf
    method = Lwf(teacher, settings.strength, settings.temperature)
    return Prepared(model, method, text_of(work, work.lesson.new))


def _lora(work: Work, model: LanguageModel) -> Prepared:
    add_adapters(model, work.recipe.lora, work.recipe.seed + work.lesson.stage)
    return Prepared(model, Lora(), text_of(work, work.lesson.new))


def _expand(work: Work, plain: LanguageModel) -> Prepared:
    model = growable(plain)
    plan = plan_expansion(model.config, work.recipe.expand.blocks)
    apply_plan(model, plan)
    return Prepared(model, Expand(new_blocks(plan)), text_of(work, work.lesson.new))


def _concentrate(work: Work, model: LanguageModel) -> Prepared:
    return Prepared(model, Concentrate(work.recipe.concentrate), text_of(work, work.lesson.new))


_PREPARE: Mapping[MethodName, Callable[[Work, LanguageModel], Prepared]] = {
    "grow": _grow,
    "full": _full,
    "replay": _replay,
    "ewc": _ewc,
    "lwf": _lwf,
    "lora": _lora,
    "expand": _expand,
    "concentrate": _concentrate,
    "joint": _joint,
    "independent": _independent,
}
