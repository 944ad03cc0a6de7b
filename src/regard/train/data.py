"""Rows to train on: a batch is a function of the seed and the step, so going on needs no place in them."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.measure import text as texts
from regard.measure.tasks.task import Rows, Task, build
from regard.train.settings import Settings

# The share of a text that is measured on and never trained on: its end.
HELD_OUT = 10
BYTES = 256
# Steps whose rows of a task are made at once.
BLOCK = 16


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Args:
        inputs: `[B, L]` int64.
        places: `[B, n]` int64, where an answer is asked; None: every token is to be predicted from those before it.
        answers: `[B, n]` int64, the right tokens, predicted at the place itself.
    """

    inputs: Tensor
    places: Tensor | None = None
    answers: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of: `Batch(*batch.tensors)`."""
        return tuple(x for x in (self.inputs, self.places, self.answers) if x is not None)

    def parts(self, count: int) -> list["Batch"]:
        """The rows in `count` parts."""
        return [Batch(*part) for part in zip(*(x.chunk(count) for x in self.tensors), strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`, on their way there: nothing waits for a GPU."""
        waits = device.type == "cuda" and self.inputs.device.type == "cpu"
        tensors = (x.pin_memory() for x in self.tensors) if waits else self.tensors
        return Batch(*(x.to(device, non_blocking=waits) for x in tensors))


class Source(Protocol):
    """Where batches come from.

    `vocabulary` is the number of different tokens, `tokenizer` what belongs to the saved model (or None), `about` what
    must be the same where a run goes on.
    """

    vocabulary: int
    tokenizer: Any
    about: dict[str, Any]

    def batch(self, step: int) -> Batch:
        """The rows of step `step`; the same ones whenever asked."""
        ...

    def held_out(self) -> Batch:
        """Rows that no step trains on."""
        ...


class TaskRows:
    """Fresh rows of a task for every step, made on `device`; another kind of device makes other rows."""

    tokenizer = None

    def __init__(self, task: Task, settings: Settings, device: torch.device | str = "cpu"):
        self.task, self.settings, self.vocabulary = task, settings, task.vocabulary
        self.device = torch.device(device)
        self.about = {"task": task.name, **vars(task)}

    def batch(self, step: int) -> Batch:
        """`settings.batch` new rows."""
        rows, place = self._block(step // BLOCK), step % BLOCK * self.settings.batch
        here = slice(place, place + self.settings.batch)
        return Batch(rows.inputs[here], rows.places[here], rows.answers[here])

    def held_out(self) -> Batch:
        """`settings.held_out` rows, the same for every seed."""
        rows = self.task.make(self.settings.held_out, stream(0, "held out", device=self.device))
        return Batch(rows.inputs, rows.places, rows.answers)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one source lives as long as its run)
    def _block(self, number: int) -> Rows:
        """The rows of `BLOCK` steps, made at once because that costs little more than making those of one."""
        generator = stream(self.settings.seed, "train", number, device=self.device)
        return self.task.make(BLOCK * self.settings.batch, generator)


class TextRows:
    """A text cut into rows, shuffled anew and cut elsewhere each time it has been read.

    Raises:
        RegardError: the text is too short for one row to train on and one to measure on.
    """

    def __init__(self, tokens: Tensor, vocabulary: int, settings: Settings, tokenizer: Any = None):
        self.settings, self.vocabulary, self.tokenizer = settings, vocabulary, tokenizer
        cut = len(tokens) - max(len(tokens) // HELD_OUT, settings.length)
        self.rows = (cut - settings.length + 1) // settings.length
        if self.rows < 1:
            raise RegardError(
                f"the text has {len(tokens)} tokens; rows of {settings.length} need at least "
                f"{3 * settings.length - 1}. Give a longer text, or a smaller length"
            )
        self.tokens, self.rest = tokens[:cut], tokens[cut:]
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
        self.about = {"tokens": len(tokens), "digest": digest, "vocabulary": vocabulary}

    def batch(self, step: int) -> Batch:
        """The next `settings.batch` rows of the shuffled text."""
        first, length, starts = step * self.settings.batch, self.settings.length, []
        for number in range(first, first + self.settings.batch):
            offset, order = self._reading(number // self.rows)
            starts.append(offset + order[number % self.rows] * length)
        return Batch(self.tokens.unfold(0, length, 1)[starts])

    @functools.lru_cache(maxsize=2)  # noqa: B019  (one source lives as long as its run)
    def _reading(self, number: int) -> tuple[int, list[int]]:
        """Where the first row begins in reading `number` of the text, and the order of the rows."""
        generator = stream(self.settings.seed, "reading", number)
        offset = int(torch.randint(self.settings.length, (), generator=generator))
        return offset, torch.randperm(self.rows, generator=generator).tolist()

    def held_out(self) -> Batch:
        """Up to `settings.held_out` disjoint rows spread over the text's end."""
        length = self.settings.length
        count = min(self.settings.held_out, len(self.rest) // length)
        gap = (len(self.rest) - count * length) // max(count - 1, 1)
        return Batch(torch.stack([self.rest[i * (length + gap) :][:length] for i in range(count)]))


def open_source(settings: Settings, device: torch.device | str = "cpu") -> Source:
    """The rows that `settings` ask for; those of a task are made on `device`, where they are needed.

    Raises:
        RegardError: no such file, tokenizer or task; a text too short; settings that the task refuses.
    """
    if settings.task:
        words = dict(settings.task_settings)
        if words.setdefault("length", settings.length) != settings.length:
            raise RegardError(f"length is {settings.length}, but task_settings say {words['length']}; say it once")
        return TaskRows(build(settings.task, **words), settings, device)
    said = texts.load(settings.text)
    if settings.tokenizer:
        tokenizer = _tokenizer(settings.tokenizer)
        return TextRows(texts.tokenise(tokenizer, said), len(tokenizer), settings, tokenizer)
    tokens = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8).long()
    return TextRows(tokens, BYTES, settings, byte_tokenizer())


def stream(seed: int, *words: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every seed and purpose."""
    told = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(told[:7], "little"))


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose tokens are the bytes of UTF-8: id = byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level tokenizers write a byte that cannot be printed as the next free character from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(BYTES + i) for i, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(BYTES)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RegardError(f"cannot load tokenizer {name!r} (a folder or a hub name): {why}") from error
