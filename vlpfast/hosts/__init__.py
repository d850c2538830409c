"""Skeletons that published systems are composed with (none yet): between objectives and models."""
