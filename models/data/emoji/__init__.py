"""Emoji: their names, their drawings in several styles, and the splits that training and tests are made from."""
