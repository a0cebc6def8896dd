"""The thousand names of ImageNet, and what else they are called: `words.json`, made from WordNet.

`python -m defense.embedded.photo.names` remakes the file. It takes timm and Debian's `wordnet-base`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

WORDNET = Path("/usr/share/wordnet/data.noun")
MAX_MEMBERS = 400
"""A hypernym of more classes than this says nothing about a picture ("entity", "whole")."""
_WRITABLE = re.compile("[a-z]{2,12}")


_OTHER_SENSES = frozenset({"jacket", "key"})
"""Words whose classes are not what data sets mean by them: a book's jacket, a key of a keyboard."""


@dataclass(frozen=True)
class Words:
    """What the classes are called.

    Attributes:
        wnids: WordNet id of each class, in the order of ImageNet's classifiers.
        names: One name for each class, all different.
        members: For every word, names included, the indices of the classes that it stands for, in order.
    """

    wnids: tuple[str, ...]
    names: tuple[str, ...]
    members: dict[str, tuple[int, ...]]

    @cached_property
    def writable(self) -> tuple[str, ...]:
        """Return the words that are written on pictures: a single short one of letters a-z, in order."""
        return tuple(sorted(word for word in self.members if _WRITABLE.fullmatch(word)))

    @cached_property
    def attacks(self) -> tuple[int, ...]:
        """Return the classes whose name is one short word, which stands for no other class."""
        return tuple(
            index
            for index, name in enumerate(self.names)
            if re.fullmatch("[a-z]{3,10}", name.lower()) and self.members[name.lower()] == (index,)
        )

    @cached_property
    def attack_words(self) -> tuple[int, ...]:
        """Where the names of `attacks` stand in `writable`."""
        place = {word: index for index, word in enumerate(self.writable)}
        return tuple(place[self.names[index].lower()] for index in self.attacks)

    def known_as(self, label: str) -> str | None:
        """Return the word of `members` that a data set's label is, in another spelling or the plural; None for none."""
        spaced = re.sub("(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").strip().lower()
        tried = (spaced, spaced.replace(" ", ""), spaced.removesuffix("s"))
        return next((word for word in tried if word in self.members and word not in _OTHER_SENSES), None)


@cache
def load_words() -> Words:
    """Return what `words.json` holds."""
    data = json.loads(resources.files(__package__).joinpath("words.json").read_text(encoding="utf-8"))
    members = {word: tuple(classes) for word, classes in data["members"].items()}
    return Words(tuple(data["wnids"]), tuple(data["names"]), members)


# --- making it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Synset:
    lemmas: tuple[str, ...]
    hypernyms: tuple[str, ...]


def _read_synsets(path: Path) -> dict[str, _Synset]:
    """Return WordNet's nouns by id; see wndb(5WN) for the format."""
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the license
        fields = line.split(" | ")[0].split(" ")
        n_lemmas = int(fields[3], 16)
        lemmas = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(n_lemmas))
        pointers = fields[5 + 2 * n_lemmas :]
        n_pointers = int(fields[4 + 2 * n_lemmas])
        above = tuple(pointers[4 * i + 1] for i in range(n_pointers) if pointers[4 * i] in ("@", "@i"))
        synsets[fields[0]] = _Synset(lemmas, above)
    return synsets


def _above(synsets: dict[str, _Synset], key: str) -> Iterator[str]:
    """Yield a synset and everything above it."""
    yield key
    for hypernym in synsets[key].hypernyms:
        yield from _above(synsets, hypernym)


def make_words(wnids: tuple[str, ...], synsets: dict[str, _Synset]) -> Words:
    """Return the words of classes.

    A word that names a class directly stands for the classes that it names, else for all below what it names.
    """
    direct: dict[str, list[int]] = defaultdict(list)
    below: dict[str, set[int]] = defaultdict(set)
    for index, wnid in enumerate(wnids):
        for key in set(_above(synsets, wnid[1:])):
            for lemma in synsets[key].lemmas:
                below[lemma.lower()].add(index)
        for lemma in synsets[wnid[1:]].lemmas:
            direct[lemma.lower()].append(index)
    members = {word: tuple(sorted(classes)) for word, classes in below.items() if len(classes) <= MAX_MEMBERS}
    members |= {word: tuple(sorted(set(classes))) for word, classes in direct.items()}
    names: list[str] = []
    for wnid in wnids:
        lemmas = synsets[wnid[1:]].lemmas
        unique = [lemma for lemma in lemmas if len(direct[lemma.lower()]) == 1]
        names.append(next((lemma for lemma in (*unique, *lemmas) if lemma not in names), _longer_name(synsets, wnid)))
        members.setdefault(names[-1].lower(), (len(names) - 1,))
    return Words(wnids, tuple(names), dict(sorted(members.items())))


def _longer_name(synsets: dict[str, _Synset], wnid: str) -> str:
    """Return a class's first lemma with what is above it: there are two cranes."""
    synset = synsets[wnid[1:]]
    return f"{synset.lemmas[0]} {synsets[synset.hypernyms[0]].lemmas[0]}"


def main() -> None:
    """Write `words.json` beside this file."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()  # timm leaves its methods without types
    words = make_words(tuple(info.label_names()), _read_synsets(WORDNET))
    data = {"wnids": words.wnids, "names": words.names, "members": words.members}
    Path(__file__).with_name("words.json").write_text(json.dumps(data, separators=(",", ":"), ensure_ascii=False))
    sys.stdout.write(f"{len(words.members)} words, {len(words.writable)} of them written\n")


if __name__ == "__main__":
    main()
