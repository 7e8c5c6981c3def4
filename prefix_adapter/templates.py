"""Templates: a row of named texts becomes one text with an answer to fill in and with virtual tokens.

    {premise} Question: {hypothesis:strip}? {p:3} Answer: {mask}.

| in a template | meaning |
|---|---|
| `{premise}` | the text of the field `premise` |
| `{mask}` | the place of the answer, at most one |
| `{p}`, `{p:3}` | one virtual token, three virtual tokens; each has its own vector |
| `{p:a}` | the virtual token `a`; it has the same vector wherever it stands |
| `{p:"It was"}` | trainable words: a virtual token for each of their tokens, which starts from its embedding |
| `{sep}` | what the tokenizer puts between two texts, at most one |
| `{{`, `}}` | a brace |

A field can have options, `{premise:strip,whole}`: `strip` leaves out punctuation and spaces at its end, `whole` never
cuts it, `cut_start` cuts it at its start and not at its end.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from .messages import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedTemplate", "Template", "TemplateEncoder", "TemplateError"]

_MASK, _SEP, _VIRTUAL = "mask", "sep", "p"
_OPTIONS = ("strip", "whole", "cut_start")
_MAX_COUNT = 1000


class TemplateError(ValueError):
    """A template is invalid, or does not fit a tokenizer or a row. The message names the place."""


@dataclass(frozen=True)
class Text:
    """Words of the template itself."""

    text: str


@dataclass(frozen=True)
class Field:
    """A text of the row; `options` are some of `strip`, `whole` and `cut_start`."""

    name: str
    options: frozenset[str] = frozenset()

    def value(self, row: Mapping[str, object]) -> str:
        """The text of the field in a row.

        Raises:
            TemplateError: If the row has no such field, or if it is not a text.
        """
        if self.name not in row:
            raise TemplateError(f"there is no field {self.name!r} in the row; it has {sorted(map(str, row))}.")
        text = row[self.name]
        if not isinstance(text, str):
            raise TemplateError(f"the field {self.name!r} must be a text, got {shorten(text)}.")
        return _strip_end(text) if "strip" in self.options else text


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token with the vector number `index`."""

    index: int


@dataclass(frozen=True)
class TrainableWords:
    """Virtual tokens that start from the tokens of `words`. Their number depends on the tokenizer."""

    words: str


@dataclass(frozen=True)
class Mask:
    """The place of the answer."""


@dataclass(frozen=True)
class Separator:
    """The tokens that the tokenizer puts between two texts."""


Piece = Text | Field | VirtualToken | TrainableWords | Mask | Separator


