"""Recipe: placements as a frozen value, and as a file anyone can read.

regard: 1
note: 4-bit values, the ten most sensitive layers with 8-bit keys
model: {layers: 30, heads: 9, kv_heads: 3, head_dim: 64}
placements:
- mechanism: saw_int4
layers: [0, 1, 4]
options: {key_bits: 8, value_bits: 4}
weights: {file: recipe.safetensors, sha256: ...}     # only if a mechanism was fitted
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from regard import catalog
from regard.adapters.bind import bind
from regard.adapters.families import Decoder, open_decoder
from regard.adapters.install import digest
from regard.core.errors import RegardError, choose
from regard.core.placement import Indices, Placement

VERSION = 1
_KEYS = {"regard", "note", "model", "placements", "weights"}
_SHAPE = ("layers", "heads", "kv_heads", "head_dim")


def place(
    mechanism: str, layers: int | Iterable[int] | str = "all", heads: int | Iterable[int] | str = "all", **options: Any
) -> Placement:
    """Place `mechanism` on `layers` and KV `heads` ("all", one index, or several).

    Options are the mechanism's own (`regard show STEM`); fitted ones are tensors.

    Raises:
        RegardError: an unknown mechanism or option, one that cannot be attached, or a value its card forbids.
    """
    entry = catalog.find(mechanism)
    entry.refuse_unattachable()
    checked = catalog.check_options(entry, options)
    tensors = {name: value for name, value in checked.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in checked.items() if name not in tensors}
    return Placement(entry.stem, _indices("layers", layers), _indices("heads", heads), plain, tensors)


@dataclass(frozen=True)
class Recipe:
    """Placements, a note for people, and the shape of the model they were chosen for (None: any).

    Args:
        placements: what goes where; an empty recipe leaves every layer as it is.
        note: one line for people.
        shape: layers, heads, kv_heads and head_dim of the model it was made for.
    """

    placements: Sequence[Placement] = ()
    note: str = ""
    shape: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "placements", tuple(self.placements))
        for item in self.placements:
            if not isinstance(item, Placement):
                raise RegardError(f"a recipe holds placements made by regard.place(...), got {item!r}")
        told = self.shape
        whole = isinstance(told, Mapping) and all(isinstance(x, int) and x is not True for x in told.values())
        if told is not None and (not whole or set(told) != set(_SHAPE)):
            raise RegardError(f"model must name {', '.join(_SHAPE)} as whole numbers, got {told!r}")

    @property
    def digest(self) -> str:
        """A short name of what the placements say, trained tensors included."""
        return digest(self.placements)

    def fits(self, decoder: Decoder) -> None:
        """Raise unless `decoder` has the shape this recipe was made for.

        Raises:
            RegardError: names what differs.
        """
        for name, wanted in (self.shape or {}).items():
            if getattr(decoder, name) != wanted:
                raise RegardError(
                    f"this recipe was made for a model with {name}={wanted}, this one has {getattr(decoder, name)}"
                )

    def check(self, model: nn.Module) -> None:
        """Raise unless this recipe can be attached to `model`, which is not touched.

        Raises:
            RegardError: what cannot be served, naming it.
        """
        decoder = open_decoder(model)
        self.fits(decoder)
        bind(self.placements, decoder)

    def made_for(self, model: nn.Module) -> "Recipe":
        """This recipe, bound to models of `model`'s shape."""
        decoder = open_decoder(model)
        return Recipe(self.placements, self.note, {name: getattr(decoder, name) for name in _SHAPE})

    def save(self, path: str | Path) -> Path:
        """Write `path` (YAML) and, if a mechanism was fitted, a `.safetensors` file beside it.

        A recipe that stood there before is replaced only once both are written.
        """
        path = Path(path)
        written: dict[str, Any] = {"regard": VERSION, "note": self.note}
        if self.shape is not None:
            written["model"] = dict(self.shape)
        written["placements"] = [_told(item) for item in self.placements]
        tensors = {
            f"{index}.{name}": tensor.detach().cpu().contiguous().clone()  # placements may share one tensor
            for index, item in enumerate(self.placements)
            for name, tensor in item.tensors.items()
        }
        files: dict[Path, bytes] = {}
        if tensors:
            weights = path.with_suffix(".safetensors")
            data = save_tensors(tensors)
            written["weights"] = {"file": weights.name, "sha256": hashlib.sha256(data).hexdigest()}
            files[weights] = data
        files[path] = yaml.safe_dump(written, sort_keys=False, default_flow_style=None, width=100).encode()
        _write(files)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe file, checking every word of it.

        Raises:
            RegardError: the file is missing or not plain YAML, has an unknown key, another version, a
                placement its card forbids, or weights that are missing or not the ones it names.
        """
        path = Path(path)
        read = _read(path)
        tensors = _weights(path, read.get("weights"))
        items = read.get("placements") or []
        if not isinstance(items, list):
            raise RegardError(f"{path}: placements must be a list, got {items!r}")
        placements = [_placement(path, index, item, tensors) for index, item in enumerate(items)]
        if tensors:
            raise RegardError(f"{path}: weights {', '.join(sorted(tensors))} belong to no placement")
        note = read.get("note")
        if not isinstance(note, str | None):
            raise RegardError(f"{path}: note must be text, got {note!r}")
        return cls(placements, note or "", read.get("model"))


def _indices(kind: str, written: Any) -> Indices:
    if written == "all":
        return "all"
    if isinstance(written, int) and not isinstance(written, bool):
        return (written,)
    if isinstance(written, Iterable) and not isinstance(written, (str, bytes, Mapping)):
        found = tuple(written)
        if found and all(isinstance(index, int) and not isinstance(index, bool) for index in found):
            if len(set(found)) != len(found):
                raise RegardError(f"{kind} {list(found)} name one twice")
            return found
    raise RegardError(f"{kind}={written!r} must be 'all', an index or a list of indices")


def _told(item: Placement) -> dict[str, Any]:
    told: dict[str, Any] = {"mechanism": item.stem}
    for name in ("layers", "heads"):
        if (indices := getattr(item, name)) != "all":
            told[name] = list(indices)
    if item.options:
        told["options"] = dict(item.options)
    return told


def _write(files: Mapping[Path, bytes]) -> None:
    """Whole or not at all: a reader never sees half a recipe."""
    parts = {path.with_name(f".{path.name}.{os.getpid()}"): path for path in files}
    try:
        for part, path in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[path])
        for part, path in parts.items():
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


class _Plain(yaml.SafeLoader):
    """Plain YAML in which no key is said twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        read = super().construct_mapping(node, deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"it says {key!r} twice", node.start_mark)
        return read


