"""A second branch of every request: another prompt, its own cache, the same tokens after it."""

from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import Branch, StoreCache, eager
from regard.adapters.families import Decoder
from regard.adapters.requests import Requests
from regard.core.errors import RegardError
from regard.core.slots import Contrast
from regard.core.step import Step


class Branches:
    """Feeds the branch of a request what the request is fed, and combines the logits of both.

    The branch begins when the prompt is complete, and lives in the request's cache: it is reordered, cropped,
    counted and dropped with it. Where the end of the prompt is not known, nothing is combined.

    Args:
        contrast: makes the branch's prompt, and combines logits.
        decoder: the opened model.
        requests: of the attached model.
    """

    def __init__(self, contrast: Contrast, decoder: Decoder, requests: Requests):
        self._contrast, self._decoder, self._requests = contrast, decoder, requests
        self._inside = False
        self._step: Step | None = None
        self._cache: StoreCache | None = None

    def remember(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of the decoder: what the logits to come belong to."""
        if not self._inside:
            self._step, self._cache = self._requests.step, self._requests.cache

    @eager
    def combine(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Forward hook of the language model: its output with the logits of both branches combined.

        Raises:
            RegardError: the forward brings embeddings or images in place of tokens, or asks for a tuple.
        """
        if self._inside:
            return out
        step, cache, self._step, self._cache = self._step, self._cache, None, None
        if step is None or cache is None or out is None:
            return out
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or kwargs.get("pixel_values") is not None:
            raise RegardError(f"{self._contrast.name} needs the request's tokens; embeddings and images are not opened")
        if not hasattr(out, "logits"):
            raise RegardError(f"{self._contrast.name} edits output.logits; call the model with return_dict=True")
        branch = cache.branch
        if branch is None:
            branch = cache.branch = Branch(ids)
        else:
            branch.ids = torch.cat((branch.ids[:, : step.start].to(ids.device), ids), dim=1)
        if step.prompt is None or step.stop < step.prompt:
            return out
        other = self._read(module, branch, step)
        rows = min(other.shape[1], out.logits.shape[1])
        logits = self._contrast.combine(out.logits[:, -rows:], other[:, -rows:])
        out.logits = torch.cat((out.logits[:, :-rows], logits), dim=1)
        return out

    def _read(self, module: nn.Module, branch: Branch, step: Step) -> Tensor:
        """The branch's logits of the last prompt row, if it is among this forward's, and of its response rows."""
        prompt = step.prompt
        assert prompt is not None
        if branch.cache is None or branch.prompt != prompt:
            own, mask = self._begin(branch, step, prompt)
            branch.cache, branch.prompt = None, prompt
            new = branch.ids[:, prompt:]
            given, keep = torch.cat((own, new), dim=1), 1 + new.shape[1]
            branch.mask = torch.cat((mask, mask.new_ones(new.shape)), dim=1)
        else:
            assert branch.mask is not None
            given = branch.ids[:, step.start :]
            keep = given.shape[1]
            branch.mask = torch.cat((branch.mask, branch.mask.new_ones(given.shape)), dim=1)
        length = branch.mask.shape[1] - (branch.ids.shape[1] - prompt)
        self._inside = True
        try:
            with self._requests.prompting(length):
                out = module(
                    input_ids=given,
                    attention_mask=branch.mask,
                    position_ids=self._positions(branch.mask)[..., -given.shape[1] :],
                    past_key_values=branch.cache,
                    use_cache=True,
                )
        finally:
            self._inside = False
        branch.cache = out.past_key_values
        # It is counted with the request's cache.
        self._requests.caches.discard(branch.cache)
        return out.logits[:, -keep:]

    def _begin(self, branch: Branch, step: Step, prompt: int) -> tuple[Tensor, Tensor]:
        """The branch's own prompt and its mask, `[B, N]` each.

        Raises:
            RegardError: it is empty, or longer than the model's context.
        """
        ids = branch.ids[:, :prompt]
        mask = (step.positions(torch.arange(prompt, device=ids.device)) >= 0).expand(ids.shape).long()
        own, own_mask = self._contrast.branch(ids, mask)
        most = getattr(self._decoder.config, "max_position_embeddings", None)
        if not bool(own_mask.any(1).all()):
            raise RegardError(f"the branch prompt of {self._contrast.name} is empty")
        if most is not None and own.shape[1] > most:
            raise RegardError(
                f"the branch prompt of {self._contrast.name} has {own.shape[1]} tokens, more than the model's {most}"
            )
        return own, own_mask

    def _positions(self, mask: Tensor) -> Tensor:
        """`[B, m]`, or `[3, B, m]` where a model counts time, height and width."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rope = getattr(self._decoder.config, "rope_parameters", None) or {}
        return positions.expand(3, *positions.shape) if "mrope_section" in rope else positions
