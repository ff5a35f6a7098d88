"""The part of pickle that checkpoints need, interpreted here: plain data, tensors and NumPy numbers, and nothing else.

Python's own unpickler calls what the file names. This one knows a fixed table of names, each with a function that
checks its arguments, and counts what the file makes it do, so that a small file can neither run code nor fill the
memory. Nothing of it runs on anybody's classes: there is no ``__setstate__``, no ``__reduce__``, no attribute by name.
"""

from __future__ import annotations

import argparse
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from momentum_lm.untrusted import legible

MAX_DEPTH = 100  # of lists, tuples and dicts within one another
# of dicts and sets: their hashes are salted or of 64 bits, so that none can be made alike
_KEYS = (str, int, float, bytes, bool, type(None))
# NumPy's numbers, by kind and size in bytes
_SCALARS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
DTYPES |= {
    f"torch.{name}": getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
_UNUSABLE = {  # what torch's own list of safe names has, and no command here could use
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the device meta)",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
}
# Python 2's and NumPy 1's names
_OLD_MODULES = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}


class Malformed(ValueError):
    """The bytes are not what torch.save writes: torn, damaged or made up."""


class Refused(ValueError):
    """``name`` is outside of the table, so that reading it would take more than data. ``unusable``: a tensor of a kind
    that is of no use.
    """

    def __init__(self, name: str, unusable: bool = False) -> None:
        super().__init__(name)
        self.name, self.unusable = name, unusable


def shown(text: Any, most: int = 80) -> str:
    """``text`` from a file as it may stand in a message: short, in one line, and nothing that a terminal obeys."""
    if not isinstance(text, str):
        text = str(text)[:most] if isinstance(text, int) else f"<{type(text).__name__}>"
    return legible(text, most)


