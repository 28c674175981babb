"""Tokens guessed before they are computed: who guesses, how many guesses pay, and what has come of them."""
