"""Model cards: what made a folder's model, with the figures of its run, and how it is loaded and cited."""

from trl_apa.cards.card import Card, Figure, write_card
from trl_apa.cards.figures import figures_of


__all__ = ["Card", "Figure", "figures_of", "write_card"]
