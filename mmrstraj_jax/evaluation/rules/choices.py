"""One of several: "A or B" questions, colours, which is larger, and what a scene is."""

import re

from mmrstraj_jax.evaluation.rules.lexicon import COLORS, COVERS, GROUPS, OPPOSITES, group_of
from mmrstraj_jax.evaluation.rules.text import (
    NEGATORS,
    content,
    find,
    negated,
    normalise,
    same_word,
    stem,
    tokens,
    words_of,
)

# ---- A or B ----


def options(question: str) -> tuple[list[str], list[str]] | None:
    """The two options of a question, as the words that tell them apart."""
    text = normalise(question).rstrip("? .")
    match = re.search(r"([^,?]+?),? or (?:an? |the |in |at |from |by )*([^,?]+)$", text)
    if not match:
        return None
    first, second = content(tokens(match[1].split(",")[-1])), content(tokens(match[2]))
    if not second:
        return None
    opposite = OPPOSITES.get(second[0])
    if opposite in first:
        return [opposite], [second[0]]
    shared = set(first) & set(second)
    two = [w for w in second if w not in shared][:2]
    if not two or not first:
        return None
    # of "is the image taken during the day", the words next to "or" are the option
    one = [w for w in first if w not in shared]
    return (one[-len(two) :], two) if one else None


def _option_forms(option: list[str]) -> set[tuple[str, ...]]:
    return set(group_of(tuple(option))) | {tuple(option)}


def choose(clauses: list[list[str]], pair: tuple[list[str], list[str]]) -> int | None:
    """0 or 1: the option an answer takes; denying one of two takes the other."""
    taken: set[int] = set()
    denied: set[int] = set()
    for words in clauses:
        if "either" in words or ("or" in words and all(_find_any(words, o) for o in pair)):
            return None
        for number, option in enumerate(pair):
            at = _find_any(words, option)
            if at:
                (denied if negated(words, *at, across=True) else taken).add(number)
    if len(taken) == 1 and taken != denied:
        return taken.pop()
    if not taken and len(denied) == 1:
        return 1 - denied.pop()
    return None


def _find_any(words: list[str], option: list[str]) -> tuple[int, int] | None:
    return next(
        (at for form in sorted(_option_forms(option), key=len, reverse=True) if (at := find(words, form))),
        None,
    )


# ---- colours ----

SHADES = frozenset("silver gold golden cream teal navy beige tan khaki maroon turquoise cyan".split())
_COLOR_SKIP = frozenset("and or with light dark bright deep pale in color colored".split()) | COLORS


def read_colors(clauses: list[list[str]], subject: list[str]) -> tuple[set[str], set[str], bool] | None:
    """(colours of the subject, colours denied, whether they are offered as alternatives), or None."""
    said: list[tuple[str, str, bool]] = []  # colour, what has it, denied
    alternatives = False
    for words in _colored(clauses):
        # "navy blue" is a blue; "white gray" may be both
        following = zip(words, [*words[1:], ""], strict=True)
        words = [w for w, after in following if not (w in SHADES and after in COLORS)]
        colors = [i for i, w in enumerate(words) if w in COLORS]
        alternatives |= "or" in words and len(colors) > 1
        for i in colors:
            after = next((w for w in words[i + 1 :] if w not in _COLOR_SKIP), None)
            before = " ".join(w for w in words[:i] if w not in _COLOR_SKIP)
            linked = any(w in ("is", "are", "appears", "appear", "looks", "look", "be") for w in words[:i])
            owner = f"{before} {after or ''}" if linked else after or before
            said.append((words[i], owner, bool(NEGATORS & set(words[max(0, i - 3) : i]))))
    if not said:
        return None
    if subject:
        mine = [s for s in said if any(same_word(w, subject[-1]) for w in s[1].split())]
        said = mine or [s for s in said if not s[1].strip()] or said
    has = {color for color, _, denied in said if not denied}
    return has, {color for color, _, denied in said if denied}, alternatives


def _colored(clauses: list[list[str]]) -> list[list[str]]:
    """The clauses, a list of colours as one: "The cars are white, black, and red"."""
    joined: list[list[str]] = []
    for words in clauses:
        before = joined[-1] if joined else ["-"]
        goes_on = set(words) <= _COLOR_SKIP or set(before) <= _COLOR_SKIP or before[0] == "there"
        first = next((w for w in words if w not in ("and", "or")), "")
        if goes_on and first in COLORS and before[-1] in COLORS and not NEGATORS & set(before):
            joined[-1] += ["and", *words]
        else:
            joined.append(list(words))
    return joined


def last_of_run(clauses: list[list[str]]) -> list[list[str]]:
    """The clauses with the last colour of each run of them: "yellow green" is a green."""
    return [
        [w for w, after in zip(words, [*words[1:], ""], strict=True) if not {w, after} <= COLORS]
        for words in clauses
    ]


def judge_colors(reference: set[str], has: set[str], denied: set[str], alternatives: bool) -> str | None:
    """All of them and none besides."""
    if has == reference:
        return "correct"
    if not has:
        return "wrong" if denied & reference else None
    if alternatives and has & reference:
        return None
    return "wrong"


def color_subject(question: str) -> list[str]:
    """What a question about colour is about: its noun."""
    words = words_of(question)
    end = r"((?:\w+ )*?\w+?)(?: (?:in|on|of|at|near|next|that|beside)\b.*)?$"
    every = r"(?:the |these |most of the |all the )?"
    match = re.search(rf"colors? (?:of|is|are|does|do) {every}{end}", " ".join(words))
    return content(match[1].split()) if match else []


# ---- which is larger ----

_MORE = frozenset("bigger more greatest biggest largest most wider longer taller higher".split())
_LESS = frozenset("smaller less smallest least narrower shorter lower fewest".split())


