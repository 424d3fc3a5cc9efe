"""What an attribute reads as when its object is not there."""

from __future__ import annotations

from typing import NoReturn

from cubicweb import Binary

from cubicweb_s3storage.errors import ObjectMissing


class MissingValue(Binary):
    """A value whose object is missing: a query returns it, every use of it raises.

    :param error: what is raised
    """

    def __init__(self, error: ObjectMissing) -> None:
        super().__init__()
        self._error = error

    def _refuse(self, *args, **kwargs) -> NoReturn:
        raise self._error

    read = read1 = readinto = readinto1 = readline = readlines = _refuse
    getvalue = getbuffer = to_file = unzpickle = _refuse
    seek = tell = write = writelines = truncate = _refuse
    __iter__ = __next__ = __eq__ = __reduce_ex__ = __getstate__ = _refuse
    __hash__ = None
