"""From a step's logits to its tokens: what requests ask, grammars' masks, the draw."""
