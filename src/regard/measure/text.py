"""Text to token windows: loading, tokenising, and splitting so that nothing is measured on what it was fitted to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError


@dataclass(frozen=True)
class Window:
    """A prompt and the real text that follows it.

    Args:
        start: index of the window's first token in the whole text.
        context: `[C]` int64, prefilled as prompt rows.
        continuation: `[N]` int64, fed teacher-forced as response rows.
    """

    start: int
    context: Tensor
    continuation: Tensor

    @property
    def length(self) -> int:
        """Tokens in the window, `C + N`."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Parts:
    """Disjoint stretches of one text, each `[n]` int64; `offsets` are their first tokens' indices.

    Mechanisms are fitted on `calibration`, searched on `choosing`, and measured again on `final`.
    """

    calibration: Tensor
    choosing: Tensor
    final: Tensor
    offsets: tuple[int, int, int]


def load(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        RegardError: the file is missing, a folder, not UTF-8, or holds nothing but white space.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RegardError(f"text file {str(path)!r} does not exist") from None
    except OSError as error:
        raise RegardError(f"text file {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RegardError(f"text file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise RegardError(f"text file {str(path)!r} is empty")
    return text


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """Token ids of `text`, `[n]` int64, without special tokens.

    Raises:
        RegardError: the text is empty.
    """
    if not text.strip():
        raise RegardError("the text is empty")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.as_tensor(ids, dtype=torch.int64)


def split(tokens: Tensor, choosing: int, final: int, calibration: int = 0) -> Parts:
    """Cut `tokens [n]` into calibration, choosing and final parts of at least the given sizes.

    What is left over is shared out: half of the text, if it can be spared, is for calibration.

    Raises:
        RegardError: the text is shorter than the three parts together.
    """
    total, need = len(tokens), calibration + choosing + final
    if total < need:
        raise RegardError(
            f"the text has {total} tokens; {need} are needed ({calibration} to calibrate, {choosing} to choose, "
            f"{final} to report). Give a longer text, or smaller windows"
        )
    held_out = max(choosing + final, min(total // 2, total - calibration))
    first = total - held_out
    second = first + (held_out * choosing // max(choosing + final, 1))
    return Parts(tokens[:first], tokens[first:second], tokens[second:], (0, first, second))


def windows(tokens: Tensor, context: int, continuation: int, count: int, offset: int = 0) -> list[Window]:
    """`count` disjoint windows spread evenly over `tokens [n]`; the last ends with the text.

    Args:
        tokens: the text, `[n]` int64.
        context: tokens of a window's first part, at least 1.
        continuation: tokens of its second part, at least 2.
        count: how many windows, at least 1.
        offset: added to each window's `start` (where `tokens` begins in a longer text).

    Raises:
        RegardError: a size is too small, or the text is shorter than the windows together.
    """
    if context < 1 or continuation < 2 or count < 1:
        raise RegardError(
            f"windows need context >= 1, continuation >= 2 and count >= 1, not {context}, {continuation}, {count}"
        )
    size, total = context + continuation, len(tokens)
    if total < size * count:
        what = "one window" if total < size else f"{count} windows"
        raise RegardError(
            f"the text has {total} tokens, too few for {what}: {size * count} are needed "
            f"({count} x ({context} context + {continuation} continuation))"
        )
    gap = (total - size * count) // max(count - 1, 1)
    starts = [i * (size + gap) for i in range(count)]
    return [Window(offset + s, tokens[s : s + context], tokens[s + context : s + size]) for s in starts]
