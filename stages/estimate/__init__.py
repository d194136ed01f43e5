"""Stages gone through without weights, to know what they will take."""
