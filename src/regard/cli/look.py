"""`regard look`: what the attention of a model does on a prompt, as one page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Device, Dtype, Model, TextFile, open_model
from regard.cli.output import Json, note, print_json
from regard.cli.prompts import Asked, Images, Prompt, Raw, ask, with_text
from regard.core.errors import RegardError

Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the page goes.", dir_okay=False)]
Size = Annotated[int, typer.Option(min=1, help="Tiles a side of a head's map, at most; what is longer is summed up.")]
Tokens = Annotated[
    str | None,
    typer.Option(metavar="START:STOP", help="Read the rows of these tokens alone, such as -64: for the last 64."),
]
Answer = Annotated[int, typer.Option("--max-new-tokens", min=0, help="Answer first, and look at that many tokens too.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("look")(look)


def look(
    model: Model,
    prompt: Prompt,
    image: Images = None,
    text: TextFile = None,
    out: Out = Path("look.html"),
    size: Size = 128,
    tokens: Tokens = None,
    max_new_tokens: Answer = 0,
    raw: Raw = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Write a page on which every head of MODEL can be opened and read: what it looks at in a prompt.

    With --text, the file's text comes before the prompt. The page needs no network and has at most 8 MB.
    """
    from regard import observe
    from regard.models.pretrained import name_of
    from regard.observe import page

    if not out.parent.is_dir():
        raise RegardError(f"there is no folder {str(out.parent)!r} to write {out.name!r} to")
    network, tokenizer = open_model(model, device, dtype)
    asked = ask(model, network, tokenizer, with_text(text, prompt), image, raw)
    rows = _rows(tokens, asked.length + max_new_tokens) if tokens else None
    if max_new_tokens:
        asked = _answered(network, asked, max_new_tokens)
    names = page.spelled(tokenizer, asked.inputs["input_ids"][0].tolist())
    config = network.config.get_text_config()
    fits = page.side(config.num_hidden_layers * config.num_attention_heads, names, len(asked.images))
    record = observe.record(
        network,
        asked.inputs,
        tokens=asked.tokens,
        readings=("masses", "columns", "entropy", "maps", "sinks"),
        size=min(size, fits),
        rows=rows and (rows[0], min(rows[1], len(names))),
    )
    roles = _roles(network, record)
    html = page.render(record, names, model=name_of(network), roles=roles, images=asked.images)
    out.write_text(html, encoding="utf-8")
    layers, _, heads, down, across = record.maps.shape
    told = {"page": str(out), "bytes": len(html.encode()), "tokens": len(names), "layers": layers, "heads": heads}
    if json:
        print_json(told | {"tiles": [down, across], "roles": roles and {name: roles.of(name) for name in roles.scores}})
        return
    print(out)
    tiles = "one token each" if across == len(names) else f"{down} x {across} tiles a head"
    note(f"{len(names):,} tokens, {layers} x {heads} heads, {tiles}; {told['bytes']:,} bytes")


def _rows(written: str, length: int) -> tuple[int, int]:
    """`START:STOP` as Python slices `length` tokens."""
    start, colon, stop = written.partition(":")
    if not colon or not all(end.removeprefix("-").isdecimal() for end in (start, stop) if end):
        raise RegardError(f"--tokens {written!r} has not the form START:STOP, such as -64: or 10:20")
    ends = [int(end) if end else None for end in (start, stop)]
    first, last, _ = slice(*ends).indices(length)
    if first >= last:
        raise RegardError(f"--tokens {written!r} names none of {length} tokens")
    return first, last


def _roles(network: Any, record: Any) -> Any:
    """Roles of the heads, measured on shorter prompts where the vocabulary is small; None where it is too small."""
    from regard import observe
    from regard.core.token_map import Kind

    # The needle and special tokens are not of the haystack.
    haystack = min(256, network.config.get_text_config().vocab_size - 24)
    if haystack < 32:
        note("heads have no roles here: too few words in the vocabulary to measure them")
        return None
    seen = bool(record.tokens.of(Kind.VISUAL).any())
    return observe.roles(network, record=record if seen else None, length=min(64, haystack), haystack=haystack)


def _answered(network: Any, asked: Asked, length: int) -> Asked:
    """The request with the model's own answer behind it."""
    import torch

    from regard.core.token_map import TokenMap

    before = asked.inputs["input_ids"]
    ids = network.generate(**asked.inputs, max_new_tokens=length, do_sample=False)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, given in asked.inputs.items():
        # What says something of each token says 0, text, of the new ones.
        longer = isinstance(given, torch.Tensor) and given.shape == before.shape
        inputs.setdefault(
            name, torch.nn.functional.pad(given, (0, ids.shape[1] - before.shape[1])) if longer else given
        )
    kinds = asked.tokens.at(torch.arange(ids.shape[1])[None])
    return Asked(inputs, TokenMap(kinds, asked.tokens.spans), asked.images)
