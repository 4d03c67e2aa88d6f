"""The paper's figures: their curves, mini-scale runs and plots."""