class Template:
    """A parsed template.

    Args:
        text: The template.

    Attributes:
        text: The template as it was given.
        pieces: Its parts in order.
        fields: The names of its fields, each once, in order.
        num_virtual_tokens: The number of different vectors of its virtual tokens, without those of trainable words.
        whole_fields: The names of the fields that are never cut.
        has_mask: Whether it has a place for an answer.

    Raises:
        TemplateError: If the template is invalid. The message names the character, counted from 1.

    Example:
        >>> template = Template("{text} {p:2} It was {mask}.")
        >>> template.fields, template.num_virtual_tokens, template.has_mask
        (('text',), 2, True)
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise TemplateError(f"a template must be a text that is not empty, got {shorten(text)}.")
        self.text = text
        self.pieces: tuple[Piece, ...] = tuple(_parse(text))
        virtual = [piece.index for piece in self.pieces if isinstance(piece, VirtualToken)]
        self.num_virtual_tokens = max(virtual, default=-1) + 1
        fields = [piece for piece in self.pieces if isinstance(piece, Field)]
        self.fields = tuple(dict.fromkeys(field.name for field in fields))
        self.whole_fields = tuple(dict.fromkeys(field.name for field in fields if "whole" in field.options))
        self.has_mask = Mask() in self.pieces

    def start_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
        """The token ids from whose embeddings the virtual tokens start; their order is that of the vectors.

        Args:
            tokenizer: A fast tokenizer, which divides trainable words into tokens.

        Returns:
            For each vector a token id, or `None` for a random start.

        Raises:
            TemplateError: If the tokenizer does not know a trainable word.

        Example:
            >>> Template('{text} {p:2} {p:"It was"} {mask}.').start_token_ids(tokenizer)  # GPT-2's
            [None, None, 632, 373]
        """
        return _number_vectors(self.pieces, tokenizer)[1]

    def __repr__(self) -> str:
        return f"Template({self.text!r})"


def _parse(text: str) -> Iterator[Piece]:
    words, names, count, seen = "", dict[str, int](), 0, set[str]()
    for kind, part, place in _split(text):
        if kind == "text":
            words += part
            continue
        if words:
            yield Text(words)
            words = ""
        name, _, options = (each.strip() for each in part.partition(":"))
        if name in (_MASK, _SEP):
            if options:
                _fail(place, f"`{{{name}}}` has no options, got {options!r}")
            if name in seen:
                _fail(place, f"there is a second `{{{name}}}`; a template can have one")
            seen.add(name)
            yield Mask() if name == _MASK else Separator()
        elif name != _VIRTUAL:
            yield _field(name, options, place)
        elif options.startswith('"'):
            trainable = options[1:-1].strip()
            if len(options) < 2 or options[-1] != '"' or not trainable:
                _fail(place, f'`{{p:"..."}}` must have words between two quotation marks, got {shorten(options, 40)}')
            yield TrainableWords(trainable)
        elif options and options[0].isalpha():
            if not options.isidentifier():
                _fail(place, f"the name of a virtual token must have letters, digits and _ only, got {options!r}")
            if options not in names:
                names[options], count = count, count + 1
            yield VirtualToken(names[options])
        else:
            for _ in range(_count(options, place)):
                yield VirtualToken(count)
                count += 1
        if count > _MAX_COUNT:
            _fail(place, f"there are more than {_MAX_COUNT} virtual tokens")
    if words:
        yield Text(words)


def _split(text: str) -> Iterator[tuple[str, str, int]]:
    """The words and the contents of the braces of a template, each with its kind and the place where it starts."""
    place = 0
    while place < len(text):
        char = text[place]
        if char in "{}" and text[place : place + 2] == 2 * char:
            yield "text", char, place
            place += 2
        elif char == "}":
            _fail(place, "`}` closes nothing; write `}}` for a brace in the text")
        elif char == "{":
            end = min((at for at in (text.find(brace, place + 1) for brace in "{}") if at >= 0), default=-1)
            if end < 0 or text[end] == "{":
                _fail(place, "`{` is not closed; write `{{` for a brace in the text")
            yield "braces", text[place + 1 : end], place
            place = end + 1
        else:
            yield "text", char, place
            place += 1


def _field(name: str, options: str, place: int) -> Field:
    if not name:
        _fail(place, "there is no name between the braces")
    found = [each.strip() for each in options.split(",")] if options else []
    for each in found:
        if each not in _OPTIONS:
            _fail(place, f"the field {name!r} has no option {each!r}; there are {', '.join(_OPTIONS)}")
    if "whole" in found and "cut_start" in found:
        _fail(place, f"the field {name!r} has the options `whole` and `cut_start`, which contradict each other")
    return Field(name, frozenset(found))


def _count(text: str, place: int) -> int:
    if not text:
        return 1
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MAX_COUNT):
        _fail(
            place,
            f"`{{p:...}}` must have a number from 1 to {_MAX_COUNT}, a name, or words in quotation marks, got "
            f"{shorten(text, 40)!r}",
        )
    return int(text)


def _fail(place: int, problem: str) -> NoReturn:
    raise TemplateError(f"character {place + 1} of the template: {problem}.")


def _strip_end(text: str) -> str:
    end = len(text)
    while end and (text[end - 1].isspace() or unicodedata.category(text[end - 1]).startswith("P")):
        end -= 1
    return text[:end]


@dataclass(frozen=True)
class EncodedTemplate:
    """The tokens of a template with a row.

    Attributes:
        input_ids: The token ids, with the special tokens of the tokenizer.
        token_type_ids: The segment of each token, as the tokenizer numbers them.
        answer: The places of the answer's tokens in `input_ids`; empty without an answer.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    answer: range


@dataclass(frozen=True)
class _Run:
    """Words and fields between two other pieces.

    Attributes:
        parts: The words and fields.
        left: The kind of piece before them, if text precedes them.
        right: The kind of piece after them, if they do not end a text.
    """

    parts: tuple[Text | Field, ...]
    left: type | None
    right: type | None


