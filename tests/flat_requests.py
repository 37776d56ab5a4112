"""Requests of commands out of flat keyword arguments, as flags are flat."""

from __future__ import annotations

import dataclasses
import typing

from megatron_direct.config import Given, ParallelConfig


def make(request: type, layout: ParallelConfig, given: Given | None = None, **values):
    """Each value goes to every group that has a field of its name; one that fits none raises."""
    groups, used = {}, set()
    for name, kind in typing.get_type_hints(request).items():
        if kind is Given:
            groups[name] = given or Given()
        elif kind is ParallelConfig:
            groups[name] = layout
        else:
            own = {f.name for f in dataclasses.fields(kind)} & values.keys()
            groups[name] = kind(**{key: values[key] for key in own})
            used |= own
    assert used == values.keys(), values.keys() - used
    return request(**groups)
