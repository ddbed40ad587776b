"""Rounds of self-play: how samples of a policy become the pairs that the next round trains on."""