_THING = r"((?:\w+ ){1,4}?)"
_GRADE = r"(?:bigger|smaller|more|less|wider|longer|taller|higher|shorter|lower)"
_COMPARED = (
    # "which covers a larger area, A or B", "which of A and B is larger", "is the area of A larger than B"
    rf"{_GRADE}(?: \w+){{0,3}}? (?:the )?(?:area of )?{_THING}or (?:the )?(.+)$",
    rf"(?:between|of) (?:the )?{_THING}(?:and|or) (?:the )?((?:\w+ ?){{1,4}}?)(?:which|what|is|has|$)",
    r"^(?:is|are|do|does) (?:there )?(?:a )?(?:more |less |fewer |smaller |bigger |higher )?(?:the )?"
    r"(?:area|number|size|proportion|amount|share|percentage)?(?: of)?"
    rf"(?: the)? ?{_THING}(?:in the (?:image|picture) )?(?:(?:is |are )?{_GRADE} ?(?:\w+ ){{0,2}}?)?"
    r"than (?:the )?(?:that |area |those )?(?:of )?(?:the )?(.+)$",
)


def compared(question: str) -> tuple[list[str], list[str], bool] | None:
    """(A, B, whether the question asks for the larger one), or None."""
    words = words_of(question)
    text = " ".join(words)
    sign = next((w in _MORE for w in words if w in _MORE | _LESS), None)
    if sign is None or "half" in words:
        return None
    for pattern in _COMPARED:
        if match := re.search(pattern, text):
            first, second = content(match[1].split()), content(match[2].split())
            first, second = (
                [w for w in first if w not in _MORE | _LESS],
                [w for w in second if w not in _MORE | _LESS],
            )
            if first and second and first != second:
                return first, second, sign
    return None


def larger(clauses: list[list[str]], pair: tuple[list[str], list[str], bool]) -> int | None:
    """0 when A is the larger, 1 when B is, None when nothing is said or both are."""
    winners: set[int] = set()
    for words in clauses:
        at = [(i, n) for i, w in enumerate(words) for n in (0, 1) if _entity(w, pair[n], pair[1 - n])]
        sign = next((w in _MORE for w in words if w in _MORE | _LESS), None)
        if not at:
            continue
        named = list(dict.fromkeys(n for _, n in at))
        denied = any(w in NEGATORS for w in words)
        place = next((i for i, w in enumerate(words) if w in _MORE | _LESS), None)
        if sign is None:
            if len(named) == 1 and len(content(words)) <= len(pair[named[0]]) + 1 and not denied:
                winners.add(named[0] if pair[2] else 1 - named[0])
            continue
        if "than" in words and len(named) == 1 and at[0][0] > words.index("than"):
            first = 1 - named[0]
        elif (
            place is not None
            and len(named) == 2
            and "there" not in words[:1]
            and at[0][0] > place
            and "than" not in words
        ):
            continue
        else:
            first = named[0]
        winners.add(first if sign != denied else 1 - first)
    return winners.pop() if len(winners) == 1 else None


def _entity(word: str, mine: list[str], other: list[str]) -> bool:
    return any(same_word(word, m) and m not in other for m in mine)


# ---- what it is ----


def concepts(clauses: list[list[str]]) -> list[tuple[int, bool]]:
    """Known things in the order of an answer, as (group number, denied); longer phrases first."""
    phrases = sorted(((p, n) for n, group in enumerate(GROUPS) for p in group), key=lambda x: -len(x[0]))
    found: list[tuple[int, int, int, bool]] = []
    for number, words in enumerate(clauses):
        taken: set[int] = set()
        for phrase, group in phrases:
            for start in range(len(words) - len(phrase) + 1):
                span = range(start, start + len(phrase))
                if not taken & set(span) and all(
                    same_word(words[i], p) for i, p in zip(span, phrase, strict=True)
                ):
                    taken |= set(span)
                    found.append((number, start, group, negated(words, start, start + len(phrase))))
    return [(group, denied) for _, _, group, denied in sorted(found)]


def _covers(general: int, special: int) -> bool:
    """Whether one group is a general word for the other: trees for a forest."""
    return any(
        (thing,) in GROUPS[special]
        for phrase in GROUPS[general]
        for thing in COVERS.get(" ".join(phrase), ())
    )


def judge_open(reference: list[list[str]], answer: list[list[str]]) -> str | None:
    """Answers that name things: the same thing first, none of it, or (None) something in between."""
    wanted = [g for g, denied in concepts(reference) if not denied]
    named = concepts(answer)
    hedged = any(w in ("or", "either", "maybe", "could", "might") for words in answer for w in words)
    if wanted and named:
        positive = [g for g, denied in named if not denied]
        if not positive:
            return "wrong" if set(wanted) & {g for g, _ in named} else None
        if set(wanted) & set(positive):
            whole = set(wanted) <= set(positive)
            first = positive[0] in wanted
            return "correct" if whole and first and not hedged else None
        if any(_covers(w, p) for w in wanted for p in positive):
            return "correct" if not hedged and len(wanted) == 1 == len(positive) else None
        if any(_covers(p, w) for w in wanted for p in positive):
            return None  # "trees" of a forest
        return "wrong" if not hedged else None
    words = [w for clause in reference for w in content(clause)]
    said = [w for clause in answer for w in content(clause)]
    if not words or not said or hedged:
        return None
    denied = any(set(clause) & NEGATORS for clause in answer) != any(set(c) & NEGATORS for c in reference)
    if all(any(same_word(s, w) for s in said) for w in words):
        return "wrong" if denied and len(said) <= len(words) + 1 else None if denied else "correct"
    if any(OPPOSITES.get(stem(w)) in said for w in words):
        return None if denied else "wrong"
    return None
