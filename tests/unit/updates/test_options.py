"""Additions as users write them: QEMU's option syntax and JSON."""

from __future__ import annotations

import json

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.updates.model import Addition, Role, Value
from qmp_memlistener.updates.options import parse_addition

JSON_NET = '{"driver": "virtio-net-pci", "id": "net1", "vectors": 4, "mq": true, "netdev": "n1"}'


def refused(role: Role, text: str, *words: str) -> None:
    """An InputError of one line that says all of `words`, and has a remedy."""
    with pytest.raises(InputError) as error:
        parse_addition(role, text)
    assert error.value.remedy
    for word in words:
        assert word in f"{error.value.message} | {error.value.remedy}"
    assert error.value.message.isprintable()
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    ("role", "text", "arguments"),
    [
        (
            Role.DEVICE,
            "virtio-net-pci,id=net1,netdev=n1,mac=52:54:00:12:34:56",
            {
                "driver": "virtio-net-pci",
                "id": "net1",
                "netdev": "n1",
                "mac": "52:54:00:12:34:56",
            },
        ),
        (Role.DEVICE, "id=d0,driver=pc-dimm", {"id": "d0", "driver": "pc-dimm"}),
        (
            Role.DEVICE,
            "x,id=a,list[0]=1,len-list=1,a.b=c",
            {"driver": "x", "id": "a", "list[0]": "1", "len-list": "1", "a.b": "c"},
        ),
        (
            Role.OBJECT,
            "memory-backend-file,id=m0,mem-path=/a,,b=c,size=1G",
            {"qom-type": "memory-backend-file", "id": "m0", "mem-path": "/a,b=c", "size": "1G"},
        ),
        (
            Role.OBJECT,
            "memory-backend-ram,id=m0,host-nodes.1=3,host-nodes.0=2",
            {"qom-type": "memory-backend-ram", "id": "m0", "host-nodes": ["2", "3"]},
        ),
        (Role.NETDEV, "user,id=n1,restrict=on", {"type": "user", "id": "n1", "restrict": "on"}),
        (
            Role.NETDEV,
            "user,id=n1,hostfwd.0.str=tcp::22-:22,hostfwd.1.str=x",
            {"type": "user", "id": "n1", "hostfwd": [{"str": "tcp::22-:22"}, {"str": "x"}]},
        ),
        (
            Role.BLOCKDEV,
            "raw,node-name=b,file.driver=file,file.filename=/x=y,read-only=on",
            {
                "driver": "raw",
                "node-name": "b",
                "file": {"driver": "file", "filename": "/x=y"},
                "read-only": "on",
            },
        ),
        (
            Role.BLOCKDEV,
            "quorum,node-name=q,children.0.driver=null-co,children.01.driver=null-aio",
            {
                "driver": "quorum",
                "node-name": "q",
                "children": [{"driver": "null-co"}, {"driver": "null-aio"}],
            },
        ),
        (
            Role.OBJECT,
            "x,id=a,__com.example_y=1,b.__org.example_z.c=2",
            {
                "qom-type": "x",
                "id": "a",
                "__com.example_y": "1",
                "b": {"__org.example_z": {"c": "2"}},
            },
        ),
    ],
)
def test_option_text(role: Role, text: str, arguments: dict[str, Value]) -> None:
    name = arguments[role.id_key]
    assert parse_addition(role, text) == Addition(role, str(name), arguments)
    assert parse_addition(role, f"{text},").arguments == arguments
    assert parse_addition(role, text).type == arguments[role.type_key]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("", ""),
        (",", ",,"),
        (",,", ",,,,"),
        ("a,b=c", "a,,b=c"),
        ("1,", "1,,"),
        ("=", "="),
        ("\"'{}[] \n\t\\", "\"'{}[] \n\t\\"),
        ("déjà 🐑", "déjà 🐑"),
    ],
)
def test_values_keep_every_character(value: str, written: str) -> None:
    for text in (f"x,id=a,v={written},w=1", f"x,id=a,w=1,v={written}"):
        for role in (Role.DEVICE, Role.OBJECT):
            arguments = parse_addition(role, text).arguments
            assert arguments == {role.type_key: "x", "id": "a", "v": value, "w": "1"}


def test_three_commas_are_one_and_the_end() -> None:
    assert parse_addition(Role.DEVICE, "x,id=a,v=1,,,w=2").arguments == {
        "driver": "x",
        "id": "a",
        "v": "1,",
        "w": "2",
    }


@pytest.mark.parametrize("role", Role)
def test_type_and_id_must_be_there(role: Role) -> None:
    key, kind = role.id_key, role.type_key
    refused(role, f"{key}=a,v=1", "does not name its type", kind)
    refused(role, "", "is empty")
    refused(role, f",{key}=a", "is empty")
    refused(role, f"x,{kind}=y,{key}=a", "twice")
    refused(role, "x,v=1", f"has no {key}", f"{key}=NAME")
    refused(role, f"{{{json.dumps(key)}: 'a'}}", "not JSON")
    refused(role, json.dumps({key: "a"}), "does not name its type", kind)
    refused(role, json.dumps({kind: "x"}), f"has no {key}", f'"{key}": "NAME"')
    refused(role, json.dumps({kind: 1, key: "a"}), "1 is not the name of a type")
    refused(role, json.dumps({kind: "x", key: 1}), f"{key} 1 is not one")


