"""Rules for short answers to questions about images: correct, wrong, or undecided, and by which rule.

The rule is picked from the words of question and reference, not from the type alone, because published types
have errors. Undecided means that the rules do not know; a judge may be asked (evaluation.judge), and nobody
counts it as right or wrong. How answers are labelled is in docs/evaluation.md, and so is the confusion table.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from mmrstraj_jax.evaluation.rules import choices, numbers, places, polarity
from mmrstraj_jax.evaluation.rules.lexicon import group_of
from mmrstraj_jax.evaluation.rules.text import (
    NEGATORS,
    answer_clauses,
    content,
    normalise,
    refuses,
    same_word,
    stem,
    words_of,
)

VERDICTS = ("correct", "wrong", "undecided")


# "In this image, is the area of ...?"
_LEAD = re.compile(
    r"^\s*(?:in|on|from|within) (?:this|the) (?:image|picture|photo|scene)\s*,?\s*"
    r"(?=(?:is|are|does|do|can|was|were|has|have|what|which|where|how)\b)",
    re.IGNORECASE,
)
_SHARE = frozenset("each per every".split())
_HEDGE = frozenset("could might may possibly perhaps maybe either".split())


class Verdict(NamedTuple):
    """What a rule found; `rule` names it."""

    value: str  # one of VERDICTS
    rule: str


class _Case(NamedTuple):
    type: str
    question: str
    reference: str
    prediction: str
    asked: list[list[str]]  # clauses of the reference
    said: list[list[str]]  # clauses of the prediction
    words: list[str]  # of the question


# A rule returns None when it is not its kind of question; else a verdict, None inside meaning undecided.
_Rule = Callable[[_Case], tuple[str | None] | None]


def _number(case: _Case) -> tuple[str | None] | None:
    if not (
        "how many" in normalise(case.question)
        or "number of" in normalise(case.question)
        or case.type in ("quantity", "count")
    ):
        return None
    subject = numbers.subject_of(case.question)
    reference = numbers.read(case.asked, subject)
    if reference is None:
        return None
    answer = numbers.read(case.said, subject)
    if answer is None and any(polarity.explicit(words) is False for words in case.said):
        answer = numbers.Amount(0, 0)
    whole = [words for words in case.said if not _SHARE & set(words)]
    if answer is None or (len(whole) < len(case.said) and numbers.read(whole, subject) is None):
        return (None,)  # "2 lanes in each direction" may be four
    return (numbers.judge(reference, answer),)


def _comparison(case: _Case) -> tuple[str | None] | None:
    pair = choices.compared(case.question)
    if pair is None:
        return None
    if polarity.is_question(case.question) and " or " not in normalise(case.question):
        reference, answer = (
            _yes_or_larger(clauses, case.question, pair) for clauses in (case.asked, case.said)
        )
    else:
        reference, answer = choices.larger(case.asked, pair), choices.larger(case.said, pair)
    if reference is None:
        return None
    return (None if answer is None else "correct" if answer == reference else "wrong",)


def _yes_or_larger(
    clauses: list[list[str]], question: str, pair: tuple[list[str], list[str], bool]
) -> int | None:
    """Which is larger, where "yes" means that A is what the question asks whether it is."""
    said = {e for words in clauses if (e := polarity.explicit(words)) is not None}
    if len(said) == 1:
        return int(said.pop() != pair[2])
    larger = None if said else choices.larger(clauses, pair)
    if larger is None and not said and polarity.bare_claim(clauses) is not None:
        return int(polarity.bare_claim(clauses) != pair[2])
    return larger


def _absent(case: _Case) -> tuple[str | None] | None:
    """What is asked about is not there: "Where is the water?" - "There is no water."."""
    about_presence = polarity.is_question(case.question) and choices.options(case.question) is None
    if about_presence or len(case.asked) != 1 or not polarity.denies_presence(case.asked[0]):
        return None
    asked = content(case.words)
    things = [w for w in content(case.asked[0]) if any(_synonyms(w, q) for q in asked)]
    if not things:  # "no motion" of a ship
        return None
    denials = [words for words in case.said if NEGATORS & set(words)]
    if not denials:
        return ("wrong",)
    named = [content(words) for words in denials]
    same = all(not of or any(_synonyms(w, thing) for w in of for thing in things) for of in named)
    return ("correct" if same and len(denials) == len(case.said) else None,)


def _synonyms(a: str, b: str) -> bool:
    return same_word(a, b) or (b,) in group_of((a,))


def _choice(case: _Case) -> tuple[str | None] | None:
    pair = choices.options(case.question)
    if pair is None:
        return None
    reference = choices.choose(case.asked, pair)
    if reference is None:
        return None
    answer = choices.choose(case.said, pair)
    return (None if answer is None else "correct" if answer == reference else "wrong",)


def _polarity(case: _Case) -> tuple[str | None] | None:
    bare = [polarity.explicit(words) for words in case.asked]
    if not polarity.is_question(case.question):
        if bare not in ([True], [False]) or (bare == [True] and case.asked[0][0] != "yes"):
            return None  # "right" is a place
        said = {e for words in case.said if (e := polarity.explicit(words)) is not None}
        if True in (said | set(bare)):  # "All the cars on the road?"
            return ("correct" if said == set(bare) else "wrong" if len(said) == 1 else None,)
        # "Where is the tennis court?" - "No."
        cells = places.read_cells(case.said, [])
        denied = any({"no", "not", "none"} & set(words) for words in case.said)
        return ("correct" if denied and not cells else "wrong" if cells and not denied else None,)
    reference = polarity.read(case.asked, case.question)
    if reference is None:
        return None
    answer = _bounded(case)
    if answer is None:
        answer = polarity.read(case.said, case.question)
    if answer is None and not any(polarity.explicit(words) is not None for words in case.said):
        answer = _along(case)
    return (None if answer is None else "correct" if answer == reference else "wrong",)


def _along(case: _Case) -> bool | None:
    """Whether a road runs as the question asks: "It runs from east to west" of "from south to north?"."""
    if not places.RUNS & set(case.words):
        return None
    asked, said = places.read_axes(case.question), places.read_axes(case.prediction)
    verdict = places.judge_axes(asked, said) if asked and said and len(said) == 1 else None
    return None if verdict is None else verdict == "correct"


def _bounded(case: _Case) -> bool | None:
    """Whether the amount that is stated is the one asked about: "15 cars" of "more than 10 cars?"."""
    asked = [m for m in numbers.mentions([case.words]) if not (m.amount.exact or m.amount.vague)]
    if len(asked) != 1 or any(_SHARE & set(w) or polarity.explicit(w) is not None for w in case.said):
        return None
    subject = content(case.words[asked[0].end :])[:1]
    things = [w for words in case.said for w in content(words) if not w.isdigit()]
    if things and not any(same_word(w, s) for w in things for s in subject):
        return None  # "12 trucks"
    found = numbers.read(case.said, subject)
    if found is None or not found.exact:
        return None
    return asked[0].amount.low <= found.low <= asked[0].amount.high


_IMAGE_COLOR = re.compile(r"color of (?:the |this )?(?:image|picture|photo)$")


def _as_gray(clauses: list[list[str]]) -> list[list[str]]:
    """A picture, and not a thing in it, is gray when it is panchromatic, or black and white."""
    gray = [["gray" if w == "panchromatic" else w for w in words] for words in clauses]
    return [re.sub(r"\bblack and white\b", "gray", " ".join(words)).split() for words in gray]


def _color(case: _Case) -> tuple[str | None] | None:
    if not {"color", "colors"} & set(case.words):
        return None
    subject = choices.color_subject(case.question)
    reference = choices.read_colors(case.asked, subject)
    if reference is None:
        return None
    if case.prediction.count("?") > 1:
        return (None,)
    said = _as_gray(case.said) if _IMAGE_COLOR.search(" ".join(case.words)) else case.said
    answer = choices.read_colors(said, subject)
    if not answer:
        return (None,)
    found = choices.judge_colors(reference[0], *answer)
    if found == "wrong":
        last = choices.read_colors(choices.last_of_run(case.said), subject)
        named = {w for words in case.said for w in words} & reference[0] & choices.SHADES
        if named or (last and choices.judge_colors(reference[0], *last) == "correct"):
            return (None,)  # "navy blue" for navy, "reddish brown" for brown
    return (found,)


def _road(case: _Case) -> tuple[str | None] | None:
    if case.type not in ("road_ori", "direction") and not {"direction", "orientation", "oriented"} & set(
        case.words
    ):
        return None
    reference = places.read_axes(case.reference)
    if reference is None:
        return None
    answer = places.read_axes(case.prediction)
    return (places.judge_axes(reference, answer) if answer else None,)


def _relation(case: _Case) -> tuple[str | None] | None:
    pair = places.entities(case.question)
    if pair is None:
        return None
    reference = places.read_relation(case.asked, pair)
    if reference is None:
        return None
    if any({"neither", "nowhere"} & set(words) for words in case.said):
        return ("wrong",)
    answer = places.read_relation(case.said, pair)
    return (places.judge_cells(reference, answer) if answer else None,)


def _place(case: _Case) -> tuple[str | None] | None:
    asks = {"where", "part", "corner", "position", "location", "side", "located"} & set(case.words)
    asks |= {"orientation", "facing"} & set(case.words)
    if not asks and case.type not in ("ab_position", "re_position"):
        return None
    subject = content(case.words)[:3]
    subject = [
        w for w in subject if stem(w) not in ("position", "corner", "location", "relative", "cut", "off")
    ][:2]
    reference = places.read_cells(case.asked, subject)
    if reference is None:
        return None
    answer = places.read_cells(case.said, subject)
    if answer is None:
        return ("wrong" if places.at_edge(case.said) and reference == {("", "")} else None,)
    return (places.judge_cells(reference, answer),)


def _open(case: _Case) -> tuple[str | None]:
    return (choices.judge_open(case.asked, case.said),)


_RULES: tuple[tuple[str, _Rule], ...] = (
    ("number", _number),
    ("comparison", _comparison),
    ("absence", _absent),
    ("choice", _choice),
    ("polarity", _polarity),
    ("color", _color),
    ("road", _road),
    ("relation", _relation),
    ("place", _place),
    ("open", _open),
)


def judge(type: str, question: str, reference: str, prediction: str, known: Collection[str] = ()) -> Verdict:
    """Judges one answer on its meaning, given the question.

    Args:
        type: RSIEval's question type or another set's; a hint only.
        known: all answers of a closed set (normalised by `plain`); an answer that is another one of them is
            wrong where no other rule applies.
    """
    question = _LEAD.sub("", question)
    if plain(prediction) == plain(reference) and plain(prediction):
        return Verdict("correct", "equal")
    said = answer_clauses(prediction, question)
    asked = answer_clauses(reference, question)
    case = _Case(type, question, reference, prediction, asked, said, words_of(question))
    if not asked and refuses(reference):
        return _unknowable(case)
    if not said:
        return Verdict("undecided", "no answer")
    if sum(bool(_HEDGE & set(words)) for words in said) > 1:
        return Verdict("undecided", "hedged")
    for name, rule in _RULES:
        found = rule(case)
        if found is None:
            continue
        if name == "open" and found[0] is None and plain(prediction) in known:
            return Verdict("wrong", "closed set")
        return Verdict(found[0] or "undecided", name)
    raise AssertionError("the last rule always answers")


def _unknowable(case: _Case) -> Verdict:
    """The reference itself says that one cannot tell."""
    committed = any(polarity.explicit(words) is not None for words in case.said)
    if refuses(case.prediction):
        return Verdict("undecided" if committed else "correct", "refusal")
    return Verdict("wrong" if committed or len(case.said) == 1 else "undecided", "refusal")


def plain(text: str) -> str:
    """An answer without case, end marks, articles and number: what makes two short answers equal."""
    words = words_of(text)
    # "A" may be the answer itself
    return " ".join(stem(w) for w in words if w not in ("a", "an", "the")) or " ".join(words)
