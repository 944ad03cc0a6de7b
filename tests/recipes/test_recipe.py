"""Recipe files: what is saved comes back, and a file that is not one is refused by the word that is wrong."""

import hashlib
import string
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import regard
from families import tiny
from regard import Recipe, RegardError, place

GATES = torch.linspace(0, 1, 6).view(3, 2)
DUO = place("duo", gates=GATES, sparsity=0.5, sink=2, recent=5)

some = st.just("all") | st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True)
streaming = st.builds(
    lambda layers, heads, **options: place("streaming", layers, heads, **options),
    some, some, sink=st.integers(0, 4096), window=st.none() | st.integers(1, 10**9),
)  # fmt: skip
codes = st.builds(
    lambda layers, heads, **options: place("saw_int4", layers, heads, **options),
    some, some, key_bits=st.sampled_from([4, 8, 16]), rotate_v=st.booleans(), block=st.none() | st.integers(1, 128),
)  # fmt: skip
fitted = st.builds(
    lambda layers, numbers, **options: place("duo", layers, gates=torch.tensor(numbers).view(2, 2), **options),
    some, st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), sparsity=st.floats(0, 1),
)  # fmt: skip
shapes = st.fixed_dictionaries({name: st.integers(1, 200) for name in ("layers", "heads", "kv_heads", "head_dim")})
recipes = st.builds(
    Recipe, st.lists(streaming | codes | fitted, max_size=4), st.text(string.printable + "äπ—:#'\"", max_size=60),
    st.none() | shapes,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(recipe=recipes)
def test_what_is_saved_comes_back(recipe, tmp_path_factory):
    path = recipe.save(tmp_path_factory.mktemp("recipes") / "recipe.yaml")
    again = Recipe.load(path)
    assert again.digest == recipe.digest
    assert (again.note, again.shape) == (recipe.note, recipe.shape)
    for one, other in zip(recipe.placements, again.placements, strict=True):
        assert (one.stem, one.layers, one.heads, one.options) == (other.stem, other.layers, other.heads, other.options)
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_placements_may_share_a_tensor(tmp_path):
    recipe = Recipe([place("duo", layers=[layer], gates=GATES) for layer in (0, 1)])
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")).digest == recipe.digest


def test_digests_tell_recipes_apart():
    told = [
        Recipe([]), Recipe([place("streaming")]), Recipe([place("streaming", layers=0)]),
        Recipe([place("streaming", heads=0)]), Recipe([place("streaming", sink=0)]), Recipe([DUO]),
        Recipe([place("duo", gates=GATES.flip(0), sparsity=0.5, sink=2, recent=5)]),
    ]  # fmt: skip
    assert len({recipe.digest for recipe in told}) == len(told)
    assert Recipe([DUO], note="other words").digest == Recipe([DUO]).digest


@pytest.mark.parametrize("broken", ["recipe.yaml", "recipe.safetensors"])
def test_a_save_that_fails_leaves_the_old_recipe(tmp_path, monkeypatch, broken):
    path = Recipe([DUO], note="old").save(tmp_path / "recipe.yaml")
    real = Path.write_bytes

    def write(target, data):
        real(target, data[: len(data) // 2] if broken in target.name else data)
        if broken in target.name:
            raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", write)
    new = Recipe([place("duo", gates=GATES.flip(0), sparsity=0.5)], note="new")
    with pytest.raises(OSError, match="no space left"):
        new.save(path)
    monkeypatch.undo()
    assert Recipe.load(path).note == "old"
    assert len(list(tmp_path.iterdir())) == 2, "a half-written file was left"
    new.save(path)
    assert Recipe.load(path).digest == new.digest


GOOD = {"regard": 1, "placements": [{"mechanism": "streaming", "layers": [0], "options": {"sink": 2, "window": 5}}]}


def one(**changes):
    return GOOD | {"placements": [GOOD["placements"][0] | changes]}


FILES = {
    "unknown key": (GOOD | {"placement": []}, r"unknown recipe key 'placement'; known: .* Did you mean 'placements'\?"),
    "unknown key of a placement": (one(layer=[0]), r"unknown key of placement 0 'layer'; .* Did you mean 'layers'\?"),
    "a key that is no word": (GOOD | {1: 2}, "unknown recipe key 1"),
    "other version": (GOOD | {"regard": 2}, "recipe version 2; this regard reads version 1"),
    "version true": (GOOD | {"regard": True}, "recipe version True; this regard reads version 1"),
    "no version": ({"placements": []}, "recipe version None; this regard reads version 1"),
    "no mapping": ([1, 2], "is not a recipe: expected keys model, note, placements, regard, weights"),
    "empty": (None, "is not a recipe: expected keys"),
    "placements no list": (GOOD | {"placements": {"a": 1}}, "placements must be a list, got {'a': 1}"),
    "placement no mapping": (GOOD | {"placements": ["streaming"]}, "placement 0 must name its mechanism, got 'stream"),
    "what replaces the product": (one(mechanism="kda"), r"'kda' replaces the product .*`regard train`"),
    "unknown mechanism": (one(mechanism="streeming"), r"unknown mechanism 'streeming'; .* Did you mean 'streaming'\?"),
    "unknown option": (one(options={"windw": 5}), r"unknown option of 'streaming' 'windw'; .* Did you mean 'window'\?"),
    "option no word": (one(options={5: 5}), "unknown option of 'streaming' 5; known: sink, window"),
    "bool for int": (one(options={"sink": True}), "option 'sink' of 'streaming' must be of kind int, got True"),
    "text for int": (one(options={"sink": "2"}), "option 'sink' of 'streaming' must be of kind int, got '2'"),
    "out of bounds": (one(options={"window": 0}), r"option 'window' of .* must lie in \[1, inf\], got 0; the nearest"),
    "options no mapping": (one(options=[1]), r"options of placement 0 must be names and values, got \[1\]"),
    "layers as text": (one(layers="first"), "layers='first' must be 'all', an index or a list of indices"),
    "layers of fractions": (one(layers=[0.5]), r"layers=\[0.5\] must be 'all', an index or a list of indices"),
    "layers none": (one(layers=None), "layers=None must be 'all', an index or a list of indices"),
    "a layer true": (one(layers=[True]), r"layers=\[True\] must be 'all', an index or a list of indices"),
    "a layer twice": (one(layers=[1, 1]), r"layers \[1, 1\] name one twice"),
    "no layer": (one(layers=[]), r"layers=\[\] must be 'all', an index or a list of indices"),
    "tensor as text": (one(mechanism="duo", options={"gates": [1.0]}), "'gates' of 'duo' must be a tensor"),
    "model too short": (
        GOOD | {"model": {"layers": 3}},
        "model must name layers, heads, kv_heads, head_dim as whole numbers, got",
    ),
    "model of words": (
        GOOD | {"model": {"layers": "3", "heads": 4, "kv_heads": 2, "head_dim": 8}},
        "model must name layers, heads, kv_heads, head_dim as whole numbers, got",
    ),
    "note no text": (GOOD | {"note": [1]}, r"note must be text, got \[1\]"),
    "weights no mapping": (GOOD | {"weights": "recipe.safetensors"}, "weights must name a file and its sha256, got"),
    "weights missing": (GOOD | {"weights": {"file": "w.st", "sha256": "0"}}, "needs its weights file w.st, which is"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_refused_by_what_is_wrong(name, tmp_path):
    written, message = FILES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(RegardError, match=message):
        Recipe.load(path)


TEXTS = {
    "python tag": ("regard: !!python/object/apply:os.system [echo]", "is not plain YAML: could not determine a const"),
    "broken": ("regard: [1", "is not plain YAML: while parsing"),
    "twice": ("regard: 1\nnote: a\nnote: b\nplacements: []\n", "says 'note' twice"),
    "twice inside": ("regard: 1\nplacements:\n- {mechanism: duo, mechanism: streaming}\n", "says 'mechanism' twice"),
    "not text": (b"\xff\xfe\x00regard", "is not plain YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_not_plain_yaml_is_refused(name, tmp_path):
    written, message = TEXTS[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(RegardError, match=message):
        Recipe.load(path)


def test_no_file_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(RegardError, match=r"no recipe at .*none\.yaml"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RegardError, match=r"cannot read the recipe .*: Is a directory"):
        Recipe.load(tmp_path)


def reweighted(path, data):
    """Replace the weights of the recipe at `path`, and the digest it names."""
    path.with_suffix(".safetensors").write_bytes(data)
    told = yaml.safe_load(path.read_text())
    told["weights"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(yaml.safe_dump(told))


def test_weights_that_are_not_the_recipe_s_are_refused(tmp_path):
    path = Recipe([DUO]).save(tmp_path / "recipe.yaml")
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RegardError, match=r"recipe\.safetensors is not the weights file recipe\.yaml was saved with"):
        Recipe.load(path)
    Recipe([DUO]).save(path)
    reweighted(path, b"nonsense")
    with pytest.raises(RegardError, match=r"recipe\.safetensors is not a safetensors file"):
        Recipe.load(path)
    reweighted(path, save({"0.gates": GATES, "3.gates": GATES.clone()}))
    with pytest.raises(RegardError, match=r"weights 3\.gates belong to no placement"):
        Recipe.load(path)
    reweighted(path, save({"0.gats": GATES}))
    with pytest.raises(RegardError, match=r"unknown fitted tensor of 'duo' 'gats'.*Did you mean 'gates'\?"):
        Recipe.load(path)
    reweighted(path, save({"0.sparsity": GATES}))
    with pytest.raises(RegardError, match="unknown fitted tensor of 'duo' 'sparsity'; known: gates"):
        Recipe.load(path)


def test_weights_beside_the_recipe_only(tmp_path):
    (tmp_path / "inner").mkdir()
    path = Recipe([DUO]).save(tmp_path / "inner" / "recipe.yaml")
    (tmp_path / "inner" / "recipe.safetensors").rename(tmp_path / "recipe.safetensors")
    path.write_text(path.read_text().replace("file: recipe", "file: ../recipe"))
    with pytest.raises(RegardError, match=r"needs its weights file recipe\.safetensors, which is not beside it"):
        Recipe.load(path)


def test_a_recipe_knows_the_shape_it_was_made_for():
    model, recipe = tiny("llama"), Recipe([DUO])
    bound = recipe.made_for(model)
    bound.check(model)
    assert bound.shape == {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(RegardError, match="made for a model with kv_heads=2, this one has 4"):
        bound.check(tiny("gpt2"))
    with pytest.raises(RegardError, match=r"holds placements made by regard\.place\(\.\.\.\), got 'streaming'"):
        regard.Recipe(["streaming"])
