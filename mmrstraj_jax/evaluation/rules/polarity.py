"""Yes or no: said outright, or by a sentence that affirms or denies what was asked."""

import re

from mmrstraj_jax.evaluation.rules.lexicon import COVERS, OPPOSITES, group_of
from mmrstraj_jax.evaluation.rules.text import (
    NEGATORS,
    PREPOSITIONS,
    canonical,
    content,
    find,
    negated,
    normalise,
    same_word,
    stem,
    words_of,
)

_YES = frozenset(
    "yes yeah yep yup sure correct indeed certainly definitely affirmative right true absolutely".split()
)
_NO = frozenset("no nope none negative not never false neither nothing incorrect nay".split())
_FILLER = frozenset(
    "so unfortunately well oh the answer is sir i think say would guess believe to my knowledge "
    "actually probably "
    "maybe perhaps sadly it be a and honestly obviously clearly course of response".split()
)
# after "no": the sentence goes on with something else than the thing denied
_COUNTS = frozenset("one two three four five six seven eight nine ten several many".split())
_GOES_ON = frozenset(
    "it there they this that these those the i we you not a because at in he she all only".split()
)
_EMPTY = frozenset("empty deserted vacant bare".split())
_GENERIC = frozenset("lot court field area tank track site yard land line body building".split())
_DETERMINERS = frozenset(
    "the a an any no some several many few more most all two three four five six seven eight nine "
    "ten this that these "
    "those and of large small big tiny white black red blue green gray brown yellow other".split()
)
_EXISTS = re.compile(
    r"^(?:(?:is|are) there (?P<a>.+)|(?:does|do) (?:(?:this|the|that) )?(?:image|picture|photo|scene)s? "
    r"(?:contain|contains|have|has|show|shows|include|includes|depict) (?P<b>.+)|(?:can|could) (?:you"
    r"|we|i|one) "
    r"(?:see|find|spot) (?P<c>.+)|(?:is|are) (?P<d>.+?) (?:visible|present|shown|seen)\b.*)$"
)
# what ends the name of the thing asked for: "a bridge | over the river", "a road | leading to it"
_END = PREPOSITIONS | frozenset("to for that which who where visible next close when if".split())
_DOING = frozenset(
    "surrounding surrounded connecting connected leading located going having present included shown seen "
    "depicted".split()
)
_ARTICLES = frozenset("a an any some the many of this more".split())
_QUESTION = re.compile(r"^(?:is|are|does|do|did|can|could|was|were|has|have|will|would|should)\b")


def is_question(question: str) -> bool:
    """Whether a question asks for yes or no."""
    text = normalise(question)
    return bool(_QUESTION.match(text))


def explicit(words: list[str]) -> bool | None:
    """What a clause says outright: "yes", "unfortunately no", "no it is not"."""
    if words in (["of", "course"], ["i", "think", "so"], ["i", "believe", "so"], ["it", "seems", "so"]):
        return True
    if words[-3:] == ["not", "think", "so"] or words in (["not", "really"], ["i", "doubt", "it"]):
        return False
    rest = list(words)
    while rest and rest[0] in _FILLER and not (rest[:1] == ["it"] and len(rest) > 1):
        rest = rest[1:]
    if not rest:
        return None
    if rest[1:] == ["not"] and rest[0] in ("absolutely", "definitely", "certainly"):
        return False
    if rest[0] in _YES and (
        len(rest) == 1 or rest[0] in ("yes", "yeah", "yep", "yup") or rest[1] in _GOES_ON
    ):
        return True
    if rest[0] in _NO and not (rest[0] in ("none", "neither", "nothing") and len(rest) > 1):
        if len(rest) == 1 or (rest[0] != "not" and rest[1] in _GOES_ON) or rest[:3] == ["not", "at", "all"]:
            return False
    return None


def denies_presence(words: list[str]) -> bool:
    """ "There is no car in the image", "This image does not include buildings", "no water"."""
    if words[0] == "no" and len(words) > 1:
        return True
    if words[0] == "there" and words[1:2] in (["is"], ["are"]) and words[2:3] in (["no"], ["not"]):
        return True
    return "not" in words and bool({"contain", "include", "show", "have"} & set(words[words.index("not") :]))


def existence_subject(question: str) -> list[str] | None:
    """The thing whose presence is asked for; None when the question asks something else."""
    match = _EXISTS.match(" ".join(words_of(question)))
    if not match:
        return None
    words = next(g for g in match.groups() if g).split()
    end = next((i for i in range(len(words)) if _ends(words, i)), len(words))
    subject = [w for w in words[:end] if w not in _ARTICLES]
    if len(subject) > 1 and subject[-1] in ("left", "remaining", "available"):
        subject.pop()  # "any empty places left"
    return [stem(canonical(w)) for w in subject] or None


def _ends(words: list[str], i: int) -> bool:
    """A participle ends the name only behind it: "surrounding trees", "a railway crossing" are things."""
    if words[i] in _END:
        return True
    object_follows = words[i].endswith("ing") and words[i + 1 : i + 2] and words[i + 1] in _DETERMINERS
    return bool(set(words[:i]) - _ARTICLES) and (words[i] in _DOING or object_follows)


def _mentions(clause: list[str], subject: list[str]) -> tuple[int, int, bool] | None:
    """(start, end, entails): the subject, a synonym, or (entails only presence) something it covers."""
    if at := find(clause, subject):
        return *at, True
    for phrase in group_of(tuple(subject)):
        if at := find(clause, phrase):
            return *at, True
    head = subject[-1]
    for i, word in enumerate(clause):
        if len(subject) > 1 and head not in _GENERIC and same_word(word, head):
            if i == 0 or clause[i - 1] in _DETERMINERS:
                return i, i + 1, True
    for word in COVERS.get(head, ()):
        if at := find(clause, (word,)):
            return *at, False
    # what covers the subject: "no vehicles" denies cars
    for general, special in {"vehicle": ("car", "truck", "bus"), "building": ("house",)}.items():
        if head in special and (at := find(clause, (general,))):
            return *at, True
    return None


