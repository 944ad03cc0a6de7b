"""A decoder described by a list of mixers, one a layer: recurrent, softmax attention, or any mix of them.

It is a transformers model: `generate`, `save_pretrained`, `from_pretrained` and Trainer work as on any other, and
`register()` makes Auto classes know it. Layouts follow [133] and [089], the TransNormerLLM preset [003], the frame
without feed-forward parts [153].
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from regard.core.errors import RegardError
from regard.layers import mixers as kinds
from regard.layers.blocks.heads import Output, linear
from regard.layers.blocks.norms import norm, wide
from regard.models import layouts
from regard.models.hybrid_cache import NO_DRAFTS, HybridCache
from regard.models.hybrid_config import HybridConfig
from regard.primitives.gates import lower_bounds

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "HybridModel", "register"]


class MLP(nn.Module):
    """`W_down(act(W_gate x) * W_up x)`, with SiLU (SwiGLU) or nothing (SGLU) for act."""

    def __init__(self, width: int, inner: int, kind: str):
        super().__init__()
        self.kind = kind
        self.gate, self.up = linear(width, inner), linear(width, inner)
        self.down = Output(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to `[..., width]`."""
        gate = self.gate(x)
        return self.down((F.silu(gate) if self.kind == "swiglu" else gate) * self.up(x))


class HybridLayer(GradientCheckpointingLayer):
    """One layer: `x += mixer(norm x)`, then `x += mlp(norm x)` if it has one. The mixer is named by its stem."""

    def __init__(self, config: HybridConfig, layer: int):
        super().__init__()
        assert config.mixers is not None
        assert config.mixer_options is not None
        width, self.stem = config.hidden_size, config.mixers[layer]
        options = config.mixer_options.get(self.stem, {})
        self.norm = norm(config.norm, width, config.norm_eps)
        made = kinds.build(
            self.stem, width, config.num_attention_heads, layer=layer, layers=len(config.mixers), options=options
        )
        self.add_module(self.stem, made)
        self.mlp = self.mlp_norm = None
        if config.mlp != "none":
            assert config.intermediate_size is not None
            self.mlp_norm = norm(config.norm, width, config.norm_eps)
            self.mlp = MLP(width, config.intermediate_size, config.mlp)

    @property
    def mixer(self) -> nn.Module:
        """Its mixer."""
        return self.get_submodule(self.stem)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """`x [B, T, width]`; `call` is what its mixer takes."""
        x = x + self.mixer(self.norm(x), **call)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))


