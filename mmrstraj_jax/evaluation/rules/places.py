"""Where things are: cells of a 3x3 grid, one thing relative to another, and the direction of roads."""

import re

from mmrstraj_jax.evaluation.rules.text import (
    NEGATORS,
    answer_clauses,
    find,
    same_word,
    stem,
    tokens,
    words_of,
)

_ROW = {
    word: row
    for row, words in {
        "top": "top upper north northern northward northwards uppermost above over upward up",
        "bottom": "bottom lower south southern southward southwards lowermost below beneath under underneath "
        "downward down",
    }.items()
    for word in words.split()
}  # fmt: skip
_COLUMN = {
    w: c
    for c, words in {
        "left": "left west western westward westwards",
        "right": "right east eastern eastward eastwards",
    }.items()
    for w in words.split()
}
_CORNERS = {
    word: cell
    for cell, words in {
        ("top", "left"): "northwest northwestern", ("top", "right"): "northeast northeastern",
        ("bottom", "left"): "southwest southwestern", ("bottom", "right"): "southeast southeastern",
    }.items()
    for word in words.split()
}  # fmt: skip
Cell = tuple[str, str]  # (top | "" | bottom, left | "" | right); ("", "") is the centre
_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left", "": ""}
_NOT_A_PLACE = re.compile(
    r"\b(that|this|you|all|quite) (?:is|are) right\b|\bright (?=next|beside|behind|now|at|in front"
    r"|by\b)|\bright angles?\b"
    r"|\bleft (?=over|behind|out\b|blank)|\b(?:built|made|taken|set|parked) up\b|\btaken from above\b"
    r"|\bfrom above\b"
)
_GLUE = frozenset("hand most side ward".split())


# "the east-west road" is a road, and no place
_AXIS_NAME = re.compile(r"\b(?:north south|south north|east west|west east)(?= \w)")


def _drop(clauses: list[list[str]]) -> list[list[str]]:
    return [tokens(_NOT_A_PLACE.sub(" ", " ".join(words))) for words in clauses]


def _places(clauses: list[list[str]]) -> list[list[str]]:
    return [tokens(_AXIS_NAME.sub(" ", " ".join(words))) for words in _drop(clauses)]


def cells_in(words: list[str]) -> list[tuple[Cell, int, int]]:
    """Cells named in a clause as (cell, start, end); neighbouring words make one cell ("upper left")."""
    found: list[tuple[Cell, int, int]] = []
    i = 0
    while i < len(words):
        row = column = None
        center, start = False, i
        while i < len(words):
            word = words[i]
            if word in _CORNERS and row is None and column is None:
                row, column = _CORNERS[word]
            elif (
                word in _ROW
                and row is None
                and not (column is not None and word in ("above", "below", "over", "under"))
            ):
                row = _ROW[word]
            elif word in _COLUMN and column is None:
                column = _COLUMN[word]
            elif word == "center":
                center = True
            elif not (word in _GLUE and i > start):
                break
            i += 1
        if row or column or center:
            found.append(((row or "", column or ""), start, i))
        else:
            i += 1
    return found


def read_cells(clauses: list[list[str]], subject: list[str]) -> set[Cell] | None:
    """The cells that an answer puts `subject` in; None where it names none, or offers alternatives.

    Of clauses about several things, those that name the subject count.
    """
    clauses = [words for words in _places(clauses) if words]
    placed = [words for words in clauses if cells_in(words)]
    if subject and len(placed) > 1:
        placed = [w for w in placed if find(w, subject[-1:])] or placed
        if not any(find(w, subject[-1:]) for w in placed) and len(placed) > 1:
            placed = [w for w in placed if set(w[:2]) & {"it", "they"}] or placed
    cells: set[Cell] = set()
    for words in placed:
        if find(words, ("of", "center")) or find(words, ("off", "center")):
            return None  # "left of center"
        if "or" in words and len(cells_in(words)) > 1:
            return None
        for cell, start, end in cells_in(words):
            if set(words[max(0, start - 4) : start]) & NEGATORS:
                continue
            after = words[end : end + 6]
            if cell[0] + cell[1] and "of" in after[:3] and not _is_image(after[after.index("of") + 1 :]):
                continue  # "on the left of the river": beside something, no cell
            cells.add(cell)
    return cells or None


def _is_image(words: list[str]) -> bool:
    return not words or bool(
        set(words[:3]) & {"image", "picture", "photo", "scene", "it", "photograph", "frame", "view", "map"}
    )


def at_edge(clauses: list[list[str]]) -> bool:
    """ "at the edge", without saying which one."""
    return any(w in ("edge", "border", "corner", "margin", "periphery") for words in clauses for w in words)


def judge_cells(reference: set[Cell], answer: set[Cell]) -> str | None:
    """Equal sets; "bottom left" for "left and bottom" is left open."""
    if reference == answer:
        return "correct"
    if len(reference) != len(answer) and _flat(reference) == _flat(answer):
        return None
    if len(answer) > 1 and answer & reference:
        return None if answer > reference else "wrong"
    return "wrong"


def _flat(cells: set[Cell]) -> set[str]:
    return {part for cell in cells for part in cell if part}


# ---- relative positions ----

# "... and the building in the center of the image?"
_IN_THE_IMAGE = re.compile(
    r" (?:in|at|on) (?:the |this )?(?:(?:(?:top|bottom|upper|lower|left|right|center) ){1,2}"
    r"(?:part |corner |side |half )?(?:of|in) (?:the |this )?)?(?:image|picture|photo)$"
)