class Storage:
    """Numbers of one kind in a row, which tensors are views of. ``key`` is their name in the file; ``dtype`` None: as
    the tensor says.
    """

    def __init__(self, key: str, dtype: torch.dtype | None, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count
        self.nbytes = count * (1 if dtype is None else dtype.itemsize)


class _NumpyType:
    """A ``numpy.dtype`` of the file: the code, and the byte order that follows it."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class _Name:
    """A name of the table, on the interpreter's stack."""

    def __init__(self, name: str, build: Callable[..., Any] | None) -> None:
        self.name, self.build = name, build


def _require(fits: Any, what: str) -> None:
    if not fits:
        raise Malformed(what)


def _is_size(value: Any, below: int = 1 << 48) -> bool:
    return type(value) is int and 0 <= value < below


class Reader:
    """Interprets one pickle of ``data`` from byte ``start`` on; afterwards ``end`` is the byte behind it.

    ``read_storage`` gives the bytes of a Storage as a vector of uint8 that has exactly ``nbytes`` of them; None: every
    tensor is made empty, and ``storages`` tells which there are. ``budget`` is how many steps the pickle may take,
    which bounds time and memory: at most about 100 bytes each. Raises Malformed, and Refused for a name outside of the
    table; what ``read_storage`` raises passes.
    """

    def __init__(
        self, data: bytes, read_storage: Callable[[Storage], Tensor] | None, start: int = 0, budget: int = 4_000_000
    ) -> None:
        self.data, self.end, self.read_storage, self.budget, self.allowed = data, start, read_storage, budget, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}  # in the order of their first use
        self.names = self._table()

    def load(self) -> Any:
        """The object, a tree of at most MAX_DEPTH levels whose shared parts, counted each time, are few.

        Raises Malformed, and Refused for a name outside of the table.
        """
        try:
            value = self._interpret()
        except (struct.error, IndexError, KeyError) as error:  # a jump behind the data, an empty stack, an unknown memo
            raise Malformed("its pickle is cut short or damaged") from error
        except (UnicodeError, TypeError, OverflowError, RuntimeError) as error:
            if "allocate" in str(error):
                raise
            raise Malformed("its pickle is damaged") from error
        self._check_tree(value)
        return value

    def _interpret(self) -> Any:
        steps = self._steps()
        data, size = self.data, len(self.data)
        while self.end < size:
            code = data[self.end]
            self.end += 1
            self.budget -= 1
            if self.budget < 0:
                raise Malformed("it holds more small parts than a checkpoint has")
            if code == 0x2E:  # STOP
                _require(len(self.stack) == 1 and not self.marks, "its pickle is damaged")
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise Malformed(f"its pickle has an instruction {code:#04x} that torch.save does not write")
            step()
        raise Malformed("its pickle is cut short")

    def _check_tree(self, value: Any) -> None:
        """Whoever walks through the value later meets as many nodes as here. A value that holds itself is too deep."""
        left = 2 * (self.allowed - self.budget) + 10_000
        level = [value]
        for _ in range(MAX_DEPTH):
            following: list[Any] = []
            for item in level:
                kind = type(item)
                if kind is argparse.Namespace:
                    following += vars(item).values()
                elif kind in (dict, OrderedDict):
                    following += item.values()
                    if kind is OrderedDict:
                        following += vars(item).values()
                elif kind in (list, tuple, set):
                    following += item
                elif kind in (_Name, _NumpyType, Storage):
                    raise Malformed("its pickle ends in the middle of a tensor")
                if len(following) > left:
                    raise Malformed("its parts refer to one another more often than a checkpoint's do")
            left -= len(following)
            if not following:
                return
            level = following
        raise Malformed(f"it has parts within parts, more than {MAX_DEPTH} deep")

    # Instructions. Numbers are little-endian, but for floats.

    def _unpack(self, form: str, size: int) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.end)
        self.end += size
        return value

    def _take(self, count: int) -> bytes:
        _require(self.end + count <= len(self.data), "its pickle is cut short")
        self.budget -= count // 16
        self.end += count
        return self.data[self.end - count : self.end]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.end, self.end + 1000)
        _require(end >= 0, "its pickle is damaged")
        line = self.data[self.end : end]
        self.end = end + 1
        return line.decode("utf-8")

    def _steps(self) -> dict[int, Callable[[], None]]:
        push = self._push
        plain: dict[str, Callable[[], Any]] = {
            "N": lambda: None, "\x88": lambda: True, "\x89": lambda: False, ")": tuple, "]": list, "}": dict,
            "\x8f": self._set,
            "J": lambda: self._unpack("<i", 4), "K": lambda: self._unpack("<B", 1), "M": lambda: self._unpack("<H", 2),
            "G": lambda: self._unpack(">d", 8), "\x8a": lambda: int.from_bytes(self._take(self._unpack("<B", 1)),
                "little", signed=True),
            "X": lambda: self._text(self._take(self._unpack("<I", 4))),
            "\x8c": lambda: self._text(self._take(self._unpack("<B", 1))),
            "B": lambda: self._take(self._unpack("<I", 4)), "C": lambda: self._take(self._unpack("<B", 1)),
            "T": lambda: self._old_text(self._take(self._unpack("<i", 4))),
            "U": lambda: self._old_text(self._take(self._unpack("<B", 1))),
            "h": lambda: self.memo[self._unpack("<B", 1)], "j": lambda: self.memo[self._unpack("<I", 4)],
            "c": lambda: self._name(self._line(), self._line()), "t": lambda: tuple(self._pop_mark()),
            "\x85": lambda: (self.stack.pop(),), "\x86": lambda: self._last(2), "\x87": lambda: self._last(3),
            "Q": lambda: self._persistent(self.stack.pop()),
        }  # fmt: skip

        def pushing(make: Callable[[], Any]) -> Callable[[], None]:
            return lambda: push(make())

        steps: dict[str, Callable[[], None]] = {code: pushing(make) for code, make in plain.items()}
        steps |= {
            "\x80": lambda: _require(self._unpack("<B", 1) <= 5, "its pickle is of an unknown version"),
            "\x95": lambda: self._unpack("<Q", 8) and None, "(": self._mark, "a": self._append, "e": self._appends,
            "s": self._set_item,
            "u": self._set_items, "\x90": self._add_items, "q": lambda: self._put(self._unpack("<B", 1)),
            "r": lambda: self._put(self._unpack("<I", 4)), "\x94": lambda: self._put(len(self.memo)),
            "\x93": self._stack_name,
            "R": self._reduce, "\x81": self._reduce, "b": self._build,
        }  # fmt: skip
        return {ord(code): step for code, step in steps.items()}

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    @staticmethod
    def _text(data: bytes) -> str:
        return data.decode("utf-8", "surrogatepass")  # as pickle writes it: a path may be no UTF-8

    @staticmethod
    def _old_text(data: bytes) -> str | bytes:
        """Python 2's str: text where it can be, as torch reads it."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _last(self, count: int) -> tuple[Any, ...]:
        _require(len(self.stack) >= count, "its pickle is damaged")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def _put(self, index: int) -> None:
        self.budget -= 1
        self.memo[index] = self.stack[-1]

    def _top(self, *kinds: type) -> Any:
        _require(type(self.stack[-1]) in kinds, "its pickle is damaged")
        return self.stack[-1]

    def _append(self) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def _appends(self) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def _set_item(self) -> None:
        key, value = self._last(2)
        self._store(self._top(dict, OrderedDict), [key, value])

    def _set_items(self) -> None:
        items = self._pop_mark()
        self._store(self._top(dict, OrderedDict), items)

    def _add_items(self) -> None:
        items = self._pop_mark()
        self._add(self._top(set), items)

    def _store(self, target: dict[Any, Any], items: list[Any]) -> None:
        _require(len(items) % 2 == 0, "its pickle is damaged")
        self.budget -= len(items) // 2
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _add(self, target: set[Any], items: list[Any]) -> None:
        self.budget -= len(items)
        target.update(map(self._key, items))

    @staticmethod
    def _key(key: Any) -> Any:
        if type(key) not in _KEYS:  # what torch.save writes all the same, and torch.load reads
            raise Refused(f"a {type(key).__name__} for a name")
        _require(type(key) is not int or key.bit_length() <= 60, f"it has a {type(key).__name__} for a name")
        return key

    def _stack_name(self) -> None:
        module, name = self._last(2)
        _require(isinstance(module, str) and isinstance(name, str), "its pickle is damaged")
        self._push(self._name(module, name))

    def _name(self, module: str, name: str) -> Any:
        full = f"{_OLD_MODULES.get(module, module)}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        known = self.names.get(full)
        if known is None:
            raise Refused(_UNUSABLE.get(full) or shown(f"{module}.{name}"), full in _UNUSABLE)
        return known

    def _reduce(self) -> None:
        made, arguments = self._last(2)
        _require(type(arguments) is tuple and type(made) is _Name and made.build is not None, "its pickle is damaged")
        self.budget -= 8
        self._push(made.build(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        target = self._top(argparse.Namespace, OrderedDict, _NumpyType)
        if type(target) is _NumpyType:
            self._set_byte_order(target, state)
            return
        _require(type(state) is dict and all(type(name) is str for name in state), "its pickle is damaged")
        self.budget -= len(state)
        if type(target) is OrderedDict:  # of a module's state_dict(): the versions of its parts
            versions = state.get("_metadata", {})
            fits = state.keys() <= {"_metadata"} and isinstance(versions, dict)
            _require(
                fits and all(isinstance(version, dict) for version in versions.values()),
                "it has a dict with odd attributes",
            )
        else:
            odd = next((name for name in state if hasattr(argparse.Namespace, name)), None)
            _require(odd is None, f"its options have the name {odd}")
        vars(target).update(state)

    # What the names of the table stand for.

    def _table(self) -> dict[str, _Name]:
        table: dict[str, Callable[..., Any] | None] = {
            "collections.OrderedDict": self._ordered, "builtins.set": self._set,
            "argparse.Namespace": argparse.Namespace,
            "_codecs.encode": self._encoded, "torch.Size": self._size, "torch.device": self._device,
            "numpy.dtype": self._numpy_type, "numpy._core.multiarray.scalar": self._numpy_scalar,
            "torch._utils._rebuild_tensor": self._tensor, "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor, "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage.UntypedStorage": None,
        }  # fmt: skip
        table |= {f"torch.{name}": None for name in _STORAGES}
        return {name: _Name(name, build) for name, build in table.items()}

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        fits = type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs)
        _require(fits, "its pickle is damaged")
        result: OrderedDict[Any, Any] = OrderedDict()
        self._store(result, [item for pair in pairs for item in pair])
        return result

    def _set(self, items: Any = ()) -> set[Any]:
        _require(type(items) in (list, tuple), "its pickle is damaged")
        result: set[Any] = set()
        self.budget -= 2
        self._add(result, list(items))
        return result

    def _encoded(self, text: Any, encoding: Any = None) -> bytes:
        """How protocol 2 writes bytes."""
        _require(type(text) is str and encoding in ("latin1", "latin-1"), "its pickle is damaged")
        self.budget -= len(text) // 16
        return text.encode("latin-1")

    def _size(self, sizes: Any = ()) -> torch.Size:
        _require(
            type(sizes) in (list, tuple) and len(sizes) <= 64 and all(map(_is_size, sizes)),
            "it has a shape that cannot be",
        )
        return torch.Size(sizes)

    def _device(self, kind: Any, index: Any = None) -> torch.device:
        _require(
            type(kind) is str and len(kind) < 20 and (index is None or _is_size(index, 128)),
            "it has a device that cannot be",
        )
        return torch.device(kind) if index is None else torch.device(kind, index)

    def _numpy_type(self, code: Any, align: Any = False, copy: Any = True) -> _NumpyType:
        _require(type(code) is str, "its pickle is damaged")
        if code not in _SCALARS:
            raise Refused(f"numpy.dtype of {shown(repr(code))}")
        return _NumpyType(code)

    @staticmethod
    def _set_byte_order(target: _NumpyType, state: Any) -> None:
        """A number's dtype has this state and no other: no fields, no shape, and its size and alignment are those of
        its kind.
        """
        fits = type(state) is tuple and len(state) in (8, 9) and state[0] in (3, 4) and state[1] in ("<", ">", "|", "=")
        _require(
            fits and state[2:8] == (None, None, None, -1, -1, 0) and state[8:] in ((), (None,)),
            "it has a number of an odd type",
        )
        target.order = state[1]

    def _numpy_scalar(self, kind: Any, data: Any) -> Any:
        _require(
            type(kind) is _NumpyType and type(data) is bytes and len(data) == int(kind.code[1:]),
            "it has a number of an odd type",
        )
        return numpy.frombuffer(data, kind.order + kind.code).astype(kind.code)[0]

    def _persistent(self, entry: Any) -> Storage:
        """("storage", type, name, device, number of elements), and in the form before torch 1.6 None for a view of
        another storage.
        """
        fits = type(entry) is tuple and len(entry) in (5, 6) and entry[0] == "storage" and entry[5:] in ((), (None,))
        _require(
            fits and type(entry[1]) is _Name and type(entry[2]) is str and _is_size(entry[4]),
            "it has a tensor of an odd form",
        )
        name = entry[1].name.removeprefix("torch.")
        _require(name in _STORAGES or name == "storage.UntypedStorage", "it has a tensor of an odd form")
        storage = Storage(entry[2], _STORAGES.get(name), entry[4])
        known = self.storages.setdefault(storage.key, storage)
        _require(
            (known.dtype, known.count) == (storage.dtype, storage.count), "it has two different tensors of one name"
        )
        return known

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        dtype: Any = None,
        *more: Any,
    ) -> Tensor:
        """A view of a storage, within it and with no element twice."""
        self.budget -= 8
        _require(
            type(storage) is Storage and _is_size(offset) and type(size) is tuple and type(stride) is tuple,
            "it has a tensor of an odd form",
        )
        size, stride = self._size(size), self._size(stride)
        dtype = storage.dtype or dtype
        _require(
            isinstance(dtype, torch.dtype) and len(size) == len(stride) and not any(more),
            "it has a tensor of an odd form",
        )
        held = storage.nbytes // dtype.itemsize
        count = 1
        for length in size:
            count *= length
        reach = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
        if count > held or offset + reach > held:
            raise Malformed(f"it has a tensor of shape {tuple(size)}, and {held:,} numbers for it")
        if self.read_storage is None:
            return torch.empty(0, dtype=dtype)
        data = self.read_storage(storage)
        if dtype == torch.bool and len(data) and int(data.max()) > 1:
            raise Malformed("it has truth values other than 0 and 1")
        tensor = torch.empty(0, dtype=dtype).set_(data.untyped_storage(), offset, size, stride)
        return tensor.requires_grad_() if requires_grad is True and dtype.is_floating_point else tensor

    def _parameter(self, data: Any, requires_grad: Any, hooks: Any = None) -> Tensor:
        _require(isinstance(data, Tensor), "its pickle is damaged")
        return torch.nn.Parameter(data.detach(), requires_grad is True and data.is_floating_point())
