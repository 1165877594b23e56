"""The memory bank: keyframe selection, dedupe, recall, and the scorers for them. Knows nothing about rendering."""
