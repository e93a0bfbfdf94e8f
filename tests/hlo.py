"""What the text of a compiled program says: its collectives, and the shapes of everything it holds."""

import re

import jax

KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


def _sizes(types: str) -> list[list[int]]:
    """Axes longer than 1 of every array type in a line: [1, 24, 16] and [24, 16] are one buffer to us."""
    found = re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", types)
    return [[int(number) for number in shape.split(",") if number not in ("", "1")] for shape in found]


def collectives(text: str) -> list[dict]:
    """Of every collective of a program: its kind, the shapes it yields, whether a loop holds it."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        match = re.match(rf"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            found.append({"kind": match[2], "shapes": _sizes(match[1]), "loop": computation in bodies})
    return found


def held(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a program, axes in ascending order: a transposed copy is a copy."""
    return {tuple(sorted(shape)) for shape in _sizes(text)}


def check_fsdp(text: str, parameters: dict[str, jax.Array]) -> None:
    """Asserts that weights, and only weights, are gathered, a layer at a time and inside the loops.

    Args:
        parameters: by flat name, as the program takes them.
    """
    shapes = {name: sorted(leaf.shape) for name, leaf in parameters.items()}
    shards = [sorted(leaf.sharding.shard_shape(leaf.shape)) for leaf in parameters.values()]
    split = {name: leaf.shape for name, leaf in parameters.items() if "fsdp" in leaf.sharding.spec}
    stacked = {name: shape for name, shape in split.items() if ".layers." in name}
    single = [sorted(shape) for name, shape in split.items() if name not in stacked]
    layers = [sorted(shape[1:]) for shape in stacked.values()]
    trained = [shape for name, shape in shapes.items() if ".lora_" in name]
    arrays, gathered = held(text), []
    for name in stacked:  # one that looks like another's shard tells nothing
        assert shapes[name] in shards or tuple(shapes[name]) not in arrays, f"{name}: a whole stack"
        if name.endswith(("up_proj.weight", "fc1.weight")):  # other shards look like activations
            shard = parameters[name].sharding.shard_shape(parameters[name].shape)
            layouts = re.findall(rf"\[{','.join(map(str, shard))}\]{{([\d,]+)}}", text)
            assert set(layouts) == {"2,1,0"}, f"{name}: its shard is copied into another layout"
    for one in collectives(text):
        for shape in map(sorted, one["shapes"]):
            if one["kind"] == "all-gather":
                assert (one["loop"] and shape in layers) or shape in single, one
                gathered.append(shape)
            else:  # gradients, and sums of the loss and of the metrics
                assert one["kind"] in ("all-reduce", "reduce-scatter"), one
                assert not shape or shape in layers + trained, one
    assert stacked
    for name, shape in stacked.items():
        assert sorted(shape[1:]) in gathered, f"{name}: not gathered"
