"""The paper's figures: which curves they have, how a curve is run in small, and how a figure is drawn."""