class HybridPreTrainedModel(PreTrainedModel):
    """Weights, their start, and the layout they belong to."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of `initializer_range`, smaller ones for outputs; gates as their mixers say."""
        std = self.config.initializer_range
        if isinstance(module, Output):
            std /= math.sqrt(2 * len(self.config.mixers or ()))
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            init.zeros_(module.bias)
        initial: Any = getattr(module, "initial", dict)
        for name, value in initial().items():
            init.copy_(module.get_parameter(name), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As for every transformers model.

        Raises:
            RegardError: `config` (or `mixers`) is of another layout than the checkpoint; the layer is named.
        """
        wanted = config.mixers if isinstance(config, HybridConfig) else kwargs.get("mixers")
        if wanted is not None:
            keep = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
            where = {key: kwargs[key] for key in keep if key in kwargs}
            saved = HybridConfig.from_pretrained(pretrained_model_name_or_path, **where)
            layouts.same(wanted, saved.mixers or (), f"checkpoint {str(pretrained_model_name_or_path)!r}")
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


class HybridModel(HybridPreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        assert config.mixers is not None
        width, count = config.hidden_size, len(config.mixers)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(HybridLayer(config, layer) for layer in range(count))
        self.norm = norm(config.norm, width, config.norm_eps)
        sizes = {of.stem: getattr(of.mixer, "bound_size", 0) for of in self._layers()}
        self.bounds = LowerBounds(count, {stem: size for stem, size in sizes.items() if size})
        self.post_init()

    def _layers(self) -> list[HybridLayer]:
        return [layer for layer in self.layers if isinstance(layer, HybridLayer)]

    def cache(self) -> HybridCache:
        """An empty cache for this model."""
        of = self._layers()
        return HybridCache([one.stem for one in of], [getattr(one.mixer, "window", None) for one in of])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The residual stream after the last norm, `[B, T, width]`; arguments as `HybridForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise RegardError("pass input_ids [B, T] or inputs_embeds [B, T, width], one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache, cu_seqlens)
        seen = 0 if cache is None else cache.seen
        mask = _mask(attention_mask, x.shape[0], seen + x.shape[1])
        x = self._embed(x, seen, mask, position_ids, cu_seqlens)
        states, kept = self.bounds(), []
        for number, layer in enumerate(self._layers()):
            if output_hidden_states:
                kept.append(x)
            call: dict[str, Any] = {"cu_seqlens": cu_seqlens, "mask": mask}
            if mask is not None and kinds.holds(layer.stem) == "state":
                call["mask"] = mask[:, seen:]
            if layer.stem in states:
                call["bound"] = states[layer.stem][number]
            x = layer(x, memory=None if cache is None else cache.memory(number), **call)
        x = self.norm(x)
        if cache is not None:
            cache.advance(x.shape[1])
        hidden = (*kept, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=hidden)

    def _cache(self, given: Any, use_cache: bool | None, cu_seqlens: Tensor | None) -> HybridCache | None:
        """The cache to go on with, a new one, or None."""
        # A layer that is run again for its gradient would write twice.
        again = self.training and any(layer.gradient_checkpointing for layer in self._layers())
        if given is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training and cu_seqlens is None
            return self.cache() if use_cache and not again else None
        if not isinstance(given, HybridCache):
            raise RegardError(
                f"past_key_values must be a HybridCache (model.cache()), got {type(given).__name__}: a recurrent "
                "layer has no keys and values"
            )
        layouts.same(self.config.mixers or (), given.mixers, "past_key_values")
        if again:
            raise RegardError("past_key_values cannot be written under gradient checkpointing; leave them out")
        return given

    def _embed(
        self, x: Tensor, seen: int, mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.embed_positions is None:
            return self.dropout(x)
        tokens, most = x.shape[1], self.config.max_position_embeddings
        if seen + tokens > most and cu_seqlens is None:
            raise RegardError(f"{seen + tokens} tokens, but positions are learned up to {most}")
        at = position_ids
        if at is None and cu_seqlens is not None:
            here = torch.arange(tokens, device=x.device)
            at = (here - cu_seqlens[torch.searchsorted(cu_seqlens, here, right=True) - 1])[None]
        elif at is None and mask is not None:
            at = (mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        elif at is None:
            at = torch.arange(seen, seen + tokens, device=x.device)[None]
        return self.dropout(x + self.embed_positions(at))


class LowerBounds(nn.Module):
    """Lower bounds of forget gates, learned over all layers: `cumsum(softmax(p)) - first`, 0 in layer 0 (HGRN, [133]).

    Args:
        layers: of the decoder.
        sizes: channels of the gate, per stem that has bounds.
    """

    def __init__(self, layers: int, sizes: dict[str, int]):
        super().__init__()
        self.raw = nn.ParameterDict({stem: nn.Parameter(torch.zeros(layers, size)) for stem, size in sizes.items()})

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters: zeros."""
        return {f"raw.{stem}": torch.zeros_like(raw, device="cpu") for stem, raw in self.raw.items()}

    def forward(self) -> dict[str, Tensor]:
        """Per stem, the bound of every layer, `[layers, size]` in float32, in [0, 1)."""
        return {stem: lower_bounds(wide(raw)) for stem, raw in self.raw.items()}


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """A language model of mixers: `HybridModel` with a head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = any(kinds.holds(stem) == "state" for stem in config.mixers or ())
        self.register_load_state_dict_pre_hook(_same_layout)
        self.post_init()

    def cache(self) -> HybridCache:
        """An empty cache for this model."""
        return self.model.cache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits `[B, T, vocab]`, and the loss where labels are given.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, seen + T]`, 0 at padding, on either side.
            position_ids: `[1|B, T]`, read by learned positions only; mixers turn by distance, and count themselves.
            past_key_values: a `HybridCache` to go on with.
            inputs_embeds: `[B, T, width]`, in place of `input_ids`.
            labels: `[B, T]`, -100 where there is none; the label of a token is the next one's, as in transformers.
                `shift_labels` in its place is read as it stands (the label of a token is its own).
            use_cache: None: as the config says, and never while training or for packed sequences.
            output_hidden_states: return the residual stream before each layer and after the last norm.
            cu_seqlens: `[N + 1]`, packed sequences in one row (see `regard.scan`).
            logits_to_keep: the last so many tokens get logits (0: all), or those numbered in a tensor.
            return_dict: False: a tuple.
            **kwargs: of the loss: `shift_labels`, `num_items_in_batch`.

        Raises:
            RegardError: arguments that do not go together, or a cache of another layout.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
        )
        x = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        made = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return made.to_tuple() if return_dict is False else made

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION and self._is_stateful:
            raise RegardError(NO_DRAFTS)
        super()._validate_generation_mode(generation_mode, generation_config, *args)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise RegardError(f"cache_implementation {kind!r} does not hold recurrent states; leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.cache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]


def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know hybrid models; calling it again does nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
    AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


def _mask(given: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """`[B, seen + T]` bool, None where no token is padding."""
    if given is None:
        return None
    if given.dim() != 2 or given.shape != (rows, tokens):
        raise RegardError(f"attention_mask must be [{rows}, {tokens}] (all tokens so far), got {list(given.shape)}")
    mask = given.bool()
    return None if bool(mask.all()) else mask


def _same_layout(model: "HybridForCausalLM", state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Refuse weights of another layout before any is copied: layers carry the names of their mixers."""
    known, found = set(kinds.names()), {}
    for key in state:
        parts = key.removeprefix(prefix).split(".")
        if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[3] in known:
            found[int(parts[2])] = parts[3]
    if found and sorted(found) == list(range(len(found))):
        layouts.same(model.config.mixers or (), [found[i] for i in range(len(found))], "the weights")
