"""What the commands that run a model share: their options, and opening what the user named."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.core.errors import RegardError, choose

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or 'demo'.")]
RecipeFile = Annotated[Path, typer.Option("--recipe", metavar="FILE", help="A recipe.yaml.", dir_okay=False)]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; left out, `demo` reads Python's manual.")
]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out, as the model was saved.")]

_DTYPES = ("float32", "bfloat16", "float16")


def open_model(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model and tokenizer called `name`, loaded without transformers' own chatter.

    Raises:
        RegardError: no such model, device or dtype.
    """
    import logging as python_logging

    import torch
    from transformers.utils import logging

    from regard.models.pretrained import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.getLogger("huggingface_hub").setLevel(python_logging.ERROR)
    kind = getattr(torch, choose("dtype", dtype, _DTYPES)) if dtype else None
    try:
        place = torch.device(device) if device else None
        return load(name, kind, place)
    except RegardError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch: no such device, or built without it
        raise RegardError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def open_text(model: str, path: Path | None) -> str:
    """The text to measure on: the file, or the demo text for the demo model.

    Raises:
        RegardError: no file was named for another model; it is missing, empty or not UTF-8.
    """
    from regard.measure.text import load
    from regard.models.pretrained import DEMO, demo_text

    if path is not None:
        return load(path)
    if model != DEMO:
        raise RegardError(f"no text to read with {model!r}: name a UTF-8 file with --text FILE")
    return demo_text()
