"""What is said on a D-Bus: types, introspection data, the policy of a system bus."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from dbus_fast import Variant
from dbus_fast.signature import SignatureTree
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.dbus import interface
from qmp_memlistener.dbus.values import dictionary, text, variant
from qmp_memlistener.errors import InputError

KEYS = st.text("abc\0\udcff", max_size=3)
PLAIN = st.one_of(st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text())
VALUES = st.recursive(
    PLAIN, lambda v: st.one_of(st.lists(st.none() | v), st.dictionaries(KEYS, v)), max_leaves=20
)


@given(st.dictionaries(KEYS, st.none() | VALUES))
def test_all_facts_have_a_type_that_d_bus_knows(facts: dict[str, object]) -> None:
    for key, found in dictionary(facts).items():
        assert "\0" not in key
        found.signature.encode()
        SignatureTree(found.signature).verify([found.value])
    assert len(dictionary(facts)) <= sum(value is not None for value in facts.values())


@pytest.mark.parametrize(
    ("value", "signature"),
    [
        (True, "b"),
        (0, "t"),
        ((1 << 64) - 1, "t"),
        (-1, "x"),
        (1 << 64, "s"),
        (0.5, "d"),
        ("x", "s"),
        ([], "av"),
        ([1], "av"),
        ({"a": 1}, "a{sv}"),
    ],
)
def test_a_value_has_the_narrowest_type_that_holds_it(value: object, signature: str) -> None:
    assert variant(value).signature == signature


def test_what_is_null_is_left_out_and_long_lists_are_cut() -> None:
    found = dictionary({"a": None, "b": [1, 2, 3], "c": 0}, leave_out=["c"], most=2)
    assert found == {
        "b": Variant("av", [Variant("t", 1), Variant("t", 2)]),
        "cut": Variant("av", [Variant("s", "b")]),
    }


def test_text_is_unicode_without_nul() -> None:
    assert text("a\0\udcffb") == "a\\x00\\udcffb"


def test_introspection_data_has_every_member_with_a_type_that_d_bus_knows() -> None:
    node = ET.fromstring(interface.guest_xml())
    guest = next(i for i in node.iter("interface") if i.get("name") == interface.GUEST)
    found = {p.get("name"): p.get("type") for p in guest.iter("property")}
    assert found == interface.PROPERTY_TYPES
    signals = {s.get("name"): "".join(a.get("type", "") for a in s) for s in guest.iter("signal")}
    assert signals == interface.SIGNAL_TYPES
    for signature in (*found.values(), *signals.values()):
        SignatureTree(signature or "")
    for xml in (interface.root_xml(), interface.tree_xml(['a"<', "b"])):
        assert ET.fromstring(xml).tag == "node"


def test_the_policy_lets_nobody_in_but_root_and_the_group() -> None:
    config = ET.fromstring(interface.policy_text("kvm-watch"))
    default, root, group = config.findall("policy")
    assert default.attrib == {"context": "default"}
    assert {rule.tag for rule in default} == {"deny"}
    assert {next(iter(rule.attrib)) for rule in default} == {
        *("own", "send_destination", "receive_sender"),
    }
    assert root.attrib == {"user": "root"}
    assert group.attrib == {"group": "kvm-watch"}
    assert not any("own" in rule.attrib for rule in group)
    assert len(ET.fromstring(interface.policy_text(None)).findall("policy")) == 2


@pytest.mark.parametrize("name", ["", 'a"><allow own="*"/', "-x", "a b", "ä"])
def test_what_is_no_name_of_a_group_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=re.escape("not a group's name")):
        interface.policy_text(name)
