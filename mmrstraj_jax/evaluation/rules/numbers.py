"""Counts: in digits, in words, and in vague amounts with their bounds."""

from typing import NamedTuple

from mmrstraj_jax.evaluation.rules.text import (
    NEGATORS,
    canonical,
    content,
    find,
    same_word,
    stem,
    words_of,
)

_UNITS = {
    word: n
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {w: 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_TENS |= {"fourty": 40}
_SCALES = {"hundred": 100, "thousand": 1000}
_SINGLE = {"dozen": 12.0, "single": 1.0, "pair": 2.0}
_TYPO_TARGETS = ("fifteen", "thirteen", "fourteen", "seventeen", "eighteen", "nineteen", "twelve", "eleven")
_MANY = frozenset(
    "many lot lots plenty numerous countless dozens hundreds thousands multitude abundant".split()
)
_FEW = frozenset("few several some couple handful".split())
_ORDINAL = frozenset("st nd rd th".split())
_MORE = (("more", "than"), ("over",), ("above",), ("at", "least"), ("exceeding",), ("beyond",))
_LESS = (("less", "than"), ("fewer", "than"), ("smaller", "than"), ("under",), ("below",), ("at", "most"))
_LESS += (("up", "to"),)


class Amount(NamedTuple):
    """`low` to `high`, both included; a vague amount ("many", "few") has a name instead."""

    low: float
    high: float
    vague: str | None = None

    @property
    def exact(self) -> bool:
        return self.vague is None and self.low == self.high


MANY, FEW = Amount(10, float("inf"), "many"), Amount(2, 9, "few")


class _Mention(NamedTuple):
    amount: Amount
    end: int  # index of the word after it
    clause: int


def _spelt(words: list[str], i: int) -> tuple[float, int] | None:
    """The number that begins at word i, and where it ends. "eight two", as in RSIEval, is 82."""
    word = words[i]
    if word[0].isdigit():
        value: float = float(word)
        i += 1
        while i < len(words) and words[i] in _SCALES:
            value, i = value * _SCALES[words[i]], i + 1
        return value, i
    if words[i : i + 3] == ["half", "a", "dozen"]:
        return 6.0, i + 3
    if word in _SINGLE:
        return _SINGLE[word], i + 1
    if word not in _UNITS | _TENS | _SCALES:
        meant = next((t for t in _TYPO_TARGETS if same_word(word, t)), None)
        return (float(_UNITS[meant]), i + 1) if meant else None
    total, current, previous = 0.0, 0.0, None
    while i < len(words):
        word = words[i]
        if word in _UNITS:
            if previous == "unit" and current < 10 and 2 <= current and _UNITS[word] < 10:
                current *= 10  # a digit after a digit
            elif previous == "unit":
                break
            current, previous = current + _UNITS[word], "unit"
        elif word in _TENS:
            if previous in ("unit", "ten"):
                break
            current, previous = current + _TENS[word], "ten"
        elif word in _SCALES:
            current, previous = max(current, 1) * _SCALES[word], "scale"
            if word == "thousand":
                total, current = total + current, 0.0
        elif word == "dozen":
            current, previous = max(current, 1) * 12, "scale"
        elif not (
            word == "and" and previous == "scale" and i + 1 < len(words) and words[i + 1] in _UNITS | _TENS
        ):
            break
        i += 1
    return total + current, i


def mentions(clauses: list[list[str]]) -> list[_Mention]:
    """Every amount in the order of the text."""
    found = []
    for number, words in enumerate(clauses):
        i = 0
        while i < len(words):
            start = i
            spelt = _spelt(words, i)
            if spelt is None:
                if tuple(words[i : i + 2]) in (("large", "number"), ("great", "number"), ("large", "amount")):
                    found.append(_Mention(MANY, i + 2, number))
                elif words[i] in _MANY and (i == 0 or words[i - 1] not in ("how", "not")):
                    found.append(_Mention(MANY, i + 1, number))
                elif words[i] in _FEW and (words[i] != "some" or len(content(words)) <= 2):
                    found.append(_Mention(FEW, i + 1, number))
                i += 1
                continue
            value, i = spelt
            low = high = value
            if start and words[start - 1] in ("not", "minus"):
                continue  # "6, not 5"; "-7" counts nothing
            if words[start][0].isdigit() and words[i : i + 1] and words[i] in _ORDINAL:
                continue  # "the 7th"
            if i + 1 < len(words) and words[i] in ("to", "and") and _between(words, start, words[i]):
                upper = _spelt(words, i + 1)
                if upper and upper[0] > value:
                    high, i = upper
            elif any(tuple(words[start - len(p) : start]) == p for p in _MORE if start >= len(p)):
                low, high = value + (words[start - 1] != "least"), float("inf")
                if {"no", "not"} & set(words[max(0, start - 3) : start]):
                    low, high = 0, value
            elif any(tuple(words[start - len(p) : start]) == p for p in _LESS if start >= len(p)):
                low, high = 0, value - (words[start - 1] not in ("most", "to"))
                if {"no", "not"} & set(words[max(0, start - 3) : start]):
                    low, high = value, float("inf")
            elif i < len(words) and words[i] == "or" and words[i + 1 : i + 2] == ["more"]:
                high, i = float("inf"), i + 2
            found.append(_Mention(Amount(low, high), i, number))
    return found


def _between(words: list[str], start: int, link: str) -> bool:
    return link == "to" or (start > 0 and words[start - 1] == "between")


def read(clauses: list[list[str]], subject: list[str]) -> Amount | None:
    """The amount of `subject` (its words; empty where unknown) that an answer states.

    None: no amount, or several that do not agree and none is the subject's.
    """
    found = mentions(clauses)
    for words in clauses:  # "no soccer fields but one tennis court", "none", "there are no planes"
        denied = set(words) & (NEGATORS - {"0", "zero", "without"}) and not any(
            m.clause == clauses.index(words) for m in found
        )
        if denied and (_names(words, subject) or not content(words)):
            return Amount(0, 0)
    if subject:
        near = [m for m in found if _names(clauses[m.clause][m.end : m.end + len(subject) + 2], subject)]
        if not near and not found:
            for words in clauses:  # "a crane", "an island"
                at = find(words, subject)
                if at and at[0] and words[at[0] - 1] in ("a", "an"):
                    return Amount(1, 1)
        exact = [m for m in near if find(clauses[m.clause][m.end : m.end + len(subject)], subject)]
        found = exact or near or [m for m in found if not _other_size(clauses[m.clause][m.end :], subject)]
    amounts = list(dict.fromkeys(m.amount for m in found))
    if len(amounts) > 1:
        # "two: one at the top, one at the bottom", "six lanes, three in each direction"
        first, rest = found[0], [m for m in found[1:] if m.clause > found[0].clause]
        parts = sum(m.amount.low for m in rest)
        if (
            len(rest) == len(found) - 1
            and first.amount.exact
            and parts in (first.amount.low, first.amount.low / 2)
        ):
            return first.amount
        return None
    return amounts[0] if amounts else None


def _names(words: list[str], subject: list[str]) -> bool:
    return (
        bool(subject)
        and (find(words, subject) is not None or any(same_word(w, subject[-1]) for w in words))
        and not _other_size(words, subject)
    )


def _other_size(words: list[str], subject: list[str]) -> bool:
    sizes = {"large": "small", "small": "large", "big": "small"}
    return any(sizes.get(s) in words for s in subject if s in sizes)


def subject_of(question: str) -> list[str]:
    """The counted thing: "How many large ships are in the image?" -> large, ship."""
    words = words_of(question)
    for i, word in enumerate(words):
        if word == "many" and i and words[i - 1] == "how":
            words = words[i + 1 :]
            break
        if word == "number" and words[i + 1 : i + 2] == ["of"]:
            words = words[i + 2 :]
            break
    else:
        return []
    end = next(
        (i for i, w in enumerate(words) if w in _AFTER),
        len(words),
    )
    return [stem(canonical(w)) for w in words[:end] if w not in ("the", "of", "different")]


_AFTER = frozenset(
    "are is does do did can in on at there was were have has around near with that could you within".split()
)


def judge(reference: Amount, answer: Amount) -> str | None:
    """Exact numbers must be equal; vague ones must be of the same size (docs/evaluation.md)."""
    if reference.exact:
        if answer.vague:
            return "wrong" if reference.low == 0 else None
        if answer.exact:
            return "correct" if answer.low == reference.low else "wrong"
        return None if answer.low <= reference.low <= answer.high else "wrong"
    if reference.vague == "many":
        if answer.vague:
            return "correct" if answer.vague == "many" else "wrong"
        return "correct" if answer.low >= 10 else "wrong" if answer.high <= 2 else None
    if reference.vague == "few":
        if answer.vague:
            return "correct" if answer.vague == "few" else "wrong"
        if answer.high <= 1 or answer.low >= 20:
            return "wrong"
        return "correct" if answer.exact and 3 <= answer.low <= 9 else None
    if answer.vague:
        return "wrong" if answer.vague == "few" and reference.low > 20 else None
    if reference.low <= answer.low and answer.high <= reference.high:
        return "correct"
    return "wrong" if answer.high < reference.low or answer.low > reference.high else None
