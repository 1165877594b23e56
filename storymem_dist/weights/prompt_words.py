"""Finds prompts of which a model knows no word, before anything is rendered. Knows nothing of ranks."""

from dataclasses import replace
from pathlib import Path

from storymem_dist.models.wan.text_encoder import clean_prompt
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.schema import Story
from storymem_dist.weights.checkpoints import WanCheckpoint
from storymem_dist.weights.text_encoder import load_tokenizer

_MOST_BYTES = 1_000_000
"""Largest tokenizer that is asked: larger ones (umT5: 16 MB, a second to load) break every word into known pieces."""


def check_prompt_words(batch: StoryBatch, checkpoint: WanCheckpoint) -> StoryBatch:
    """Return ``batch`` with a warning for each shot of whose prompt the text encoder knows no word."""
    folder = checkpoint.tokenizer_path
    if _size(folder) > _MOST_BYTES:
        return batch
    tokenizer = load_tokenizer(folder)
    nothing = set(tokenizer.all_special_ids)

    def checked(story: Story) -> Story:
        unknown = tuple(
            f"{story.source or story.story_id}, scene {shot.scene_num}, {shot.shot_id}: the model knows no word of the "
            f"prompt {shot.prompt!r}; what it renders has nothing to do with it"
            for shot in story.shots
            if shot.video is None
            and nothing.issuperset(tokenizer(clean_prompt(shot.prompt), verbose=False)["input_ids"])
        )
        return replace(story, warnings=(*story.warnings, *unknown)) if unknown else story

    return replace(batch, stories=tuple(checked(story) for story in batch.stories))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
