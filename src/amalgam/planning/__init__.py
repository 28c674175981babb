"""The best model for a budget: what each weight may be, what that costs and does, and the choice, with its proof."""