class TemplateEncoder:
    """Encodes rows by a template.

    The tokens are those of the whole text with the row's texts in it: the spaces in the template join the words,
    whatever the tokenizer does with spaces. An answer or a virtual token counts as a word, with the spaces before it.
    No token spans an answer and the text beside it, so the text has the same tokens around each answer.

    A text that is too long loses tokens of its fields, one after the other from the field that is longest. The
    template's own words, the answer and the virtual tokens are never cut.

    Args:
        template: The template.
        tokenizer: A fast tokenizer.
        max_length: The maximum number of tokens; by default there is none.
        placeholder_token_ids: The token id of each virtual token. It may be outside of the vocabulary. There are as
            many as `Template.start_token_ids` returns.
        add_end: Whether the tokens are added that the tokenizer puts at the end of a text. A decoder that continues
            the text needs them left out.

    Raises:
        TemplateError: If there are too few placeholder ids, if the tokenizer is not a fast one or has no separator, or
            if the template alone is longer than `max_length`.

    Example:
        >>> encoder = TemplateEncoder(Template("{text} It was {mask}."), tokenizer, max_length=128)
        >>> encoder.encode({"text": "a fine film"})[0].input_ids
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        placeholder_token_ids: Sequence[int] = (),
        add_end: bool = True,
    ) -> None:
        if not tokenizer.is_fast:
            raise TemplateError(f"{type(tokenizer).__name__} is not a fast tokenizer, which a template needs.")
        self._vectors, starts = _number_vectors(template.pieces, tokenizer)
        if len(placeholder_token_ids) < len(starts):
            raise TemplateError(
                f"the template has {len(starts)} virtual tokens, and there are {len(placeholder_token_ids)} "
                "`placeholder_token_ids`."
            )
        self.template, self.tokenizer, self.max_length = template, tokenizer, max_length
        self.placeholder_token_ids = list(placeholder_token_ids)
        self._start, self._middle, self._end, self._types = _special_tokens(tokenizer)
        if not add_end:
            self._end = []
        if Separator() in template.pieces and self._middle in ([], [tokenizer.bos_token_id]):
            raise TemplateError("the tokenizer puts nothing between two texts, so the template cannot have `{sep}`.")
        self._items = list(_join_runs(template.pieces))
        self.check_room([[0]])

    def check_room(self, answers: Sequence[Sequence[int]]) -> None:
        """Check that the template with the longest of some answers, and nothing in its fields, is not too long.

        Args:
            answers: The token ids of the answers.

        Raises:
            TemplateError: If it is too long.
        """
        ids, _, _, place = self._tokens(dict.fromkeys(self.template.fields, ""))
        length = len(ids) + (0 if place is None else max(map(len, answers), default=0))
        if self.max_length is not None and length > self.max_length:
            raise TemplateError(
                f"the template has {length} tokens without the texts of a row, more than the maximum of "
                f"{self.max_length}."
            )

    def word_ids(self, word: str) -> list[int]:
        """The tokens of a word or words at the place of `{mask}`, with the space that the template has before it.

        Args:
            word: The text of the answer.

        Returns:
            The token ids, without special tokens.

        Raises:
            TemplateError: If the template has no `{mask}`, or if the word has no tokens or unknown ones.
        """
        if not self.template.has_mask:
            raise TemplateError("the template has no `{mask}`.")
        return _word_ids(self.tokenizer, self.template.pieces[: self.template.pieces.index(Mask())], word)

    def encode(
        self, row: Mapping[str, object], answers: Sequence[Sequence[int]] | None = None
    ) -> list[EncodedTemplate]:
        """Encode a row.

        Args:
            row: The text of each field.
            answers: The token ids to put in the place of `{mask}`, of several answers. All results have the same text
                around them, cut for the longest answer. By default one mask token of the tokenizer.

        Returns:
            The tokens with each answer.

        Raises:
            TemplateError: If a field is missing or not a text, if the fields that are never cut are too long, or if
                the tokenizer has no mask token and no `answers` are given.
        """
        if answers is None:
            mask = self.tokenizer.mask_token_id
            if self.template.has_mask and mask is None:
                raise TemplateError("the tokenizer has no mask token: give the `answers`.")
            answers = [[mask]] if self.template.has_mask else [[]]
        ids, owners, types, place = self._tokens(row)
        longest = max(map(len, answers), default=0) if self.template.has_mask else 0
        kept = self._keep(owners, len(ids) + longest)
        before = [i for i in kept if place is not None and i < place]
        after = kept[len(before) :]
        results = []
        for answer in answers:
            own = list(answer) if place is not None else []
            kind = types[before[-1]] if before else self._types[0]
            results.append(
                EncodedTemplate(
                    [ids[i] for i in before] + own + [ids[i] for i in after],
                    [types[i] for i in before] + [kind] * len(own) + [types[i] for i in after],
                    range(len(before), len(before) + len(own)),
                )
            )
        return results

    def _tokens(self, row: Mapping[str, object]) -> tuple[list[int], list[int], list[int], int | None]:
        """The tokens of a row without its answer.

        Returns:
            The token ids; for each token the number of the field that it belongs to, -1 for the template's own; its
            segment; and the place of the answer, `None` without one.
        """
        first, second = self._types
        ids, owners, segment, place = list(self._start), [-1] * len(self._start), first, None
        types, fields, vectors = [first] * len(self._start), 0, iter(self._vectors)
        for item in self._items:
            if isinstance(item, _Run):
                text, owner = "", list[int]()
                for part in item.parts:
                    value = part.text if isinstance(part, Text) else part.value(row)
                    owner += [fields if isinstance(part, Field) else -1] * len(value)
                    fields += isinstance(part, Field)
                    text += value
                left, right = _stand_ins(item.left, text[:1]), _stand_ins(item.right, text[-1:])
                parts = _tokenize(self.tokenizer, text, left, right)
                found = [(token, _owner(text, owner, start, end)) for token, start, end in parts]
            elif isinstance(item, VirtualToken | TrainableWords):
                found = [(self.placeholder_token_ids[number], -1) for number in next(vectors)]
            elif isinstance(item, Separator):
                found = [(token, -1) for token in self._middle]
            else:
                place, found = len(ids), []
            ids += [token for token, _ in found]
            owners += [number for _, number in found]
            types += [segment] * len(found)
            if isinstance(item, Separator):
                segment = second
        ids, owners = ids + self._end, owners + [-1] * len(self._end)
        return ids, owners, types + [segment] * len(self._end), place

    def _keep(self, owners: list[int], length: int) -> list[int]:
        """The places of the tokens that stay, so that `length` becomes `max_length`."""
        if self.max_length is None or length <= self.max_length:
            return list(range(len(owners)))
        fields = [piece for piece in self.template.pieces if isinstance(piece, Field)]
        sizes = {
            number: count
            for number, field in enumerate(fields)
            if "whole" not in field.options and (count := owners.count(number))
        }
        rest = dict(sizes)
        for _ in range(length - self.max_length):
            longest = max(rest, key=rest.__getitem__, default=None)
            if longest is None or not rest[longest]:
                raise TemplateError(
                    f"the text of the row has {length} tokens, more than the maximum of {self.max_length}, and too "
                    "few of them may be cut."
                )
            rest[longest] -= 1
        kept, seen = [], dict.fromkeys(sizes, 0)
        for place, number in enumerate(owners):
            if number in sizes:
                seen[number] += 1
                lost = sizes[number] - rest[number]
                from_start = "cut_start" in fields[number].options
                if seen[number] <= lost if from_start else seen[number] > rest[number]:
                    continue
            kept.append(place)
        return kept


def _word_ids(tokenizer: PreTrainedTokenizerBase, before: Sequence[Piece], word: str) -> list[int]:
    """The tokens of a word or words behind some pieces, with the spaces between.

    Raises:
        TemplateError: If the word has no tokens or unknown ones.
    """
    last = before[-1] if before else None
    spaces = len(last.text) - len(last.text.rstrip(" ")) if isinstance(last, Text) else 0
    if Separator() in before:  # another text begins there
        before = before[before.index(Separator()) + 1 :]
    left: tuple[str, ...] = ("",)
    if _has_text(before):
        beside = last.text[-1] if isinstance(last, Text) and not spaces else "x"
        left = (beside, ",", "x")
    ids = [token for token, _, _ in _tokenize(tokenizer, " " * spaces + word.strip(), left, ("",))]
    if not ids or tokenizer.unk_token_id in ids:
        raise TemplateError(f"the tokenizer does not know the word {word!r}.")
    return ids


def _number_vectors(
    pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[range], list[int | None]]:
    """Number the vectors of virtual tokens and trainable words in the order in which they first appear.

    Returns:
        The numbers of each virtual token and of each piece of trainable words, and the token id that each vector
        starts from; `None` for a random start.
    """
    numbers, starts, first = list[range](), list[int | None](), dict[int, int]()
    for place, piece in enumerate(pieces):
        if isinstance(piece, TrainableWords):
            ids = _word_ids(tokenizer, pieces[:place], piece.words)
            numbers.append(range(len(starts), len(starts) + len(ids)))
            starts += ids
        elif isinstance(piece, VirtualToken):
            if piece.index not in first:
                first[piece.index] = len(starts)
                starts.append(None)
            numbers.append(range(first[piece.index], first[piece.index] + 1))
    return numbers, starts


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, left: Sequence[str], right: Sequence[str]
) -> list[tuple[int, int, int]]:
    """The tokens of a part of a text, each with its place in `text`, as they are beside other words.

    A short word stands for what is on each side, because tokenizers treat the start and the end of a text in their
    own ways. If a token reaches into that word, the next one is taken.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        left: The words to put before it; an empty text if the whole text starts here.
        right: The words to put after it.
    """
    if not text:
        return []
    # Spaces before an answer or a virtual token belong to it.
    length = len(text.rstrip(" ") if any(right) else text)
    for before, after in (
        *itertools.product(left, right),
        ("", ""),
    ):  # without such words if there is no other way
        encoded = tokenizer(
            before + text + after, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = []
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            start, end = first - len(before), last - len(before)
            if start < 0 or end > len(text):
                if text[max(start, 0) : max(end, 0)].strip():
                    break
            elif start < length:
                found.append((token, start, end))
        else:
            return found
    raise AssertionError


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int], tuple[int, int]]:
    """The tokens that a tokenizer adds before a text, between two texts and after a text, and the texts' segments."""
    pair = tokenizer("x", "x", return_special_tokens_mask=True, return_token_type_ids=True)
    own = [place for place, special in enumerate(pair["special_tokens_mask"]) if not special]
    count = len(own) // 2
    ids, types = pair["input_ids"], pair["token_type_ids"]
    single = tokenizer("x", return_special_tokens_mask=True)
    start = single["special_tokens_mask"].index(0)
    return (
        single["input_ids"][:start],
        ids[own[count - 1] + 1 : own[count]],
        single["input_ids"][start + count :],
        (types[own[0]], types[own[-1]]),
    )


