"""Changes of a running guest on purpose: plug, unplug and resize under a strategy.

The agent's `hotplug`, `unplug` and `resize` are the way in.

    model, settings, options, property_types    what is wanted and how; users' text and its types
    guest_view, plans, pci_plans, steps         what the guest has; the commands, or why not
    operation, journal, removing                carrying them out; what was made, and the way back
    guest_response, placement, phases           what the guest does about it, and when
    pause (a package)                           stopping a guest, and that it runs again
    left_behind                                 what is left when an agent was killed
    compare (a package)                         strategies against each other on one guest
"""
