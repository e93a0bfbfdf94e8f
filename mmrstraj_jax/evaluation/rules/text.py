"""Words of an answer: spelling, clauses, negation, typos; and the clauses that no rule may read.

Nothing here looks for substrings: every comparison is between whole words, so "no" is not in "north" nor
"1" in "10".
"""

import re
import unicodedata
from collections.abc import Collection, Iterable

from mmrstraj_jax.evaluation.rules.lexicon import CANONICAL, KNOWN, STOP

NEGATORS = frozenset(
    "no not none never neither nor without nothing nobody nowhere zero 0 lack fail unlikely doubt".split()
)
# after the thing they deny: "cars are absent"
_ABSENT = frozenset("absent missing lacking nowhere none".split())
_DENIED_VERB = frozenset(
    "is are was were do does did has have had can could will be visible present seen".split()
)
PREPOSITIONS = frozenset(
    "in on at near around along alongside with without beside behind by from under underneath beneath over "
    "above below across through throughout between among amongst against inside outside within into onto "
    "upon toward towards".split()
)
# a negation reaches to the end of its noun phrase: "no cars on the roundabout" leaves the roundabout alone
_PROTECTS = PREPOSITIONS | {"next", "only"}

_CONTRACTIONS = (
    (r"\bcan(?:no|')t\b|\bcannot\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"\bain't\b", "is not"),
    (r"\b(\w+)n't\b", r"\1 not"),
    (r"\b(it|there|that|he|she|what|here)'s\b", r"\1 is"),
    (r"\b(they|we|you)'re\b", r"\1 are"),
    (r"\bi'm\b", "i am"),
    (r"'s\b|s'(?=\s)", "s"),
    (r"\bcar park(s?)\b", r"parking lot\1"),
    (r"\bwater[ -]?(?:bod(?:y|ies|ys)|areas?)\b|\bbod(?:y|ies) of water\b", "water"),
    (r"\bbareland\b|\bbare (?:soil|ground)\b", "bare land"),
    (r"\b(?:soccer|football)[ -]ball[ -]field", "soccer field"),
    (r"\bb ?(?:&|and) ?w\b", "black and white"),
    (r"\bblack (?:and|&) white (image|picture|photo|imagery)\b", r"panchromatic \1"),
    (r"\bgr[ae]y ?-?scale\b", "panchromatic"),
    (r"\brather than\b|\binstead of\b|\bother than\b|\bas opposed to\b|\bno longer\b", "not"),
    (r"\bnot only\b|\bno doubt\b|\bwithout (?:a )?doubt\b|\bno question\b", " "),
)  # fmt: skip
# Said to the judge, not about the image. The rest of the answer still counts.
_INSTRUCTION = re.compile(
    r"\b(instructions?|full (?:marks?|points|credit)|scores?(?! ?board)|grad(?:er|ing)|judge|award|prompt"
    r"|\d+ points|disregard"
    r"|system(?= ?(?:[:\]]|prompt|message|override|note))|(?<!\w )system$"
    r"|mark (?:it|this|the answer|that|me|as)|(?:wrong|incorrect) answer"
    r"|(?:correct|right) answer(?! (?:is|was)\b)"
    r"|answer (?:is|as|was|:)? ?(?:correct|right|wrong|incorrect)|(?:rate|accept) (?:it|this|the))\b"
)
_ANSWER_IS = re.compile(r"^\W*(?:the )?(?:correct |right )?answer (?:is|was)\b")
_REFUSAL = re.compile(
    r"\b(can not|could not|unable to|impossible to|hard to|difficult to|not possible to|not able to"
    r"|too (?!many)\w+ to)"
    r" (?:be )?(?:\w+ly )?(?:determin|tell|told|say|said|assist|help|judg|identif|answer|confirm|know"
    r"|known|count"
    r"|decid|recogni|comment|make out|distinguish|see clearly|process|view|analy)\w*"
    r"|\b(?:not|never|un)(?: entirely| quite| really)? ?(?:sure|certain|clear|know|known|told|enough"
    r"|specified|"
    r"mentioned|provided|given)\b|\bno idea\b|\bknow nothing\b|\bas an? (?:ai|language|large)\b|\bsorry\b"
    r"|\bwhether\b|\b(?:may|might) or (?:may |might )?not\b"
    r"|\bno opinion\b|\binsufficient\b|\bno (?:information|answer|image)\b"
)
_CLARITY = re.compile(r"\b(clear|unclear|blurry|blurred|clarity)\b")


def normalise(text: str) -> str:
    """Lower case, one kind of quote, dash and space, contractions written out."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[‘’`´]", "'", text)
    text = re.sub(r"[‐-―−]", "-", text)
    text = text.replace("。", ".").replace("．", ".")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)", " to ", text)
    text = re.sub(r"(?<![\w)])-(?=\d)", " minus ", text)
    text = re.sub(r"(?<=\d)\+", " or more", text)
    text = re.sub(r">\s*(?=\d)", " more than ", text)
    text = re.sub(r"<\s*(?=\d)", " less than ", text)
    for pattern, replacement in _CONTRACTIONS:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"[ \t]+", " ", text.replace("-", " ").replace("/", " or ")).strip()


def tokens(text: str) -> list[str]:
    """Words and numbers of normalised text; "2.0" is one of them."""
    return [canonical(t) for t in re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text)]


def words_of(text: str) -> list[str]:
    """Words of a text as it was written."""
    return tokens(normalise(text))


def stem(word: str) -> str:
    """Singular form, good enough to compare with another word's."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(s|x|ch|sh)es$", word):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def canonical(word: str) -> str:
    """The word that stands for its spellings and inflections ("grey", "habor", "blurred")."""
    return CANONICAL.get(word) or CANONICAL.get(stem(word)) or word


def answer_clauses(text: str, question: str = "") -> list[list[str]]:
    """Clauses of an answer as words, without those that refuse or that talk to the judge.

    After a correction ("3, no, 4") only what follows it is left.
    """
    text = re.sub(
        r"[\[(<{][^\])>}]*[\])>}]", lambda m: "" if _INSTRUCTION.search(m[0].lower()) else m[0], text
    )
    text = normalise(text)
    if "panchromatic" in question.lower():
        text = re.sub(r"\bblack (?:and|&) white\b", "panchromatic", text)
    corrected = re.split(
        r",? (?:no|wait|correction|i mean),? (?=(?:there|it|they) (?:is|are|was|were) )", text
    )
    if len(corrected) > 1 and re.search(r"\bor\b", corrected[0]):
        text = corrected[-1]
    parts = re.split(
        r"(?<!\d)[.]|[.](?!\d)|[;!?\n:,]|\bbut\b|\balthough\b|\bthough\b|\bwhile\b|\bbecause\b|\bsince\b"
        r"|\bwhereas\b|\bhowever\b|\band (?=the\b|it\b|there\b|they\b)",
        text,
    )
    about_clarity = bool(_CLARITY.search(question.lower()))
    kept = []
    for part in parts:
        if _INSTRUCTION.search(part) or (_REFUSAL.search(part) and not about_clarity):
            continue
        words = tokens(_ANSWER_IS.sub(" ", part))
        if words:
            kept.append(words)
    return kept


def refuses(text: str) -> bool:
    """Whether the text says that it cannot tell."""
    return bool(_REFUSAL.search(normalise(text)))


def negated(clause: list[str], start: int, end: int, *, across: bool = False) -> bool:
    """Whether the mention clause[start:end] is denied, by a negation before it or a denied verb after it.

    across: a preposition between does not protect it ("not from a satellite").
    """
    before = [i for i in range(start) if clause[i] in NEGATORS]
    if before:
        # "no through roads", "no above ground tanks": there it belongs to the name
        first = before[-1] + (2 if clause[before[-1]] == "no" else 1)
        if across or not _PROTECTS & set(clause[first:start]):
            return True
    after = clause[end : end + 5]
    return bool(_ABSENT & set(after)) or any(
        word in ("not", "never")
        and _DENIED_VERB & {*clause[max(end, end + i - 1) : end + i], *after[i + 1 : i + 2]}
        for i, word in enumerate(after)
    )


def content(words: Iterable[str]) -> list[str]:
    """Stems of the words that carry meaning."""
    return [stem(w) for w in words if not {w, stem(w)} & STOP and w not in NEGATORS]


def _distance(a: str, b: str) -> int:
    """Edits between two words, a swap of neighbours counts as one."""
    table = {(i, -1): i + 1 for i in range(-1, len(a))} | {(-1, j): j + 1 for j in range(-1, len(b))}
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
            if i and j and x == b[j - 1] and a[i - 1] == y:
                best = min(best, table[i - 2, j - 2] + 1)
            table[i, j] = best
    return table[len(a) - 1, len(b) - 1]


def same_word(written: str, meant: str) -> bool:
    """Equal up to number, spelling variant or a typo; a word that is known by itself is never a typo."""
    a, b = stem(written), stem(meant)
    if a == b:
        return True
    if not 4 <= min(len(a), len(b)) <= 24 or {a, written} & KNOWN or a.endswith(b) or b.endswith(a):
        return False
    if not (a.isalpha() and b.isalpha()) or a[0] != b[0] or abs(len(a) - len(b)) > 2:
        return False
    return _distance(a, b) <= (2 if min(len(a), len(b)) >= 7 else 1)


def find(clause: list[str], phrase: Collection[str]) -> tuple[int, int] | None:
    """Where the words of a phrase stand next to each other in a clause: (start, end)."""
    phrase = list(phrase)
    for i in range(len(clause) - len(phrase) + 1):
        if all(same_word(clause[i + j], word) for j, word in enumerate(phrase)):
            return i, i + len(phrase)
    return None