def _join_runs(pieces: Sequence[Piece]) -> Iterator[_Run | VirtualToken | TrainableWords | Mask | Separator]:
    """Join the words and fields that follow each other."""
    groups = [
        (key, list(group)) for key, group in itertools.groupby(pieces, lambda each: isinstance(each, Text | Field))
    ]
    before: list[Piece] = []
    for number, (is_run, group) in enumerate(groups):
        if is_run:
            last = type(groups[number - 1][1][-1]) if number else None
            following = type(groups[number + 1][1][0]) if number + 1 < len(groups) else None
            parts = [part for part in group if isinstance(part, Text | Field)]
            if last is Separator and isinstance(parts[0], Text):
                parts[0] = Text(parts[0].text.lstrip(" "))
            if following is Separator and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text.rstrip(" "))
            yield _Run(
                tuple(parts),
                last if _has_text(before) else None,
                None if following is Separator else following,
            )
        else:
            yield from (each for each in group if not isinstance(each, Text | Field))
        before = [*before, *group]
        if Separator() in group:  # another text begins
            before = group[group.index(Separator()) + 1 :]


def _has_text(pieces: Iterable[Piece]) -> bool:
    """Whether some pieces are more than virtual tokens and spaces."""
    return any(
        bool(piece.text.strip()) if isinstance(piece, Text) else isinstance(piece, Field | TrainableWords | Mask)
        for piece in pieces
    )


def _stand_ins(kind: type | None, char: str) -> tuple[str, ...]:
    """Words that stand for the piece beside a part of a text, in the order in which they are tried.

    Args:
        kind: The kind of the piece; `None` if the text starts or ends here.
        char: The character beside it. A letter beside a virtual token begins or ends a word of its own.
    """
    if kind is None:
        return ("",)
    return (",", "x", "1") if kind is VirtualToken and char.isalnum() else ("x", ",", "1")


def _owner(text: str, owners: list[int], start: int, end: int) -> int:
    """The number of the field that a token belongs to; -1 for the template's own words, or if it spans both."""
    found = {owners[i] for i in range(start, end) if not text[i].isspace()} or set(owners[start : start + 1])
    return found.pop() if len(found) == 1 else -1
