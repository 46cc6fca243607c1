"""Changes of a running guest on purpose: plug, unplug and resize under a strategy.

`intents` is what is wanted, `plans` the commands for it, `operation` carries them out, `guard`
promises that no guest stays paused.  The agent's `hotplug`, `unplug` and `resize` are the way in.
"""
