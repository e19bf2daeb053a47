"""From logits to tokens: penalties, masks, filters, the draw, log-probabilities."""
