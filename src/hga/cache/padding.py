"""Left padding of a batch, cut off at a layer's door."""

from __future__ import annotations

from torch import Tensor


def leading_pads(padding: Tensor | None, lengths: list[int], tokens: int, seen: int) -> list[int]:
    """Leading pad tokens of each row among the last `tokens` of `seen`.

    padding: bool (B, seen), False where a token is padding, or None; lengths: tokens that the rows hold without those.
    ValueError for a mask that does not fit, is missing though there was padding, or pads elsewhere than at the left.
    """
    padded_before = [seen - tokens - length for length in lengths]
    if padding is None:
        if any(padded_before):
            raise ValueError(
                f"rows of this cache hold {padded_before} pad tokens, and this call has no attention_mask; "
                "pass the mask of the whole sequence"
            )
        return [0] * len(lengths)
    if padding.shape[1] != seen:
        raise ValueError(f"attention_mask covers {padding.shape[1]} tokens, the cache {seen}; it must cover all")
    if not any(padded_before) and bool(padding.all()):
        return [0] * len(lengths)
    pads = (~padding).sum(1).tolist()
    leading = (padding.long().cumsum(1) == 0).sum(1).tolist()
    for index, (length, total, lead) in enumerate(zip(lengths, pads, leading, strict=True)):
        if total != lead or (length and total != padded_before[index]):
            raise ValueError(
                f"row {index} of attention_mask has padding that is not at its left (or that changed since the "
                "last call); hga supports left padding: set tokenizer.padding_side = 'left'"
            )
    return [lead - before for lead, before in zip(leading, padded_before, strict=True)]
