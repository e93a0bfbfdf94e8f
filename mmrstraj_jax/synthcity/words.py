"""Names and number words shared by captions, questions and answers."""

NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
# kind -> (with article, plural)
NOUNS = {
    "car": ("a car", "cars"),
    "moving car": ("a moving vehicle", "moving vehicles"),
    "parked car": ("a parked car", "parked cars"),
    "house": ("a house", "houses"),
    "building": ("a building", "buildings"),
    "apartment": ("an apartment building", "apartment buildings"),
    "shop": ("a commercial building", "commercial buildings"),
    "warehouse": ("a warehouse", "warehouses"),
    "hangar": ("a hangar", "hangars"),
    "terminal": ("a terminal building", "terminal buildings"),
    "airplane": ("an airplane", "airplanes"),
    "pool": ("a swimming pool", "swimming pools"),
    "tank": ("a storage tank", "storage tanks"),
    "ship": ("a ship", "ships"),
    "tree": ("a tree", "trees"),
    "field": ("a sports field", "sports fields"),
    "roundabout": ("a roundabout", "roundabouts"),
    "bridge": ("a bridge", "bridges"),
    "crossroads": ("a crossroads", "crossroads"),
    "T-junction": ("a T-junction", "T-junctions"),
    "dead end": ("a dead end", "dead ends"),
    "overpass": ("an overpass", "overpasses"),
    "interchange": ("an interchange", "interchanges"),
    "motorway": ("a motorway", "motorways"),
    "farmland": ("farmland", "farmland"),
    "water": ("water", "water"),
}


def a(kind: str) -> str:
    return NOUNS[kind][0]


def plural(kind: str) -> str:
    return NOUNS[kind][1]


def bare(kind: str) -> str:
    """The noun without its article."""
    name = NOUNS[kind][0]
    return name.split(" ", 1)[1] if name.startswith(("a ", "an ")) else name


def counted(number: int, kind: str) -> str:
    """ "one house", "three houses"; digits above twelve."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {bare(kind) if number == 1 else plural(kind)}"


def joined(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def at_place(cell: str) -> str:
    """ "in the center", "on the left", "at the top left"."""
    if cell == "center":
        return "in the center"
    return f"on the {cell}" if cell in ("left", "right") else f"at the {cell}"
