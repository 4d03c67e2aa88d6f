"""The paper's figures: their curves, mini-scale runs, win rates and plots. Not in the wheel."""
