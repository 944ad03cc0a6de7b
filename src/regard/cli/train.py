"""`regard train`: a small hybrid model from nothing, on a text or on a synthetic task."""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from regard.cli.common import Device
from regard.cli.output import Json, note, print_json, print_pairs
from regard.core.errors import RegardError, choose

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where checkpoints, the model and train.json go.")]
File = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="YAML lines NAME: VALUE, with `model:` for the model; flags win."),
]
Mixers = Annotated[
    str | None,
    typer.Option(help="Mixers of the layers, such as kda:3,softmax (three of one, then one of the other, and again)."),
]
Layers = Annotated[int | None, typer.Option(min=1, help="Layers; left out, the mixers once.")]
Width = Annotated[int | None, typer.Option(min=1, help="Channels of the model; left out, 256.")]
Heads = Annotated[int | None, typer.Option(min=1, help="Heads of every mixer; left out, one for 64 channels.")]
Text = Annotated[str | None, typer.Option(metavar="FILE", help="UTF-8 text to train on; its bytes are the tokens.")]
Tokenizer = Annotated[str | None, typer.Option(help="A folder or a hub name; its tokens instead of bytes.")]
TaskName = Annotated[str | None, typer.Option("--task", help="Instead of a text: a synthetic task, such as mqar.")]
Pairs = Annotated[int | None, typer.Option(help="Of --task mqar: key-value pairs of a row.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a row.")]
Batch = Annotated[int | None, typer.Option(help="Rows of a step.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps.")]
Rate = Annotated[float | None, typer.Option(help="Largest learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Of the first weights, the rows and dropout.")]
Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Run the model in bfloat16; weights stay float32.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of training, task or model; repeat for more."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from DIR's checkpoint, with its settings.")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Write curves to DIR/tensorboard.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]

# What `model` may say, beside `mixers` -> the name in HybridConfig.
MODEL = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "mlp": "mlp",
    "norm": "norm",
    "positions": "positions",
    "mixer_options": "mixer_options",
    "init": "initializer_range",
}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train")(train)


