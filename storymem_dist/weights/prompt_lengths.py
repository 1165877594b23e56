"""Finds prompts that a checkpoint's text encoder cuts, before anything is rendered: the whole text it reads counts.

Loads the tokenizer, not the encoder, and only when a text may be too long. Knows nothing of settings or ranks.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.text_encoder import MAX_TOKENS, clean_prompt
from storymem_dist.story.loading import RejectedStoryboard, StoryBatch
from storymem_dist.story.schema import Shot, Story
from storymem_dist.weights.checkpoints import WanCheckpoint
from storymem_dist.weights.text_encoder import load_tokenizer

_SPARE_TOKENS = 8
"""Tokens that a tokenizer may add to those of a text: marks of its begin and end."""

_SHOWN_CHARACTERS = 40

CutText = Callable[[str], str | None]
"""Returns what is wrong with a text that is too long: how many tokens it has, and what is lost; None for any other."""


def cut_text_of(checkpoint: WanCheckpoint) -> CutText:
    """Return what finds texts that the text encoder of ``checkpoint`` cuts.

    It raises ``CheckpointError`` when the tokenizer cannot be loaded.
    """
    limit = min(MAX_TOKENS, checkpoint.dit_config.text_len)
    tokenizers: list[Any] = []

    def cut_text(text: str) -> str | None:
        cleaned = clean_prompt(text)
        longest = max(cleaned, unicodedata.normalize("NFKC", cleaned), key=len)
        if len(longest.encode()) + _SPARE_TOKENS <= limit:  # a token has at least one byte
            return None
        if not tokenizers:
            tokenizers.append(load_tokenizer(checkpoint.tokenizer_path))
        tokenizer = tokenizers[0]
        ids = tokenizer(cleaned, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return None
        kept = tokenizer(cleaned, truncation=True, max_length=limit)["input_ids"]
        num_kept = next((index for index, pair in enumerate(zip(ids, kept, strict=False)) if pair[0] != pair[1]), limit)
        lost = tokenizer.decode(ids[num_kept : num_kept + _SHOWN_CHARACTERS], skip_special_tokens=True).strip()
        shown = lost if len(lost) <= _SHOWN_CHARACTERS else lost[:_SHOWN_CHARACTERS].rstrip() + "..."
        return f"{len(ids)} tokens, and the text encoder reads {limit}; lost from {shown!r} on"

    return cut_text


def check_prompt_lengths(
    batch: StoryBatch, cut_text: CutText, *, negative_prompt: str | None, refuse: bool
) -> StoryBatch:
    """Return ``batch`` with a warning for each shot whose prompt is cut; ``refuse``: with such stories rejected.

    ``negative_prompt`` is None where guidance needs none. Raises ``ConfigError`` when it is cut, with ``refuse``.
    """
    warnings, stories, rejected = list(batch.warnings), [], list(batch.rejected)
    if negative_prompt is not None and (problem := cut_text(negative_prompt)) is not None:
        message = f"sampler.negative_prompt has {problem}"
        if refuse:
            raise ConfigError(f"{message}; shorten it, or set stories.long_prompts=warn")
        warnings.append(message)
    for story in batch.stories:
        cut = [sentence for shot in story.shots for sentence in _cut_texts(story, shot, cut_text)]
        if cut and refuse:
            rejected.append(_rejected(story, cut))
        else:
            stories.append(replace(story, warnings=(*story.warnings, *cut)) if cut else story)
    return StoryBatch(stories=tuple(stories), rejected=tuple(rejected), warnings=tuple(warnings))


def _cut_texts(story: Story, shot: Shot, cut_text: CutText) -> Iterator[str]:
    """A sentence for each text of a rendered shot that is cut."""
    if shot.video is not None:
        return
    where = f"{story.source or story.story_id}, scene {shot.scene_num}, {shot.shot_id}"
    what = "style and prompt together have" if story.style else "the prompt has"
    for text, has in ((shot.prompt, what), (shot.options.negative_prompt, "the negative prompt has")):
        if text is not None and (problem := cut_text(text)) is not None:
            yield f"{where}: {has} {problem}"


def _rejected(story: Story, cut: Sequence[str]) -> RejectedStoryboard:
    more = f" (and {len(cut) - 1} more shots)" if len(cut) > 1 else ""
    return RejectedStoryboard(
        source=story.source or story.story_id,
        message=f"{cut[0]}{more}; shorten it, or render it with stories.long_prompts=warn",
    )
