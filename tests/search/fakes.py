"""A tiny model, text, and measurements made up from the placements, so that searches take milliseconds."""

import math
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.core.errors import RegardError
from regard.measure.measure import Bytes, Measurement
from regard.measure.quality import Quality, WindowQuality
from regard.search.calibration import Calibration

LAYERS = 6
SMALL = {
    "context": 48,
    "continuation": 16,
    "final_length": 96,
    "calibration_tokens": 64,
    "facts": 2,
    "repeats": 1,
    "final_repeats": 1,
    "steps": 2,
}
CALIBRATION = Calibration({}, {"saw_int4": torch.linspace(1, 0, LAYERS, dtype=torch.float64)})


class Letters:
    """A tokenizer of single bytes."""

    def __call__(self, written, add_special_tokens=True, verbose=True):
        return {"input_ids": list(written.encode())}


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def tiny_text():
    return torch.randint(0, 256, (1200,), generator=torch.Generator().manual_seed(1))


def measurement(kl, share, length):
    window = WindowQuality(0, kl, kl, kl, 1 - kl / 10, 1 - kl / 10, 2.0 + kl, 2.0)
    quality = Quality(kl, kl, kl, 1 - kl / 10, 1 - kl / 10, math.exp(2 + kl), math.exp(2), math.exp(kl), 32, (window,))
    dense = 1000 * length
    return Measurement(length, quality, Bytes(round(share * dense), round(share * dense), dense, share, length))


class Fake:
    """KL falls and bytes grow with the bits; some settings break, each in its own way."""

    def __init__(self, sleep=0.0, broken=True):
        self.sleep, self.broken, self.calls = sleep, broken, []

    def __call__(self, placements, *, final):
        time.sleep(self.sleep)
        self.calls.append((placements, final))
        kl, share = 0.0, 1.0
        for place in placements:
            layers = LAYERS if place.layers == "all" else len(place.layers)
            if place.stem == "saw_int4":
                for bits in (place.options["key_bits"], place.options["value_bits"]):
                    share -= (16 - bits) / 16 / 2 * layers / LAYERS * 0.9
                    kl += (16 - bits) ** 2 / 5000 * layers / LAYERS
                if self.broken and place.options["rotate_v"] and place.options["value_bits"] == 16:
                    raise RuntimeError("unable to mmap: can't allocate memory: you tried 9 bytes")
                if self.broken and place.options["rotate_v"] and place.options["key_bits"] == 16:
                    return measurement(math.nan, share, 64)
            else:
                window = place.options["window"] if "window" in place.options else place.options["recent"]
                share *= 0.3 + window / 1000
                kl += 30 / window
                if self.broken and place.options["sink"] == 64:
                    raise RegardError("the attached model yields NaN at row 0 of the continuation")
        return measurement(kl, share, 96 if final else 64)

    def control(self):
        return None
