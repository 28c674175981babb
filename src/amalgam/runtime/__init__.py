"""The composition root: settings → a running model, and live changes of it."""