@pytest.mark.parametrize("kind", ["a b", "?", "-x", "a\nb", "é", "x" * 128, "a'b", "a/b"])
def test_types_that_are_none(kind: str) -> None:
    refused(Role.DEVICE, f"{kind},id=a", "is not the name of a type", "-device help")
    refused(Role.NETDEV, f"{kind},id=a", "is not the name of a type", "-netdev help")


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("flag", ["share", "readonly", "help", "noshare", "?"])
def test_a_flag_needs_its_value(role: Role, flag: str) -> None:
    refused(role, f"x,{role.id_key}=a,{flag}", f'"{flag}"', "is not KEY=VALUE", "KEY=on", "twice")


@pytest.mark.parametrize("role", Role)
def test_keys_are_given_once(role: Role) -> None:
    refused(role, f"x,{role.id_key}=a,v=1,v=2", '"v" twice')
    refused(role, f"x,{role.id_key}=a,{role.id_key}=b", "twice")
    for text in (
        f'{{"{role.type_key}": "x", "{role.id_key}": "a", "{role.id_key}": "b"}}',
        f'{{"{role.type_key}": "x", "{role.id_key}": "a", "v": {{"w": 1, "w": 2}}}}',
    ):
        refused(role, text, "twice in one object")


def test_a_list_of_options_is_told_how() -> None:
    text = "user,id=n,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4"
    refused(Role.NETDEV, text, "hostfwd.0=…,hostfwd.1=…")


@pytest.mark.parametrize("key", ["", " a", "a b", "é", "a'", "{a", "a\n", "a" * 128])
def test_keys_that_are_none(key: str) -> None:
    refused(Role.DEVICE, f"x,id=a,{key}=1", "is not the name of an option")
    refused(Role.OBJECT, f"x,id=a,{key}=1", "is not the name of an option")


@pytest.mark.parametrize("key", [".a", "a.", "a..b", "0", "1.a", "a.0x", "_a", "a[0]", "a.-b"])
def test_keys_that_are_none_in_backends(key: str) -> None:
    """As util/keyval.c: an index cannot stand first, a name begins with a letter."""
    refused(Role.BLOCKDEV, f"x,node-name=a,{key}=1", "is not the name of an option")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("v=1,v.w=2", "contradicts"),
        ("v.w=2,v=1", "contradicts"),
        ("v.0=1,v.w=2", "contradicts"),
        ("v.0=1,v.00=2", "contradicts"),
        ("v.1=1", '"v.0" is missing'),
        ("v.0=1,v.2=1", '"v.1" is missing'),
        ("v.w.99999999999999999999=1", '"v.w.0" is missing'),
        ("node-name.x=1", "contradicts"),
    ],
)
def test_trees_that_contradict_themselves(options: str, words: str) -> None:
    refused(Role.BLOCKDEV, f"x,node-name=a,{options}", words)


def test_deep_keys_are_refused() -> None:
    refused(Role.BLOCKDEV, f"x,node-name=a,{'v.' * 5000}w=1", "is not the name of an option")
    refused(Role.BLOCKDEV, '{"a":' * 70 + "1" + "}" * 70, "nested deeper")
    refused(Role.BLOCKDEV, '{"a":' * 100_000, "is not JSON")


def test_json_is_typed_and_kept() -> None:
    net = parse_addition(Role.DEVICE, f"  {JSON_NET}")
    assert net == Addition(Role.DEVICE, "net1", json.loads(JSON_NET), typed=True)
    values: dict[str, Value] = {
        "driver": "x",
        "id": "a",
        "list": [1, {"b": None}, "c,d"],
        "int": -(1 << 63),
        "uint": (1 << 64) - 1,
        "number": 0.5,
        "no": False,
        "odd key, \"'": "é\u2028🐑\n",
    }
    assert parse_addition(Role.DEVICE, json.dumps(values)).arguments == values
    assert parse_addition(Role.DEVICE, json.dumps(values, ensure_ascii=False)).arguments == values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NaN", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("1e999", "cannot be expressed in QMP"),
        ("18446744073709551616", "64 bits"),
        ("-9223372036854775809", "64 bits"),
        ("9" * 5000, "is not JSON"),
        ('"\\ud800"', "U+D800"),
        ('"\\u0000"', "U+0000"),
        ('["\\ufffe"]', "U+FFFE"),
        ('{"\\udc00": 1}', "U+DC00"),
        ("1} x", "is not JSON"),
    ],
)
def test_json_that_qmp_cannot_carry(value: str, words: str) -> None:
    refused(Role.DEVICE, f'{{"driver": "x", "id": "a", "v": {value}}}', words)
