"""Guests on a D-Bus: the service of the verb `dbus-serve`, one object a guest (docs/dbus.md).

    interface    names, types, introspection XML, the policy of a system bus
    values       facts as D-Bus values
    guest        one guest: properties, its agent, its signals
    answers      to calls on a guest's object
    outbox       what is sent, never more than the bus takes
    service      the bus, objects, calls

All but `interface` need dbus-fast, the extra `[dbus]`.
"""
