"""`regard list` and `regard show`: what mechanisms there are. Needs no model and does not import torch."""

import json as json_
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

import typer

from regard import catalog
from regard.cli.output import Json, print_json, print_pairs, print_table
from regard.core.card import Option


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("list")(list_mechanisms)
    app.command("show")(show_mechanism)


def list_mechanisms(json: Json = False) -> None:
    """List the mechanisms: those that a recipe attaches, those that a model is trained with, those that are called."""
    found = catalog.entries()
    if json:
        print_json([_summary(name, entry) for name, entry in found.items()])
        return
    columns = ("mechanism", "site", "used by", "saves", "exact", "arXiv", "title")
    rows = [
        (name, entry.site, entry.used_by, entry.card.saving, entry.card.exact, entry.card.arxiv, entry.card.title)
        for name, entry in found.items()
    ]
    print_table(columns, rows)


def show_mechanism(
    stem: Annotated[str, typer.Argument(metavar="STEM", help="A mechanism, as `regard list` names it.")],
    json: Json = False,
) -> None:
    """Show one mechanism's card, its options, and on which families of models it runs, if it can be attached."""
    entry = catalog.find(stem)
    card = entry.card
    if json:
        told = {"stem": entry.stem, "site": entry.site, "verbs": entry.verbs, "attachable": entry.attachable}
        told["families"] = support(entry)
        print_json({**told, **asdict(card)})
        return
    facts: dict[str, Any] = {
        entry.stem: card.title,
        "site": f"{entry.site} ({', '.join(entry.verbs)})",
        "arXiv": card.arxiv,
        "implements": card.implements,
        "exact": card.exact,
        "saves": card.saving,
        "aliases": card.aliases,
        "neutral at": _options_text(card.neutral) if card.neutral is not None else None,
        "used by": entry.used_by,
        "families": _families(entry),
    }
    print_pairs(
        facts
        | {f"departure {n}": text for n, text in enumerate(card.departures, 1)}
        | {f"oracle {n}": text for n, text in enumerate(card.oracles, 1)}
    )
    if card.options:
        print()
        rows = [(name, o.kind, _default(o), legal(o), o.doc) for name, o in card.options.items()]
        print_table(("option", "kind", "default", "legal values", "meaning"), rows)


def support(entry: catalog.Entry) -> dict[str, str | None] | None:
    """Family -> why the card's example is refused there, None if it runs; None for all: it was never tried.

    `tools/map.py` tries them and writes the answers into the package.
    """
    known = json_.loads((files("regard") / "support.json").read_text(encoding="utf-8"))
    return known.get(entry.name, known.get(entry.stem))


def _families(entry: catalog.Entry) -> str:
    if entry.attachable and entry.card.needs == "pixels":
        return "models that see images (docs/design.md, section 9)"
    if entry.attachable:
        return families_text(support(entry))
    use = "`regard train` makes models with it" if entry.used_by == "training" else f"call `{entry.call}`"
    return f"none: {use}"


def families_text(answers: Mapping[str, str | None] | None) -> str:
    """On which families a mechanism runs, in words: `all 16`, or which refuse it and why."""
    if answers is None:
        return "not tried yet; `make docs` tries it on all"
    refused = defaultdict(list)
    for family, reason in answers.items():
        if reason is not None:
            refused[reason].append(family)
    if not refused:
        return f"all {len(answers)}"
    able = len(answers) - sum(map(len, refused.values()))
    parts = "; ".join(f"refused by {', '.join(names)}: {reason}" for reason, names in refused.items())
    return f"{able} of {len(answers)}; {parts}"


def legal(option: Option) -> str:
    """The legal values of an option, in words."""
    if option.choices:
        text = ", ".join(repr(c) if isinstance(c, str) else str(c) for c in option.choices)
    elif option.kind == "bool":
        text = "True, False"
    elif option.low is None and option.high is None:
        text = {"tensor": "fitted", "tokens": "token ids"}.get(option.kind, "any")
    elif option.high is None:
        text = f">= {option.low:g}"
    elif option.low is None:
        text = f"<= {option.high:g}"
    else:
        text = f"{option.low:g} to {option.high:g}"
    return f"{text} or none" if option.optional and option.kind != "tensor" else text


def _default(option: Option) -> str:
    return "none" if option.default is None else str(option.default)


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "its defaults"


def _summary(name: str, entry: catalog.Entry) -> dict[str, Any]:
    card = entry.card
    return {
        "name": name,
        "site": entry.site,
        "title": card.title,
        "arxiv": card.arxiv,
        "exact": card.exact,
        "saving": card.saving,
        "attachable": entry.attachable,
        "aliases": card.aliases,
        "options": sorted(card.options),
    }
