"""Words with one meaning to the rules: spellings, synonyms, opposites, and what things an image may show."""

import re

STOP = frozenset(
    """a an the this that these those is are was were be been being am it its they them their there here
    i we you he
    she his to of in on at by for from with and or as into onto image picture photo photograph scene
    view shown seen
    show shows see visible appear appears look looks located situated lies lie do does did has have had
    can could
    will would may might must shall should which what where who how when why whether if then so very
    quite also just
    only some any each all one two both such about around approximately roughly nearly almost main
    mainly mostly
    part side kind type area region zone place contain contains include includes present find found
    exist exists
    s t than""".split()
)

# one spelling for each word
CANONICAL = {
    written: word
    for word, others in {
        "gray": "grey greyish grayish",
        "color": "colour colored coloured colorful colourful colors colours rgb",
        "center": "centre middle central centered centred", "harbor": "harbour habor",
        "panchromatic": "grayscale greyscale monochrome monochromatic pan",
        "blurry": "blurred fuzzy unclear blur",
        "red": "reddish", "brown": "brownish", "green": "greenish", "blue": "bluish blueish",
        "white": "whitish",
        "yellow": "yellowish", "black": "blackish", "purple": "violet purplish",
        "partially": "partly partial patially incompletely", "fully": "completely entirely wholly",
        "regular": "regularly orderly ordered neat neatly",
        "random": "randomly irregular irregularly disorderly",
        "equal": "same identical equally", "stationary": "static still parked stopped motionless anchored",
        "moving": "move moves motion sailing driving", "light": "sparse lightly",
        "heavy": "congested busy dense",
        "day": "daytime daylight", "night": "nighttime", "drone": "uav drones", "satellite": "spaceborne",
        "bigger": "larger greater", "lack": "lacks", "fail": "fails",
        "smaller": "fewer", "wide": "broad", "high": "hd",
        "airport": "airfield aerodrome", "urban": "city town downtown metropolitan",
        "rural": "countryside village",
        "sunny": "sunshine", "autumn": "fall", "slow": "slowly", "fast": "quickly rapid rapidly",
    }.items()
    for written in others.split()
}  # fmt: skip

OPPOSITES: dict[str, str] = {}
for _a, _b in re.findall(
    r"(\w+)/(\w+)",
    "high/low clear/blurry wide/narrow heavy/light fully/partially day/night moving/stationary "
    "regular/random "
    "color/panchromatic urban/rural more/less bigger/smaller full/empty straight/curved flat/hilly "
    "order/random "
    "dense/sparse order/disorder safe/dangerous sunny/cloudy large/small open/closed equal/different "
    "equal/unequal "
    "left/right top/bottom upper/lower fast/slow calm/wavy",
):
    OPPOSITES.setdefault(_a, _b)
    OPPOSITES.setdefault(_b, _a)

# What an image or a part of it may show; phrases of one group mean the same, longer ones are read first.
GROUPS = tuple(
    tuple(tuple(phrase.split()) for phrase in group.split(","))
    for group in """airport,runway and terminal
    terminal,airport terminal,terminal building
    tarmac,apron
    fish farming,fish farm,fish pond,aquaculture
    harbor,port,seaport,dockyard,marina,wharf
    residential,residence,residential district,housing,neighborhood,neighbourhood,dwelling
    commercial,business,shopping,commerce
    industrial,factory,plant area,manufacturing,industry
    farmland,agricultural,cropland,farm,farming,agriculture,crop field,paddy field,cultivated
    forest,woodland,woods,jungle
    parking lot,parking area,car park,parking space,parking
    crossroad,intersection,crossing,four way junction
    t junction,t intersection
    roundabout,traffic circle,rotary
    dead end,cul de sac
    overpass,flyover,interchange,viaduct
    river,stream,canal
    lake,pond,reservoir
    sea,ocean,coast,seaside,shore,coastal
    beach
    school,campus,university
    stadium,arena
    tennis court
    basketball court
    baseball field,baseball diamond
    soccer field,football field,football pitch,soccer pitch
    ground track field,track and field,running track,playground,sport field,track field
    swimming pool,pool
    park,garden
    bridge
    railway,railroad,train station,railway station,rail
    motorway,highway,expressway,freeway
    arterial
    collector
    local
    desert,sand dune,bare land
    mountain,hill
    island
    rural
    urban
    storage tank,oil tank,tank
    apartment
    tree,vegetation
    building
    house
    road,street
    car,vehicle,automobile
    plane,airplane,aircraft,aeroplane,airliner,jet
    ship,boat,vessel,yacht
    truck
    bus
    helicopter
    grassland,grass,lawn,meadow
    construction,construction site
    container
    water
    spring
    summer
    autumn
    winter
    snow
    shadow
    sunny
    cloudy,overcast
    wave,wake
    people,person,pedestrian
    church
    hospital
    mine,quarry
    cemetery""".split("\n")
)
# a general word also for what it covers: water in "a river runs through the picture"
COVERS = {
    "water": ("river", "lake", "sea", "pond", "canal", "ocean", "stream", "reservoir"),
    "tree": ("forest", "woodland", "woods"), "vehicle": ("truck", "bus", "van"),
    "road": ("highway", "motorway"),
    "building": ("house", "apartment", "warehouse", "factory"), "plant": ("tree", "grass"),
}  # fmt: skip

COLORS = frozenset(
    """red green blue white black gray yellow brown orange purple pink beige silver cyan turquoise gold
    golden cream
    tan magenta teal navy khaki maroon""".split()
)

KNOWN = (
    frozenset(word for group in GROUPS for phrase in group for word in phrase)
    | frozenset(CANONICAL) | frozenset(CANONICAL.values()) | frozenset(OPPOSITES) | COLORS | STOP
    | frozenset(
        """right bright left eight night light sight might port sport part park bark dark mark road roof
        room boat
        coat coast cost most moist ship shop chip court count country county land lane line lake like
        sand hand band
        grand island ground round pound found field filed yield tank bank thank train rain brain grain
        tree three
        free there where house horse mouse houses course plane plan plant planet place palace building
        buildings
        tennis ten then than them more less larger smaller lower lowest upper uppermost tower power flower
        president resident residents clear cleaner near nearer year four five six seven nine eleven twelve
        north south east west northern southern eastern western forth fourth mouth worth southeast southwest
        northeast northwest rows row snow show crow grow throw ample apple water waters later matter winter
        pool tool pole poll bridge bride fridge beach bench reach teach fence hence""".split()
    )
)  # fmt: skip


def group_of(phrase: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """All phrases that mean the same as this one."""
    return next((group for group in GROUPS if phrase in group), (phrase,))
