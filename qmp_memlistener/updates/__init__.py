"""Changes of a running guest on purpose: plug, unplug and resize under a strategy.

The agent's `hotplug`, `unplug` and `resize` are the way in.

    model, settings, options, property_types    what is wanted and how; users' text and its types
    guest_view, plans, pci_plans, steps         what the guest has; the commands, or why not
    operation, journal, removing                carrying them out; what was made, and the way back
    guest_response, placement, phases           what the guest does about it, and when
    pause, resuming, migrating                  stopping a guest, and that it runs again
    guard, guard_start, guard_process, promise  the process that resumes it if the agent cannot
    guard_notes, left_behind                    what is left when both were killed
    compare, compare_guest, compare_stats       strategies against each other on one guest
"""
