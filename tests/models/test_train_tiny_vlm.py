"""The training of the tiny vision-language model: what it is shown, and that its loss is the model's own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="transformers reads images with pillow")

from regard.measure import scene_questions as ask
from regard.measure.scenes import KINDS
from regard.models import vlm

PATH = Path(__file__).parents[2] / "tools" / "train_tiny_vlm.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tiny_vlm", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.SHARD = 12
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def small():
    """A model of two narrow layers each, for the words of the scenes."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return vlm.assemble(ask.words(), tower, decoder | {"num_key_value_heads": 1}, seed=0)


@pytest.fixture(scope="module")
def rows(tool, small):
    ids = small[1].tokenizer.get_vocab()
    return [tool._joined([tool.shard(0, images, tool.Settings(), ids)], images) for images in (0, 1, 2)]


def test_the_assistant_alone_is_learned_and_images_are_as_many_as_scenes(rows, small):
    tokenizer = small[1].tokenizer
    for part in rows:
        shown = (part.tokens == tokenizer.convert_tokens_to_ids(vlm.IMAGE)).sum(1)
        assert shown.unique().tolist() == [64 * part.images]
        assert len(part.scenes) == len(part.tokens) * max(part.images, 1)
        for tokens, asked in zip(part.tokens.tolist(), part.asked.tolist(), strict=True):
            words = tokenizer.convert_ids_to_tokens(tokens)
            inside = False
            for word, learned in zip(words, asked, strict=True):
                assert learned == inside
                inside = word == vlm.ASSISTANT or (inside and word != vlm.END)
            assert not inside


def test_the_loss_is_the_models_own(tool, small, rows):
    model, _ = small
    trainer = tool.Trainer(model, tool.Settings(), torch.device("cpu"))
    model.eval()
    for feed in (
        tool.Feed([rows[1], rows[0]], [4, 2], torch.device("cpu"), 0),
        tool.Feed([rows[2]], [3], torch.device("cpu"), 0),
    ):
        batch = feed()
        with torch.no_grad():
            own = model(input_ids=batch[0], pixel_values=batch[2], labels=batch[1]).loss
            assert torch.allclose(tool.loss_of(model, trainer.heads, batch, 0.0), own, atol=1e-5)
            assert tool.loss_of(model, trainer.heads, batch, 1.0) > own
        assert batch[2].min() >= -1
        assert batch[2].max() <= 1


def test_patches_show_the_kind_that_stands_there(tool, rows):
    scenes = rows[1].scenes
    patches = tool._patches(scenes).view(-1, 8, 8)
    found = {(n, int(k)) for n, k in zip(*torch.where(scenes.kind >= 0), strict=True)}
    for n, slot in found:
        x, y = (int(at[n, slot] // vlm.PATCH) for at in (scenes.x, scenes.y))
        seen = scenes.opacity[n, slot] > 0
        assert (patches[n, y, x] == scenes.kind[n, slot]) == seen
    empty = ((scenes.kind < 0) | (scenes.opacity == 0)).all(1)
    assert (patches[empty] == len(KINDS)).all()


def test_a_few_steps_lower_the_loss(tool, small, rows):
    model, _ = small
    settings = tool.Settings(steps=8, batch=16, rate=5e-3)
    trainer = tool.Trainer(model, settings, torch.device("cpu"))
    batch = tool.Feed([rows[1]], [8], torch.device("cpu"), 0)()
    losses = []
    for step in range(8):
        trainer.pace((step + 1) / 16)
        losses.append(trainer.step(*batch).item())
    assert losses[-1] < 0.8 * losses[0]