def _exists(clauses: list[list[str]], subject: list[str], question: set[str]) -> set[bool]:
    found: set[bool] = set()
    for words in clauses:
        at = _mentions(words, subject)
        if "many" in question and (
            at is None and set(words) <= {"not", "many", "so", "very", "few", "a", "only"}
        ):
            found.add(not {"not", "few"} & set(words))
        elif at and "many" in question and {"few", "several", "one", "two", "single"} & set(words):
            found.add(False)
        elif at:
            denied = (
                negated(words, at[0], at[1])
                or "free" in words[: at[0]]
                or words[at[1] : at[1] + 1] == ["free"]
            )
            if words[0] in ("only",) and not denied:
                continue
            if not denied:
                found.add(True)
            elif at[2]:
                found.add(False)
        elif _EMPTY & set(words) and not _EMPTY & question and question & set(content(words)):
            found.add(False)
        elif (
            not content(words)
            or set(words) <= {"any", "one", "some", "of", "them", "here"} | _COUNTS | NEGATORS
        ):
            said = _pronoun(words)
            if said is not None:
                found.add(said)
    return found


def _pronoun(words: list[str]) -> bool | None:
    """ "It does", "they cannot", "there is", "0", "two"."""
    if words[0] in ("0", "zero", "none") or words[:2] in (
        ["not", "visible"],
        ["not", "present"],
        ["not", "seen"],
    ):
        return False
    if set(words) <= _COUNTS or words[0].isdigit() and len(words) == 1:
        return True
    if (
        words[0] in ("it", "they", "there", "i", "you", "we", "this")
        and len(words) > 1
        and not content(words)
    ):
        auxiliary = set(words[1:]) & set("is are does do can has have was were will could".split())
        return not NEGATORS & set(words) if auxiliary else None
    return None


def bare_claim(clauses: list[list[str]]) -> bool | None:
    """ "It is", "they are not": of an answer that is nothing else."""
    return _pronoun(clauses[0]) if len(clauses) == 1 else None


def _claim(clauses: list[list[str]], asked: list[str]) -> set[bool]:
    """Of questions that are not about presence: clauses that say no more than was asked, or its opposite."""
    found: set[bool] = set()
    for words in clauses:
        said = content(words)
        denied = any(negated(words, i, i + 1) for i, w in enumerate(words) if stem(w) in said)
        pronoun = _pronoun(words)
        if pronoun is not None:
            found.add(pronoun)
            continue
        opposite = [w for w in said if any(OPPOSITES.get(w) == q or OPPOSITES.get(q) == w for q in asked)]
        if opposite and not set(opposite) & set(asked):
            found.add(denied)
            continue
        matched = [w for w in said if any(same_word(w, q) for q in asked)]
        if said and len(matched) == len(said):
            found.add(not denied)
        elif asked and len({q for q in asked if any(same_word(w, q) for w in said)}) == len(asked):
            found.add(not denied)
    return found


def read(clauses: list[list[str]], question: str) -> bool | None:
    """The answer to a yes/no question; None where none is given, or both."""
    if clauses in ([["y"]], [["n"]]):  # anywhere else "n" is north
        return clauses == [["y"]]
    said = {e for words in clauses if (e := explicit(words)) is not None}
    if [w for w in clauses if "yes" in w and "no" in w]:
        return None
    subject = existence_subject(question)
    asked = content(words_of(question))
    rest = [words for words in clauses if explicit(words) is None or len(words) > 3]
    if subject:
        implied = _exists(
            [_without_yes(w) for w in rest],
            subject,
            {*asked, *(["many"] if "many" in words_of(question) else [])},
        )
        if not said and implied == {True} and not _meets_condition(rest, words_of(question)):
            return None
    else:
        many = ["many"] if "many" in words_of(question) else []
        implied = _claim(
            [_without_yes(w) for w in rest if explicit(w) is None], list(dict.fromkeys(asked + many))
        )
    if len(said) == 1:
        answer = said.pop()
        if subject and _contradicts(rest, subject, answer):
            return None
        return answer
    return implied.pop() if not said and len(implied) == 1 else None


def _meets_condition(clauses: list[list[str]], question: list[str]) -> bool:
    """ "There is a building" says nothing of "a building with a red roof"."""
    at = next((i for i, w in enumerate(question) if w in ("with", "having", "that", "which", "who")), None)
    condition = set(content(question[at:])) if at else set()
    told = [words for words in clauses if condition & set(content(words))]
    return not condition or bool(told) and not any(NEGATORS & set(words) for words in told)


def _without_yes(words: list[str]) -> list[str]:
    return words[1:] if words[0] in ("yes", "sure", "correct") and len(words) > 1 else words


def _contradicts(clauses: list[list[str]], subject: list[str], answer: bool) -> bool:
    """ "Yes, there are no cars", "No, there are cars": the very subject, denied or affirmed outright."""
    for words in clauses:
        at = find(words, subject)
        if at is None or {"only", "outside", "except", "beyond"} & set(words):
            continue
        denied = negated(words, *at)
        if answer and denied and set(words[max(0, at[0] - 2) : at[0]]) & NEGATORS:
            return True
        if not answer and not denied and words[0] in ("there", "yes") and explicit(words) is None:
            return True
    return False
