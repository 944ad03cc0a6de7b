"""A second branch of every request: another prompt, its own cache, the same tokens after it."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import Branch, StoreCache, eager
from regard.adapters.families import Decoder
from regard.adapters.requests import Requests
from regard.adapters.seam import named
from regard.core.errors import RegardError
from regard.core.slots import Contrast
from regard.core.step import Step

# What inputs that are not text are called, or parts of their names (transformers' own, encoded ones too).
_FOREIGN = ("inputs_embeds", "pixel_values", "input_features", "encoder_outputs")


@dataclass(eq=False)
class _Forward:
    """The forward that runs: what it was given, and what is put into the cache's branch once it is through.

    Args:
        given: arguments of the language model, by name.
        new: the branch that begins with this forward.
        ids: all tokens of the request `[B, n]`, this forward's too.
    """

    given: dict[str, Any]
    step: Step | None = None
    cache: StoreCache | None = None
    ids: Tensor | None = None
    new: dict[str, Any] = field(default_factory=dict)


class Branches:
    """Feeds the branch of a request what the request is fed, and combines the logits of both.

    The branch begins when the prompt is complete, and lives in the request's cache: it is reordered, cropped,
    counted and dropped with it. A new prompt on the same cache (another turn) begins it anew. Where the end of the
    prompt is not known, nothing is combined. All checks come before the forward they speak of.

    Args:
        contrast: makes the branch's prompt, and combines logits.
        decoder: the opened model.
        requests: of the attached model.
    """

    def __init__(self, contrast: Contrast, decoder: Decoder, requests: Requests):
        self._contrast, self._decoder, self._requests = contrast, decoder, requests
        self._explicit: tuple[Tensor, Tensor] | None = None
        self._forward: _Forward | None = None
        self._inside = False

    @contextmanager
    def giving(self, ids: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Branches that begin inside read the prompt `ids [B, N]`, padded on the left as `mask [B, N]` says.

        Raises:
            RegardError: what `ids` or `mask` is, or lacks.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise RegardError(f"a branch prompt must be token ids [rows, tokens], got {found}")
        mask = torch.ones_like(ids) if mask is None else mask
        self._check(ids, mask, 0)
        before, self._explicit = self._explicit, (ids, mask)
        try:
            yield
        finally:
            self._explicit = before

    @eager
    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the language model: remembers its tokens, which its decoder may not be shown.

        Raises:
            RegardError: it is given embeddings or images in place of tokens.
        """
        if self._inside:
            return
        given = named(module, args, kwargs)
        # A request of text alone may bring an empty dict of encoded images.
        brought = [name for name, x in given.items() if x is not None and not (isinstance(x, dict) and not x)]
        foreign = [name for name in brought if any(part in name for part in _FOREIGN)]
        if foreign or not isinstance(given.get("input_ids"), Tensor):
            what = " and ".join(foreign) or "no input_ids"
            raise RegardError(f"{self._name} reads prompts of tokens alone; this forward brings {what}")
        self._forward = _Forward(given)

    @eager
    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the decoder, when the request is known: makes and checks the branch's prompt.

        Raises:
            RegardError: the branch cannot be run beside this forward, which has not begun.
        """
        forward, step, cache = self._forward, self._requests.step, self._requests.cache
        if self._inside or forward is None:
            return
        assert step is not None
        assert cache is not None
        new = forward.given["input_ids"]
        branch = cache.branch or Branch(new[:, :0])
        if branch.ids.shape[1] < step.start:
            raise RegardError(
                f"{self._name} needs every token of a request; of the {step.start} before this forward it saw "
                f"{branch.ids.shape[1]}: the others went to the decoder alone, or were fed while it was detached"
            )
        if branch.ids.shape[1] > step.start:
            branch.crop(step.start)
        ids = torch.cat((branch.ids.to(new.device), new), dim=1)
        prompt = step.prompt
        if self._explicit is not None and branch.prompt != prompt:
            self._spread(self._explicit[0], step.batch)
        if prompt is not None and step.stop >= prompt:
            self._refuse(forward.given)
            if branch.prompt != prompt:
                forward.new = self._prompt(ids[:, :prompt], step, prompt)
            self._fits(forward.new.get("longest", branch.longest), step.stop - prompt)
        forward.step, forward.cache, forward.ids = step, cache, ids

    @eager
    def combine(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Forward hook of the language model: its output with the logits of both branches combined."""
        if self._inside:
            return out
        forward, self._forward = self._forward, None
        # A forward that failed comes here too, without an output.
        if out is None or forward is None or forward.step is None or forward.cache is None or forward.ids is None:
            return out
        branch = forward.cache.branch = forward.cache.branch or Branch(forward.ids)
        branch.ids = forward.ids
        for name, value in forward.new.items():
            setattr(branch, name, value)
        step = forward.step
        if step.prompt is None or step.stop < step.prompt:
            return out
        first = max(step.start, step.prompt - 1)
        other = self._read(module, branch, step.stop - first, forward.cache.recording)
        logits = out[0] if isinstance(out, tuple) else out.logits
        mixed = self._mixed(logits, other, _arrivals(step, forward.given, logits.device), first)
        if isinstance(out, tuple):
            return (mixed, *out[1:])
        out.logits = mixed
        return out

    def _mixed(self, logits: Tensor, other: Tensor, arrivals: Tensor, first: int) -> Tensor:
        """`logits [B, n, V]` of `arrivals [n]`, those from `first` on combined with `other [B, m, V]`."""
        at = (arrivals >= first).nonzero()[:, 0]
        other = other.to(logits.device).index_select(1, arrivals[at] - first)
        mixed = self._contrast.combine(logits.index_select(1, at), other)
        return mixed if len(at) == len(arrivals) else logits.index_copy(1, at, mixed)

    def _read(self, module: nn.Module, branch: Branch, rows: int, recording: bool) -> Tensor:
        """Feed the branch what it has not read yet; logits `[B, rows, V]` of its last rows."""
        assert branch.own is not None
        if branch.cache is None:
            branch.cache = self._requests.fresh()
            if recording:
                branch.cache.activate_past_recording()
        tokens, held = branch.tokens, int(branch.cache.get_seq_length())
        positions = self._positions(branch)
        keeps = "logits_to_keep" in inspect.signature(type(module).forward).parameters
        self._inside = True
        try:
            with self._requests.aside(branch.own.shape[1]):
                out = module(
                    input_ids=tokens[:, held:],
                    attention_mask=branch.mask,
                    position_ids=positions[..., held:],
                    past_key_values=branch.cache,
                    use_cache=True,
                    return_dict=True,
                    **({"logits_to_keep": rows} if keeps else {}),
                )
        except BaseException:
            # Some layers have read the tokens and others have not.
            branch.cache = None
            raise
        finally:
            self._inside = False
        return out.logits[:, -rows:]

    def _prompt(self, ids: Tensor, step: Step, prompt: int) -> dict[str, Any]:
        """What a branch beginning behind the request's prompt `ids [B, prompt]` holds.

        Raises:
            RegardError: its prompt is empty, too long, or has tokens the model does not know.
        """
        real = step.positions(torch.arange(prompt, device=ids.device)) >= 0
        mask = real.expand(ids.shape).long()
        if self._explicit is None:
            own, own_mask = self._contrast.branch(ids, mask)
        else:
            own, own_mask = (self._spread(x, step.batch).to(ids.device) for x in self._explicit)
        self._check(own, own_mask, step.stop - prompt)
        same = [r for r in range(len(ids)) if torch.equal(own[r][own_mask[r].bool()], ids[r][mask[r].bool()])]
        if same:
            rows = "" if len(same) == len(ids) else f" in rows {', '.join(map(str, same))}"
            text = f"both branches of {self._name} read the same prompt{rows}: nothing is contrasted"
            warnings.warn(text, stacklevel=2)
        own, counts = own.to(ids.dtype), own_mask.long().sum(1)
        padding = own.shape[1] - counts
        return {
            "prompt": prompt,
            "own": own,
            "padding": padding if bool(padding.any()) else None,
            "longest": int(counts.max()),
            "cache": None,
        }

    def _spread(self, given: Tensor, batch: int) -> Tensor:
        """`given [rows, N]` as the rows of a forward: `generate` repeats each for its beams or sequences.

        Raises:
            RegardError: these are other rows.
        """
        rows, asked = given.shape[0], self._requests.rows or batch
        if rows != asked or batch % rows:
            raise RegardError(f"the branch prompt has {rows} rows, the request {asked}")
        return given.repeat_interleave(batch // rows, dim=0)

    def _check(self, ids: Tensor, mask: Tensor, more: int) -> None:
        """Raise unless `ids`, `mask [B, N]` are a prompt of this model with room for `more` tokens."""
        what = f"the branch prompt of {self._name}"
        if mask.shape != ids.shape:
            raise RegardError(f"{what} has shape {list(ids.shape)}, and its mask {list(mask.shape)}")
        real = mask.bool()
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise RegardError(f"the mask of {what} hides tokens behind visible ones; pad prompts on the left")
        lengths = real.sum(1)
        if not ids.numel() or not bool((lengths > 0).all()):
            empty = lengths.argmin().item() if len(lengths) else 0
            raise RegardError(f"{what} is empty: row {empty} has 0 tokens")
        self._fits(int(lengths.max()), more)
        known, seen = self._decoder.vocabulary, ids[real]
        if bool(((seen < 0) | (seen >= known)).any()):
            bad = seen[(seen < 0) | (seen >= known)][0].item()
            raise RegardError(f"{what} has token {bad}; this model knows ids 0 to {known - 1}")

    def _fits(self, prompt: int, more: int) -> None:
        most = getattr(self._decoder.config, "max_position_embeddings", None)
        if most is not None and prompt + more > most:
            then = f", and {more} more with what follows it" if more else ""
            raise RegardError(
                f"the branch prompt of {self._name} has {prompt} tokens{then}; this model's context is {most} "
                "(max_position_embeddings)"
            )

    def _refuse(self, given: dict[str, Any]) -> None:
        if given.get("labels") is not None:
            raise RegardError(f"a loss is taken before {self._name} combines logits; take it from output.logits")
        if self._requests.marked:
            raise RegardError(f"marks name rows of the prompt that is given; the branch of {self._name} has another")

    def _positions(self, branch: Branch) -> Tensor:
        """`[B, m]` of all the branch's tokens, or `[3, B, m]` where a model counts time, height and width."""
        positions = torch.arange(branch.tokens.shape[1], device=branch.ids.device).expand(branch.tokens.shape)
        if branch.padding is not None:
            positions = (positions - branch.padding[:, None]).clamp(min=0)
        rope = getattr(self._decoder.config, "rope_parameters", None) or {}
        return positions.expand(3, *positions.shape) if "mrope_section" in rope else positions

    @property
    def _name(self) -> str:
        return repr(self._contrast.name)


def _arrivals(step: Step, given: dict[str, Any], device: torch.device) -> Tensor:
    """Arrivals of the rows whose logits a forward returns, `[n]`: `logits_to_keep` last ones, or those it lists."""
    keep = given.get("logits_to_keep", 0)
    kept = keep.to(device) if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
    return torch.arange(step.start, step.stop, device=device)[kept]
