"""What tests of two-sided patterns share: dense masks, covers against them, and FlexAttention on the same mask."""

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import regard


def dense(pattern, tokens):
    """Bool `[tokens, tokens]` of a pattern without heads of its own."""
    return pattern.to_dense(tokens)[0]


def is_covered(pattern, tokens, rows, keys, *, exact=False, loop=True):
    """Check the cover of `pattern` on blocks of `rows` by `keys` positions; returns the share of blocks it keeps.

    `exact`: it must be the best there is. `loop` False leaves the check out, for lengths that a mask is too large for.
    """
    low, left = torch.arange(0, tokens, rows)[:, None], torch.arange(0, tokens, keys)[None]
    high, right = (low + rows).clamp(max=tokens) - 1, (left + keys).clamp(max=tokens) - 1
    some, every = pattern.rules[0].cover(low, high, left, right)
    if pattern.cut:
        some, every = some & (left <= high), every & (right <= low)
    if loop:
        mask = dense(pattern, tokens)
        for i in range(len(low)):
            for j in range(left.shape[1]):
                block = mask[low[i, 0] : high[i, 0] + 1, left[0, j] : right[0, j] + 1]
                assert some[i, j] or not block.any()
                assert block.all() or not every[i, j]
                assert not exact or (some[i, j] == block.any() and every[i, j] == block.all())
    return float(some.float().mean())


def agrees_with_flex(pattern, tokens, heads=2):
    """Check `regard.attend` over `pattern` against eager `flex_attention` with FlexAttention's own block mask."""
    q, k, v = torch.randn(3, 1, heads, tokens, 16, dtype=torch.float64).unbind(0)
    mask = pattern.to_block_mask(tokens, heads=heads, block_size=16)
    out, lse = regard.attend(q, k, v, pattern=pattern)
    wanted, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close((out, lse), (wanted, aux.lse), atol=1e-12, rtol=0)


def logits(model, ids, pattern, positions):
    """A model's logits in one forward over `pattern`, through `attention_mask` and `position_ids`: `[1, T, V]`."""
    seen = pattern.to_dense(ids.shape[1])[None].to(ids.device)
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions[None]).logits


def decoded(model, ids, prompt, pattern, positions):
    """The same, the first `prompt` tokens at once and the others one at a time from a cache, which see all before."""
    seen = pattern.to_dense(prompt)[None]
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    with torch.no_grad():
        out = model(
            input_ids=ids[:, :prompt], attention_mask=mask, position_ids=positions[None, :prompt], use_cache=True
        )
        found = [out.logits]
        for n in range(prompt, ids.shape[1]):
            more = {"past_key_values": out.past_key_values, "position_ids": positions[None, n : n + 1]}
            found.append(model(input_ids=ids[:, n : n + 1], **more).logits)
    return torch.cat(found, 1)
