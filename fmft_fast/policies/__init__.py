"""Flow-matching policies: networks with normalisers that predict sequences of actions."""
