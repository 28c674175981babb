"""What a plan can be exported to: each module has `TARGET`."""
