"""What a hybrid decoder is made of, as a transformers config."""

import difflib
import inspect
import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from regard.core.errors import RegardError, choose
from regard.layers import mixers as kinds
from regard.layers.blocks.norms import norm
from regard.models import layouts

MLPS = ("swiglu", "sglu", "none")
POSITIONS = ("none", "learned")


class HybridConfig(PreTrainedConfig):
    """What a `HybridForCausalLM` is made of.

    Args:
        mixers: the mixer of every layer, stems of `layers/states/` (see `models.layouts.ratio` and `layout`);
            None: `ratio("kda", 3)`.
        mixer_options: per stem, options of its `Mixer`; `heads` replaces `num_attention_heads`.
        intermediate_size: channels inside a feed-forward part; None: 8/3 of the width, up to a multiple of 32.
        mlp: `swiglu`, `sglu` (two products without activation, [003]) or `none` ([153]).
        norm: `rms`, `srms` (without weights, [003]) or `layer`.
        positions: `learned` adds a learned embedding of each absolute position (at most
            `max_position_embeddings`), `none` leaves positions to the mixers.
        embedding_scale: embeddings are multiplied by it.
        embedding_dropout: while training.
        initializer_range: standard deviation of weights; output projections start at `1 / sqrt(2 layers)` of it.

    Raises:
        RegardError: a list of the wrong length, an unknown mixer, option, MLP or norm; the nearest is named.
    """

    model_type = "regard_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int | None = None
    num_attention_heads: int = 4
    mixers: list[str] | None = None
    mixer_options: dict[str, dict[str, Any]] | None = None
    intermediate_size: int | None = None
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    positions: str = "none"
    max_position_embeddings: int = 2048
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers is None:
            self.num_hidden_layers = 4 if self.mixers is None else len(self.mixers)
        if self.mixers is None:
            self.mixers = layouts.ratio("kda", 3, layers=self.num_hidden_layers, recall=False)
        layouts.check(self.mixers, self.num_hidden_layers)
        self.mixers = list(self.mixers)
        self.mixer_options = {name: dict(options) for name, options in (self.mixer_options or {}).items()}
        for name, options in self.mixer_options.items():
            choose("mixer in mixer_options", name, self.mixers)
            kinds.check_options(name, options)
        choose("mlp", self.mlp, MLPS)
        choose("positions", self.positions, POSITIONS)
        norm(self.norm, 1, self.norm_eps)
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.hidden_size * 8 / 3 / 32) * 32
        self._no_slips(kwargs)
        super().__post_init__(**kwargs)

    def _no_slips(self, rest: dict[str, Any]) -> None:
        """Transformers keeps whatever else it is given; a slip of the pen must not be kept in silence."""
        ours = list(inspect.get_annotations(HybridConfig))
        for key in rest:
            near = difflib.get_close_matches(key, ours, n=1, cutoff=0.8)
            if near:
                raise RegardError(f"HybridConfig has no {key!r}. Did you mean {near[0]!r}?")
