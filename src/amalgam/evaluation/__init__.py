"""How well a plan does, by numbers: texts in, divergences and perplexities with confidence intervals out."""
