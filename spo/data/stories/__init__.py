"""The built-in story world: a grammar that writes stories, a gold reward, and a source of preference pairs."""

from spo.data.stories.grammar import StoryWorld
from spo.data.stories.reward import GoldReward
from spo.data.stories.source import StoriesSource

__all__ = ["GoldReward", "StoriesSource", "StoryWorld"]
