"""Packs: many tasks over one base, a small file each, that come and go.

::

    export.py    a pack of the tasks of a checkpoint, each proven
    changes.py   a task more, a task less: one rename, under a lock
    graphs.py    the base, with what a task adds as inputs; task.py, fit.py: what that is
"""
