"""From a part of a conversation to the frames that a model's processor takes."""
