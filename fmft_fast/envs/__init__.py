"""Simulators, roll-outs of policies in them, and what is made of the results."""
