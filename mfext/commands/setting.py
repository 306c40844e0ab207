"""What every command needs before it works: data, base model, machine, and a voice on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mfext.commands.models import OpenedModel
from mfext.config import Recipe
from mfext.domains.domain import Domain, check_no_overlap
from mfext.domains.embedded import EmbeddedSettings
from mfext.domains.packing import PackedDocuments, pack
from mfext.domains.sources import load_domain
from mfext.domains.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from mfext.errors import InputError, MachineError
from mfext.paths import cache_folder
from mfext.recipe import known_domains
from mfext.report.terminal import Console
from mfext.requests import Invocation

BYTES = "bytes"


@dataclass(frozen=True)
class DomainRecord:
    """A domain a model has learned, as its folder remembers it: name and how to find its text."""

    name: str
    reference: str

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "reference": self.reference}


def lineage_with(metadata: Mapping[str, object], entry: Mapping[str, object]) -> list[object]:
    """The lineage a stage's metadata hold, and one more stage with its number."""
    earlier = metadata.get("lineage")
    lineage = list(earlier) if isinstance(earlier, list) else []
    return [*lineage, {"stage": len(lineage), **entry}]


def records_of(metadata: Mapping[str, object]) -> tuple[DomainRecord, ...]:
    """The domains a model folder's metadata lists, in the order they were learned."""
    listed = metadata.get("domains", [])
    if not isinstance(listed, list):
        return ()
    return tuple(
        DomainRecord(str(each["name"]), str(each["reference"]))
        for each in listed
        if isinstance(each, dict) and {"name", "reference"} <= each.keys()
    )


def record_of(domain: Domain) -> DomainRecord:
    """How to find `domain` again from any directory."""
    path = Path(domain.source)
    is_folder = path.is_dir() and not domain.source.startswith("hf:") and domain.source not in known_domains()
    return DomainRecord(domain.name, str(path.resolve()) if is_folder else domain.source)


def load_domains(references: Iterable[str], console: Console) -> tuple[Domain, ...]:
    """The domains named, in order, notes said aloud. Raises InputError for two of one name."""
    known = {
        name: EmbeddedSettings.from_mapping(values, f"conf/domain/{name}.yaml")
        for name, values in known_domains().items()
    }
    domains: list[Domain] = []
    for reference in dict.fromkeys(references):
        reference = str(Path(reference).expanduser()) if reference.startswith("~") else reference
        domain = load_domain(reference, known=known, cache_folder=cache_folder() / "domains")
        if any(domain.name == other.name for other in domains):
            raise InputError(f"two domains are called '{domain.name}'", reference, "rename one folder")
        for note in domain.notes:
            console.say(f"{domain.name}: {note}")
        domains.append(domain)
    return tuple(domains)


def tokenizer_reference(reference: str) -> str:
    """How to find a tokenizer again from any directory."""
    return reference if reference == BYTES else str(Path(reference).expanduser().resolve())


def tokenizer_named(metadata: Mapping[str, object]) -> str:
    """The tokenizer a model folder records; bytes where it records none."""
    named = metadata.get("tokenizer")
    return named if isinstance(named, str) else BYTES


def tokenizer_of(opened: OpenedModel, asked: str | None) -> Tokenizer:
    """The tokenizer asked for, else the one beside the weights, else the one the folder names.

    Raises InputError where it cannot be the one the model was trained with.
    """
    beside = (opened.folder / "tokenizer.json").is_file()
    recorded = tokenizer_named(opened.metadata)
    reference = asked or (str(opened.folder) if beside else recorded)
    if "tokenizer" in opened.metadata and (recorded == BYTES) != (reference == BYTES):
        raise InputError(f"tokenizer '{reference}'", opened.folder, f"the model was trained with '{recorded}'")
    tokenizer, config = load_tokenizer(reference), opened.model.config
    check_tokenizer(tokenizer, config.vocab_size, config.bos_id)
    return tokenizer


def check_domains(domains: Iterable[Domain]) -> None:
    """Refuse overlap between what is trained on and what is measured."""
    check_no_overlap(tuple(domains))


def pack_train(domain: Domain, tokenizer: Tokenizer) -> PackedDocuments:
    """The domain's train split as an indexed packed token file, made once."""
    return pack(domain.train, tokenizer, cache_folder() / "tokens")


def prepare_machine(invocation: Invocation, recipe: Recipe | None = None) -> torch.device:
    """Set the thread count; the device to work on. Raises MachineError where there is no GPU but one is asked for."""
    threads = invocation.threads or (recipe.trainer.threads if recipe else None)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = invocation.device or (recipe.trainer.accelerator if recipe else "auto")
    if wanted == "gpu" and not torch.cuda.is_available():
        raise MachineError("no GPU", "device=gpu", "this torch sees none; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