def train(
    out: Out = Path("regard-train"),
    settings: File = None,
    mixers: Mixers = None,
    layers: Layers = None,
    width: Width = None,
    heads: Heads = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    task: TaskName = None,
    pairs: Pairs = None,
    length: Length = None,
    batch: Batch = None,
    steps: Steps = None,
    rate: Rate = None,
    seed: Seed = None,
    bf16: Bf16 = None,
    setting: Setting = None,
    resume: Resume = False,
    tensorboard: Board = False,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model described by its mixers, and save it as a folder that from_pretrained reads.

    Ctrl-C writes a checkpoint and exits with 130; the same command with --resume goes on exactly there.
    """
    from regard.train.settings import Settings, read

    words = _of_checkpoint(out) if resume else {}
    words = _merged(words, read(settings) if settings else {})
    flags = {
        "text": text, "tokenizer": tokenizer, "task": task, "length": length, "batch": batch, "steps": steps,
        "rate": rate, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    words = _merged(words, {name: value for name, value in flags.items() if value is not None})
    shape = {"mixers": mixers, "layers": layers, "width": width, "heads": heads}
    words = _merged(words, {"model": {name: value for name, value in shape.items() if value is not None}})
    if pairs is not None:
        words = _merged(words, {"task_settings": {"pairs": pairs}})
    for name, value in map(_setting, setting or ()):
        words = _merged(words, _placed(name, value, words))
    words["model"] = _described(words.get("model", {}))
    told = _run(Settings.of(**words), out, resume, tensorboard, device, quiet)
    if json:
        print_json(told)
    else:
        print_pairs({name: value for name, value in told.items() if value is not None})
    if told["ended"] == "asked":
        note(f"stopped at step {told['steps']}; --resume goes on")
        raise typer.Exit(130)


def _run(settings: Any, out: Path, resume: bool, tensorboard: bool, device: str | None, quiet: bool) -> dict[str, Any]:
    """Train and save; what to tell of it."""
    import torch
    from transformers.utils import logging

    from regard.search import facts
    from regard.train import checkpoint, loop
    from regard.train.data import open_source
    from regard.train.progress import Bar
    from regard.train.progress import Board as Curves

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = checkpoint.latest(out)
    if out.is_file() or (found is None and (out / "config.json").exists()):
        raise RegardError(f"{str(out)!r} is a file or holds another model; name a folder of its own with --out DIR")
    if resume and found is None:
        note(f"no checkpoint in {out}: beginning at step 0")
    on = _device(device)
    source = open_source(settings, on)
    torch.manual_seed(settings.seed)
    model = _model(settings.model, source.vocabulary, settings.length).to(on)
    with ExitStack() as held:
        watchers: list[Any] = [Curves(out / "tensorboard")] if tensorboard else []
        for curves in watchers:
            held.callback(curves.close)
        if not quiet:
            watchers.append(held.enter_context(Bar()))
        asked = held.enter_context(_interrupts())
        result = loop.train(model, source, settings, out=out, resume=resume, watchers=watchers, asked=asked)
    if result.eager and on.type == "cuda":
        note(f"steps were launched one by one: {result.eager}")
    loop.save(model, source, settings, result, out, {"machine": facts.machine(model)})
    return {
        "mixers": ", ".join(settings.model["mixers"]),
        "parameters": f"{model.num_parameters():,}",
        "steps": result.step,
        "ended": result.ended,
        "loss": result.losses[-1],
        "held-out loss": result.final.get("loss"),
        "accuracy": result.final.get("accuracy"),
        "seconds": round(result.seconds, 2),
        "folder": str(out),
    }


def _of_checkpoint(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`; none where there is no checkpoint."""
    from regard.train import checkpoint

    found = checkpoint.latest(out)
    return dict(checkpoint.look(found)["settings"]) if found else {}


def _merged(words: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`words` with `more`; names within `model` and `task_settings` are merged one by one."""
    merged = dict(words)
    for name, value in more.items():
        inside = name in ("model", "task_settings") and isinstance(value, Mapping)
        merged[name] = {**merged.get(name, {}), **value} if inside else value
    return merged


def _setting(written: str) -> tuple[str, Any]:
    """`name=value`, the value read as YAML reads a word or a number."""
    name, equals, value = written.partition("=")
    if not equals or not name.strip():
        raise RegardError(f"--set {written!r} has not the form NAME=VALUE, such as beta2=0.99")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def _placed(name: str, value: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """Where setting `name` belongs: training, the task of `words`, or the model."""
    from regard.measure.tasks.task import known
    from regard.train.settings import Settings

    training = [one.name for one in dataclasses.fields(Settings) if one.default is not dataclasses.MISSING]
    kind = known().get(words.get("task", ""))
    of_task = [one.name for one in dataclasses.fields(kind)] if kind else []
    choose("setting", name, {*training, *of_task, *MODEL})
    if name in training:
        return {name: value}
    return {"task_settings" if name in of_task else "model": {name: value}}


def _described(model: Mapping[str, Any]) -> dict[str, Any]:
    """`model` with every layer's mixer named, and nothing left out that has a default here."""
    for name in model:
        choose("setting of the model", name, {*MODEL, "mixers", "layers"})
    if not model.get("mixers"):
        raise RegardError("name the model's mixers, such as --mixers kda:3,softmax")
    written, count = model["mixers"], model.get("layers")
    named = [name for part in written.split(",") for name in _repeated(part)] if isinstance(written, str) else written
    layers = len(named) if count is None else count
    if not isinstance(written, str) and layers != len(named):
        raise RegardError(f"{len(named)} mixers are named for {layers} layers")
    width = model.get("width", 256)
    rest = {name: value for name, value in model.items() if name not in ("mixers", "layers")}
    cycle = [named[layer % len(named)] for layer in range(layers)]
    return {"mixers": cycle, "width": width, "heads": max(1, width // 64)} | rest


def _repeated(part: str) -> list[str]:
    """`kda:3` is `kda`, three times."""
    name, colon, count = part.strip().partition(":")
    if colon and not (count.isdecimal() and int(count)):
        raise RegardError(f"mixers {part.strip()!r} has not the form NAME:COUNT, such as kda:3")
    return [name] * (int(count) if colon else 1)


def _model(described: Mapping[str, Any], vocabulary: int, length: int) -> Any:
    from regard.models.hybrid import HybridConfig, HybridForCausalLM

    words = {MODEL.get(name, name): value for name, value in described.items()}
    return HybridForCausalLM(HybridConfig(vocab_size=vocabulary, max_position_embeddings=length, **words))


def _device(name: str | None) -> Any:
    import torch

    try:
        return torch.empty(0, device=name or "cpu").device
    except (RuntimeError, AssertionError) as error:  # torch: no such device, or built without it
        raise RegardError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether somebody pressed Ctrl-C; the second time ends the program at once."""
    pressed = []

    def press(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