def entities(question: str) -> tuple[list[str], list[str]] | None:
    """(A, B) of a question about A relative to B, as their last words."""
    text = _IN_THE_IMAGE.sub("", " ".join(words_of(question)))
    name = r"((?:\w+ ){0,5}?\w+)"
    for pattern, order in (
        (rf"between (?:the )?{name} and (?:the )?{name}$", (1, 2)),
        (rf"(?:where (?:is|are)|(?:position|location) of|which direction (?:is|are)) (?:the )?{name} "
         r"(?:located |situated )?(?:relative|in relation|with respect|compared|relatively|regarding) "
         rf"(?:position )?to (?:the )?{name}$", (1, 2)),
        (rf"relative \w+ of (?:the )?{name} and (?:the )?{name}$", (1, 2)),
        (rf"(?:which|what) (?:side|direction|part|position) of (?:the )?{name} (?:is|are|does|do) "
         rf"(?:the )?{name}"
         r"(?: (?:on|located|in|lie|at|situated))?(?: on| in| at)?$", (2, 1)),
        (rf"(?:where (?:is|are)) (?:the )?{name} (?:of|from|to) (?:the )?{name}$", (1, 2)),
    ):  # fmt: skip
        if match := re.search(pattern, text):
            a, b = match[order[0]].split(), match[order[1]].split()
            if b[-1] in ("image", "picture", "photo"):
                return None
            return a, b
    return None


def read_relation(clauses: list[list[str]], pair: tuple[list[str], list[str]]) -> set[Cell] | None:
    """Where A lies as seen from B; sentences about B as seen from A are turned round."""
    one, other = pair
    relation: set[Cell] = set()
    for words in _places(clauses):
        if "or" in words and len(cells_in(words)) > 1:
            return None
        if any(w in ("both", "either", "two", "opposite") for w in words) and "side" in map(stem, words):
            relation |= {("", "left"), ("", "right")}
            continue
        for cell, start, end in cells_in(words):
            if set(words[max(0, start - 4) : start]) & NEGATORS or cell == ("", ""):
                continue
            if _is_image(words[end : end + 8][-4:]) and {"image", "picture"} & set(words[end:]):
                continue  # a cell of the image, not a relation
            # the first thing named before the place is the sentence's subject
            before, after = _first(words[:start], one, other), _first(words[end:], one, other)
            turned = before == "other" and after != "other" or (before is None and after == "one")
            relation.add((_OPPOSITE[cell[0]], _OPPOSITE[cell[1]]) if turned else cell)
    return relation or None


def _which(word: str, one: list[str], other: list[str]) -> str | None:
    if same_word(word, one[-1]) and not same_word(word, other[-1]):
        return "one"
    return "other" if same_word(word, other[-1]) and not same_word(word, one[-1]) else None


def _first(words: list[str], one: list[str], other: list[str]) -> str | None:
    return next((w for w in (_which(word, one, other) for word in words) if w), None)


# ---- roads ----

_AXIS_WORDS = {
    "vertical": "NS",
    "vertically": "NS",
    "horizontal": "EW",
    "horizontally": "EW",
    "longitudinal": "NS",
}
_AXIS_WORDS |= {"longitudinally": "NS", "transverse": "EW", "latitudinal": "EW"}
_LINK = frozenset(
    "to and the towards toward through from or side corner part of in image picture edge".split()
)
_AXES = {
    frozenset([("top", ""), ("bottom", "")]): "NS", frozenset([("", "left"), ("", "right")]): "EW",
    frozenset([("top", "left"), ("bottom", "right")]): "\\",
    frozenset([("top", "right"), ("bottom", "left")]): "/",
}  # fmt: skip
_COMPASS = {"n": "north", "s": "south", "e": "east", "w": "west"}
_GOES = frozenset("run runs running goes go going heads heading leads leading extends extending".split())
RUNS = _GOES | {"oriented", "orientation", "direction"}


def read_axes(text: str) -> set[str] | None:
    """The directions a road is said to have: "NS", "EW", the diagonals "/" and "\\", or "diagonal"."""
    axes: set[str] = set()
    text = re.sub(
        r"(?i)\b([nsew])\s?[-–/]\s?([nsew])\b",
        lambda m: f"{_COMPASS[m[1].lower()]}-{_COMPASS[m[2].lower()]}",
        text,
    )
    for words in _drop(answer_clauses(re.sub(r"(?<=[a-z]),? (?=to the )", " ", text))):
        denied = [i for i, w in enumerate(words) if w in NEGATORS]
        words = words[: denied[0]] if denied else words
        axes |= {_AXIS_WORDS[w] for w in words if w in _AXIS_WORDS}
        found = cells_in(words)
        used: set[int] = set()
        for (a, _, end), (b, start, _) in zip(found, found[1:], strict=False):
            if (
                set(words[end:start]) <= _LINK
                and start not in used
                and end not in used
                and frozenset([a, b]) in _AXES
            ):
                axes.add(_AXES[frozenset([a, b])])
                used |= {start, end}
        for cell, start, end in found:
            if (
                len(found) == 1
                and words[max(0, start - 1)] in _GOES | {"to", "toward", "towards"}
                and end == len(words)
            ):
                if _GOES & set(words[:start]):
                    axes |= {axis for pair, axis in _AXES.items() if cell in pair}
        if {"diagonal", "diagonally"} & set(words) and not axes & {"/", "\\"}:
            axes.add("diagonal")
    return axes or None


def judge_axes(reference: set[str], answer: set[str]) -> str | None:
    if reference == answer:
        return "correct"
    if len(answer) > len(reference) and answer & reference:
        return None
    diagonals = {"/", "\\", "diagonal"}
    if reference <= diagonals and answer <= diagonals and "diagonal" in reference | answer:
        return "correct" if reference == {"diagonal"} else None
    return "wrong"
