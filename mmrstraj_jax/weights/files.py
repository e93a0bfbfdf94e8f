"""From a folder to its tensors: single file or sharded index, safetensors only."""

import json
from pathlib import Path

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights.layouts import fold
from mmrstraj_jax.weights.safetensors_io import Entry, read_header, refuse_pickle

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
MERGE_PEFT = "merge it with peft (merge_and_unload, save_pretrained) and name the merged folder"


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        UserError: missing, not JSON, not an object.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; expected the file that Hugging Face puts beside the weights")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:80]}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def optional_json(path: Path) -> dict:
    """The JSON object of a file that may be absent; {} if it is."""
    return read_json(path) if path.exists() else {}


def list_tensors(path: Path) -> dict[str, Entry]:
    """Every tensor of a weight folder or of one file; reads headers only.

    Args:
        path: a .safetensors file, an index.json, or a folder with model.safetensors, its index, or one other
            .safetensors file.
    Raises:
        UserError: no weights, pickles only, ambiguous files, or an index that disagrees with its files.
    """
    if path.suffix in _PICKLES and path.is_file():
        raise refuse_pickle(path)
    if path.name.endswith(".index.json"):
        return _read_index(path)
    if path.is_file():
        return read_header(path)[0]
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or folder; expected a folder with config.json and .safetensors files"
        )
    single, index = path / _SINGLE, path / _INDEX
    if single.exists() and index.exists():
        raise UserError(f"{path}: holds both {_SINGLE} and {_INDEX}; remove the one that is out of date")
    if index.exists():
        return _read_index(index)
    files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])[0]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(
            f"{path}: {len(files)} .safetensors files ({names}, ...) without {_INDEX}; download the index"
        )
    if (path / "snapshots").is_dir():
        raise UserError(
            f"{path}: is a repository of the hub's cache; name a folder below {path / 'snapshots'}"
        )
    # First what transformers calls its weights: optimizer.pt may lie beside them.
    pickles = [file for file in path.iterdir() if file.suffix in _PICKLES]
    if pickles:
        raise refuse_pickle(min(pickles, key=lambda file: (not file.name.startswith("pytorch_model"), file)))
    raise UserError(f"{path}: no .safetensors file; expected {_SINGLE} or {_INDEX}")


def _read_index(path: Path) -> dict[str, Entry]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is missing or empty; download the index again")
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path}: weight_map names {name!r}; expected a .safetensors file of the same folder"
            )
    if absent := sorted(name for name in set(weight_map.values()) if not (path.parent / name).is_file()):
        raise UserError(f"{path}: {', '.join(absent[:3])} missing ({len(absent)} files); download the rest")
    tensors: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        found = read_header(path.parent / name)[0]
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != set(found):
            raise UserError(
                f"{path}: disagrees with {name}: not in the file: {fold(listed - set(found)) or 'none'}; "
                f"not in the index: {fold(set(found) - listed) or 'none'}; download both again"
            )
        tensors |= found
    return tensors