def _read(path: Path) -> dict[str, Any]:
    try:
        read = _Plain(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise RegardError(f"no recipe at {path}") from None
    except OSError as error:
        raise RegardError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegardError(f"{path} is not plain YAML: {error}") from error
    if not isinstance(read, dict):
        raise RegardError(f"{path} is not a recipe: expected keys {', '.join(sorted(_KEYS))}")
    for key in read:
        choose("recipe key", key, _KEYS)
    if read.get("regard") != VERSION or read["regard"] is True:
        raise RegardError(f"{path}: recipe version {read.get('regard')!r}; this regard reads version {VERSION}")
    return read


def _weights(path: Path, told: Any) -> dict[str, Tensor]:
    if told is None:
        return {}
    if not isinstance(told, dict) or set(told) != {"file", "sha256"}:
        raise RegardError(f"{path}: weights must name a file and its sha256, got {told!r}")
    file = path.parent / Path(str(told["file"])).name
    if not file.is_file():
        raise RegardError(f"{path} needs its weights file {file.name}, which is not beside it")
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != told["sha256"]:
        raise RegardError(f"{file.name} is not the weights file {path.name} was saved with: sha256 {found[:12]}…")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise RegardError(f"{file.name} is not a safetensors file: {error}") from error


def _placement(path: Path, index: int, item: Any, tensors: dict[str, Tensor]) -> Placement:
    if not isinstance(item, dict) or not isinstance(item.get("mechanism"), str):
        raise RegardError(f"{path}: placement {index} must name its mechanism, got {item!r}")
    for key in item:
        choose(f"key of placement {index}", key, {"mechanism", "layers", "heads", "options"})
    options = item.get("options") or {}
    if not isinstance(options, dict):
        raise RegardError(f"{path}: options of placement {index} must be names and values, got {options!r}")
    own = {name: tensors.pop(name) for name in [n for n in tensors if n.startswith(f"{index}.")]}
    fitted = {name.split(".", 1)[1]: tensor for name, tensor in own.items()}
    entry = catalog.find(item["mechanism"])
    entry.refuse_unattachable()
    for name in options:
        choose(f"option of {entry.stem!r}", name, entry.card.options)
    for name in fitted:
        choose(
            f"fitted tensor of {entry.stem!r}", name, [n for n, o in entry.card.options.items() if o.kind == "tensor"]
        )
    return place(item["mechanism"], item.get("layers", "all"), item.get("heads", "all"), **options, **fitted)
