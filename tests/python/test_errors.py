"""Every error code has its exception class, and native errors arrive as it."""

from __future__ import annotations

import pytest
import transfuse
from transfuse.errors import CLASS_OF_CODE


def test_every_code_has_exactly_one_class():
    assert set(CLASS_OF_CODE) == set(transfuse.ErrorCode)
    assert len(set(CLASS_OF_CODE.values())) == len(transfuse.ErrorCode)


@pytest.mark.parametrize("code", list(transfuse.ErrorCode), ids=lambda code: code.name)
def test_a_class_is_named_after_its_code_and_exported(code):
    cls = CLASS_OF_CODE[code]
    words = "".join(word.capitalize() for word in code.name.split("_"))
    assert cls.__name__ == f"{words}Error"
    assert cls.code is code
    assert issubclass(cls, transfuse.TransfuseError)
    assert getattr(transfuse, cls.__name__) is cls
    assert cls.__name__ in transfuse.__all__


def test_a_native_error_is_raised_as_its_class_with_its_message():
    with pytest.raises(transfuse.InvalidArgumentError, match="f33"):
        transfuse.Dtype.parse("f33")
    with pytest.raises(transfuse.CorruptError):
        transfuse.Layout.decode(b"not a layout")


def test_all_names_of_the_package_exist():
    for name in transfuse.__all__:
        assert hasattr(transfuse, name)
