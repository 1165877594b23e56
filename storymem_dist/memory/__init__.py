"""The memory bank: keyframe selection, dedupe, recall, and the scorers behind them."""
