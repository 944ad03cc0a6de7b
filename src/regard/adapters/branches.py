"""Branches of every request: other prompts, images, weights or exits; caches of their own, the same tokens."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import Branch, Fork, StoreCache, eager
from regard.adapters.exits import Exits
from regard.adapters.families import Decoder
from regard.adapters.requests import Requests
from regard.adapters.seam import Surgery, named
from regard.adapters.sights import Sights
from regard.core.errors import RegardError
from regard.core.slots import BranchSpec, Contrast
from regard.core.step import Step
from regard.ops.branching import packed

# What inputs are called, or parts of their names, that branches are not given (transformers' own, encoded ones too).
_FOREIGN = ("inputs_embeds", "pixel_values", "input_features", "encoder_outputs")


@dataclass(eq=False)
class _Forward:
    """The forward that runs: what it was given, and the request's branches as they are once it is through.

    Args:
        given: arguments of the language model, by name.
        brings: whether images are among them.
        exits: layers whose logits stand behind the request's own in what it returns.
    """

    given: dict[str, Any]
    brings: bool
    exits: tuple[int, ...]
    step: Step | None = None
    cache: StoreCache | None = None
    fork: Fork | None = None


class Branches:
    """Feeds the branches of a request what the request is fed, and combines the logits of all.

    Branches begin when the prompt is complete, and live in the request's cache: they are reordered, cropped,
    counted and dropped with it. A new prompt on the same cache (another turn) begins them anew. Where the end of the
    prompt is not known, nothing is combined. All checks come before the forward they speak of.

    Args:
        contrast: says what the branches are, and combines logits.
        language: the language model.
        decoder: the opened model.
        requests: of the attached model.
    """

    def __init__(self, contrast: Contrast, language: nn.Module, decoder: Decoder, requests: Requests):
        self._contrast, self._decoder, self._requests = contrast, decoder, requests
        self._language, self._sights = language, Sights(language, decoder.module, contrast)
        self._exits = Exits(decoder)
        self._explicit: tuple[Tensor, Tensor] | None = None
        self._forward: _Forward | None = None
        self._inside = False

    def install(self, surgery: Surgery) -> None:
        """Put its hooks into the model, between those that begin and end a request's forward."""
        self._sights.open(surgery)
        language, module = self._language, self._decoder.module
        surgery.hook(language.register_forward_pre_hook(self._open, with_kwargs=True))
        surgery.hook(module.register_forward_pre_hook(self._begin, with_kwargs=True))
        surgery.hook(language.register_forward_hook(self._combine, with_kwargs=True, always_call=True))
        specs = (self._contrast, *self._contrast.branches)
        self._exits.install(surgery, {layer for spec in specs for layer in spec.exits})

    @contextmanager
    def giving(self, ids: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Branches that begin inside read the prompt `ids [B, N]`, padded on the left as `mask [B, N]` says.

        Raises:
            RegardError: what `ids` or `mask` is, or lacks; no branch has a prompt of its own.
        """
        if all(spec.prompt is None for spec in self._contrast.branches):
            raise RegardError(f"the branches of {self._name} read the request's own prompt; give them no other")
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

    @contextmanager
    def lending(self, thing: Any) -> Iterator[None]:
        """Inside, branches that need more than tokens use `thing`."""
        before, self._sights.lent = self._sights.lent, thing
        try:
            yield
        finally:
            self._sights.lent = before

    @eager
    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: remembers its tokens, which its decoder may not be shown.

        Raises:
            RegardError: it is given embeddings, a clip or sound.
        """
        if self._inside:
            return None
        given = named(module, args, kwargs)
        # A request of text alone may bring an empty dict of encoded images.
        brought = [name for name, x in given.items() if x is not None and not (isinstance(x, dict) and not x)]
        foreign = [name for name in brought if any(part in name for part in _FOREIGN)]
        images = [name for name in foreign if self._is_image(name, given[name])]
        if len(images) < len(foreign) or not isinstance(given.get("input_ids"), Tensor):
            what = " and ".join(name for name in foreign if name not in images) or "no input_ids"
            raise RegardError(f"branches of {self._name} read tokens and images; this forward brings {what}")
        # A loss is taken of the model's own rows.
        exits = self._contrast.exits if given.get("labels") is None else ()
        self._forward = _Forward(given, bool(images), exits)
        rows = self._requests.rows
        self._sights.times = max(1, given["input_ids"].shape[0] // rows) if rows else 1
        return self._exits.expect(module, exits, given, given.get("logits_to_keep", 0))

    def _is_image(self, name: str, value: Any) -> bool:
        if self._sights.token is None:
            return False
        return name == "pixel_values" or (name == "mm_encoder_outputs" and set(value) <= {"image"})

    @eager
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder, when the request is known: makes and checks the prompts of branches.

        Raises:
            RegardError: the branches cannot be run beside this forward, which has not begun.
        """
        forward, step, cache = self._forward, self._requests.step, self._requests.cache
        if self._inside or forward is None:
            return
        assert step is not None
        assert cache is not None
        new = forward.given["input_ids"]
        fork = cache.fork or Fork(new[:, :0])
        if fork.ids.shape[1] < step.start:
            raise RegardError(
                f"{self._name} needs every token of a request; of the {step.start} before this forward it saw "
                f"{fork.ids.shape[1]}: the others went to the decoder alone, or were fed while it was detached"
            )
        if fork.ids.shape[1] > step.start:
            fork.crop(step.start)
        # A forward that fails leaves the request's own as it was.
        fork = replace(fork, ids=torch.cat((fork.ids.to(new.device), new), dim=1), fresh=[*fork.fresh])
        fork.places = self._placed(fork, kwargs.get("position_ids"))
        self._sights.note(fork, forward.brings)
        prompt = step.prompt
        if self._explicit is not None and fork.prompt != prompt:
            self._spread(self._explicit[0], step.batch)
        if step.two_sided and self._contrast.branches:
            raise RegardError(
                f"{step.two_sided[0]} has tokens that see later ones, and prompts of branches of {self._name} have none"
            )
        if prompt is not None and step.stop >= prompt:
            self._refuse(forward.given)
            if fork.prompt != prompt:
                self._sights.resolve(fork, fork.ids[:, :prompt], self._requests.rows or step.batch)
                specs = enumerate(self._contrast.branches)
                fork.branches = [self._made(fork, index, spec, step, prompt) for index, spec in specs]
                fork.prompt = prompt
            for branch in fork.branches:
                self._fits(branch.longest, step.stop - prompt)
        forward.step, forward.cache, forward.fork = step, cache, fork

    @eager
    def _combine(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """After the language model: its output with the logits of all branches combined."""
        if self._inside:
            return out
        forward, self._forward = self._forward, None
        self._exits.forget()
        self._sights.times = 1
        # A forward that failed comes here too, without an output.
        if out is None or forward is None or forward.step is None or forward.cache is None or forward.fork is None:
            return out
        fork = forward.cache.fork = forward.fork
        step, logits = forward.step, out[0] if isinstance(out, tuple) else out.logits
        own = logits.chunk(1 + len(forward.exits), dim=1)
        mixed = own[0]
        if step.prompt is not None and step.stop >= step.prompt:
            first, others = max(step.start, step.prompt - 1), []
            for index, spec in enumerate(self._contrast.branches):
                others += self._read(module, fork, index, spec, step.stop - first, forward.cache.recording)
            mixed = self._mixed(own, others, _arrivals(step, forward.given, logits.device), first)
        if isinstance(out, tuple):
            return (mixed, *out[1:])
        out.logits = mixed
        return out

    def _mixed(self, own: Sequence[Tensor], others: Sequence[Tensor], arrivals: Tensor, first: int) -> Tensor:
        """`own [B, n, V]` of `arrivals [n]`, those from `first` on combined with `others [B, m, V]`."""
        at = (arrivals >= first).nonzero()[:, 0]
        z = [x.index_select(1, at) for x in own]
        z += [x.to(z[0].device).index_select(1, arrivals[at] - first) for x in others]
        mixed = self._contrast.combine(z)
        return mixed if len(at) == len(arrivals) else own[0].index_copy(1, at, mixed)

    def _read(
        self, module: nn.Module, fork: Fork, index: int, spec: BranchSpec, rows: int, recording: bool
    ) -> Sequence[Tensor]:
        """Feed branch `index` what it has not read yet; logits `[B, rows, V]` of its last rows, and of its exits."""
        branch = fork.branches[index]
        if branch.cache is None:
            branch.cache = self._requests.fresh()
            if recording:
                branch.cache.activate_past_recording()
        tokens, held = fork.tokens(branch), int(branch.cache.get_seq_length())
        given: dict[str, Any] = {
            "input_ids": tokens[:, held:],
            "attention_mask": _mask(branch, tokens),
            "position_ids": self._positions(fork, branch)[..., held:],
            "past_key_values": branch.cache,
            "use_cache": True,
            "return_dict": True,
        }
        names, around = inspect.signature(type(module).forward).parameters, spec.around
        if "logits_to_keep" in names:
            given["logits_to_keep"] = rows
        self._inside = True
        try:
            with (
                self._requests.aside(branch.own.shape[1]),
                nullcontext({}) if held else self._sights.showing(fork, index + 1) as images,
                nullcontext() if around is None else around(module, self._sights.lent),
            ):
                given |= {name: x for name, x in images.items() if name in names}
                changed = self._exits.expect(module, spec.exits, given, rows)
                out = module(**(given if changed is None else changed[1]))
        except BaseException:
            # Some layers have read the tokens and others have not.
            branch.cache = None
            raise
        finally:
            self._inside = False
            self._exits.forget()
        return [z[:, -rows:] for z in out.logits.chunk(1 + len(spec.exits), dim=1)]

    def _made(self, fork: Fork, index: int, spec: BranchSpec, step: Step, prompt: int) -> Branch:
        """Branch `index`, beginning behind the request's prompt.

        Raises:
            RegardError: its prompt is empty, too long, or has tokens the model does not know; it cannot run.
        """
        if spec.check is not None:
            spec.check(self._language, self._sights.lent)
        ids = fork.ids[:, :prompt]
        mask = (step.positions(torch.arange(prompt, device=ids.device)) >= 0).expand(ids.shape).long()
        own, own_mask = ids, mask
        if spec.prompt is not None:
            if self._explicit is None:
                own, own_mask = spec.prompt(ids, mask)
            else:
                own, own_mask = (self._spread(x, step.batch).to(ids.device) for x in self._explicit)
            self._check(own, own_mask, step.stop - prompt)
        if spec.prompt is not None and spec.view is None and spec.around is None:
            self._warn(ids, mask, own, own_mask)
        kept = self._sights.kept(fork, index + 1, own, own_mask.bool())
        if not torch.equal(kept, own_mask.bool()):
            own, own_mask = packed(own, kept)
        counts = own_mask.long().sum(1)
        padding = own.shape[1] - counts
        made = Branch(own.to(ids.dtype), padding if bool(padding.any()) else None, int(counts.max()))
        if fork.places is not None and any(fork.images) and not torch.equal(made.own, ids):
            raise RegardError(
                f"the branch of {self._name} moves tokens, and this model places those of images by height and width"
            )
        return made

    def _warn(self, ids: Tensor, mask: Tensor, own: Tensor, own_mask: Tensor) -> None:
        ids, mask, own, own_mask = (x.cpu() for x in (ids, mask, own, own_mask))
        same = [r for r in range(len(ids)) if torch.equal(own[r][own_mask[r].bool()], ids[r][mask[r].bool()])]
        if same:
            rows = "" if len(same) == len(ids) else f" in rows {', '.join(map(str, same))}"
            text = f"both branches of {self._name} read the same prompt{rows}: nothing is contrasted"
            warnings.warn(text, stacklevel=2)

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
        known, token = self._decoder.vocabulary, self._sights.token
        seen = ids[real] if token is None else ids[real & (ids != token)]
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
            raise RegardError(f"marks name rows of the prompt that is given; branches of {self._name} have their own")

    def _placed(self, fork: Fork, positions: Any) -> Tensor | None:
        """Positions of all tokens of `fork`, those of this forward too, where a model counts time, height and width."""
        if "mrope_section" not in (getattr(self._decoder.config, "rope_parameters", None) or {}):
            return None
        rows = fork.ids.shape[0]
        if not isinstance(positions, Tensor):
            return None
        positions = (
            positions.expand(positions.shape[0], rows, -1) if positions.ndim == 3 else positions.expand(3, rows, -1)
        )
        return positions if fork.places is None else torch.cat((fork.places, positions), dim=-1)

    def _positions(self, fork: Fork, branch: Branch) -> Tensor:
        """`[B, m]` of all the branch's tokens, or `[axes, B, m]` where a model counts time, height and width."""
        if fork.places is not None and any(fork.images):
            return fork.places
        tokens = fork.tokens(branch)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if branch.padding is not None:
            positions = (positions - branch.padding[:, None]).clamp(min=0)
        rope = getattr(self._decoder.config, "rope_parameters", None) or {}
        return positions.expand(3, *positions.shape) if "mrope_section" in rope else positions

    @property
    def _name(self) -> str:
        return repr(self._contrast.name)


def _mask(branch: Branch, tokens: Tensor) -> Tensor | None:
    """`[B, m]`, 0 where `tokens [B, m]` of `branch` are padding; None where no row is padded."""
    if branch.padding is None:
        return None
    return (torch.arange(tokens.shape[1], device=tokens.device) >= branch.padding[:, None]).long()


def _arrivals(step: Step, given: dict[str, Any], device: torch.device) -> Tensor:
    """Arrivals of the rows whose logits a forward returns, `[n]`: `logits_to_keep` last ones, or those it lists."""
    keep = given.get("logits_to_keep", 0)
    kept = keep.to(device) if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
    return torch.arange(step.start, step.stop, device=device)[kept]
