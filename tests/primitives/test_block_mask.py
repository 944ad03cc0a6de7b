"""Block lists and FlexAttention's BlockMask, both ways, by their relation and by what FlexAttention makes of them."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.attention import attend
from regard.primitives.block_list import BlockList, build

IDS = torch.tensor([0] * 70 + [1] * 40 + [2] * 90)
TABLE = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6


def causal(b, h, q, k):
    return q >= k


def by_batch_and_head(b, h, q, k):
    return (q - k < 20 + 30 * h) & ((q >= k) | (b > 0)) & (IDS[q] == IDS[k])


MASKS = {
    "causal": (causal, None, None, 200, 200),
    "by batch and head": (by_batch_and_head, 2, 4, 200, 200),
    "full, not filled": (lambda b, h, q, k: q >= 0, None, None, 130, 100),
    "bits": (lambda b, h, q, k: (q + k * k) % 3 == h, None, 4, 64, 190),
    "nothing": (lambda b, h, q, k: q < 0, None, None, 64, 64),
}
PATTERNS = [
    Pattern.stack_heads([Pattern.window(50) | Pattern.sink(3), Pattern.causal()]),
    Pattern.prefix(70),
    Pattern.full(),
    Pattern.document(IDS, causal=False) & Pattern.blocks(TABLE, 64, causal=False),
    Pattern.predicate(lambda q, k, h: (q + k * k) % 3 == 0),
]


def dense(mask_mod, batch, heads, rows, keys):
    at = torch.meshgrid(*map(torch.arange, (batch or 1, heads or 1, rows, keys)), indexing="ij")
    return mask_mod(*at).expand(batch or 1, heads or 1, rows, keys)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(64, 64), (128, 32)])
def test_a_block_mask_is_read_and_written(name, size):
    mask = create_block_mask(*MASKS[name], device="cpu", BLOCK_SIZE=size)
    blocks = BlockList.from_block_mask(mask)
    assert torch.equal(blocks.to_dense(), dense(*MASKS[name]))
    assert torch.equal(blocks.turned().to_dense(), dense(*MASKS[name]))
    back = blocks.to_block_mask()
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert torch.equal(BlockList.from_block_mask(back).to_dense(), blocks.to_dense())


def test_blocks_that_flex_takes_for_whole_end_with_the_keys():
    """FlexAttention does not apply the mask to these, and hides keys past the end by itself."""
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    index = torch.tensor([[[[1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(one * 0, index, one, index, BLOCK_SIZE=64, mask_mod=causal, seq_lengths=(64, 100))
    assert BlockList.from_block_mask(mask).to_dense()[0, 0, 5].nonzero()[:, 0].tolist() == list(range(64, 100))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_flex_attention_computes_the_same(pattern):
    """Eager FlexAttention over the lists of a pattern, against the definition over the pattern."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, rows, 8, generator=g) for heads, rows in ((4, 160), (2, 200), (2, 200)))
    mask = build(pattern, 160, 200, (64, 32)).to_block_mask(heads=4)
    out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True, scale=0.5)
    expected, expected_lse = attend(q, k, v, pattern=pattern, backend="reference", scale=0.5, causal=pattern.cut)
    seen = expected_lse > -torch.inf
    torch.testing.assert_close(out.where(seen[..., None], 0), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.where(seen, -torch.inf), expected_lse, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(RegardError, match=r"got \(256, 256\)"):
        BlockList.from_block_mask(create_block_mask(causal, None, None, 512, 512, device="cpu", BLOCK_SIZE=256))
    blocks = build(Pattern.stack_heads([Pattern.causal(), Pattern.window(3)]), 64, 64, (64, 64))
    with pytest.raises(RegardError, match=r"2 heads .* 3 heads"):
        blocks.to_block_mask(heads=3)
    with pytest.raises(RegardError, match="by block of keys"):
        blocks.turned().to_block_mask()
